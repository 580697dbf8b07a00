"""What a request draws: batches of images with a record each, as rows of samples, a sweep over w, a walk between clusters, or
the steps of a trajectory."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm_sg.data.signals import Signals
from ldm_sg.errors import InputError
from ldm_sg.guidance.signal import Guidance
from ldm_sg.sampling.draw import image_generator, slerp
from ldm_sg.sampling.options import SampleOptions
from ldm_sg.sampling.request import signals

if TYPE_CHECKING:
    from ldm_sg.pipeline import SelfGuidedPipeline


@dataclass(frozen=True)
class Batch:
    """Images [B, 3, H, W] uint8, one record an image, and the signals that they were asked to follow, where one has its own."""

    images: Tensor
    records: list[dict[str, Any]]
    asked: Signals | None = None


def plan(pipe: "SelfGuidedPipeline", options: SampleOptions) -> tuple[Iterator[Batch], int, list[str]]:
    """What to draw, lazily, how many columns its grid has, and captions of its rows if they have any."""
    if options.interpolate:
        return _interpolate(pipe, options), options.n, ["fixed noise", "moving noise"]
    if options.trajectory:
        return _trajectory(pipe, options), min(10, options.steps), []
    asked = signals(pipe, options)
    if options.sweep_w:  # the same signals and noise in each row
        rows = itertools.chain.from_iterable(generate(pipe, asked, options, w) for w in options.sweep_w)
        return rows, len(asked), [f"w = {w:g}" for w in options.sweep_w]
    columns = options.n if options.cluster and options.n <= 16 else 8
    return generate(pipe, asked, options, options.w), columns, []


def generate(pipe: "SelfGuidedPipeline", asked: Signals, options: SampleOptions, w: float) -> Iterator[Batch]:
    """Image i of the whole request has noise (seed, i), whatever the batch size; with vary=layout all have noise (seed, 0)."""
    bar = tqdm(total=len(asked), unit="image", desc=f"sampling w={w:g}")
    for start in range(0, len(asked), options.batch_size):
        part = asked[torch.arange(start, min(start + options.batch_size, len(asked)))]
        noise = None
        if options.vary == "layout":
            one = torch.randn(pipe.latent_shape, generator=image_generator(options.seed, 0))
            noise = one.expand(len(part), -1, -1, -1)
        images = pipe.generate(part, w, first_index=start, noise=noise, **options.solving())
        bar.update(len(part))
        records = [_record(options, **part.describe(i), w=w, index=start + i) for i in range(len(part))]
        yield Batch(images, records, part)
    bar.close()


def _interpolate(pipe: "SelfGuidedPipeline", options: SampleOptions) -> Iterator[Batch]:
    """n images on the arc between two clusters' embeddings: first row fixed noise, second row noise on its own arc too."""
    first, last = options.interpolate
    if pipe.spec.multi_hot or pipe.spec.spatial:
        raise InputError("--interpolate walks between two cluster ids; this run's signals are more than an id")
    pipe.clusters([first, last])  # refuses ids that do not exist
    known = pipe.conditioner
    rows = (known.token_labels if known.config.tokens_only else known.labels).detach().flatten(1)
    k = torch.zeros(options.n, pipe.spec.num_labels)
    shares = [i / max(1, options.n - 1) for i in range(options.n)]
    for i, share in enumerate(shares):
        a, b = slerp(rows[first], rows[last], share)
        k[i, first] += a
        k[i, last] += b
    ends = [torch.randn(pipe.latent_shape, generator=image_generator(options.seed, i)) for i in (0, 1)]
    arc = torch.stack([a * ends[0] + b * ends[1] for a, b in (slerp(*ends, share) for share in shares)])
    for noise in (ends[0].expand(options.n, -1, -1, -1), arc):
        for start in range(0, options.n, options.batch_size):
            part = slice(start, start + options.batch_size)
            images = pipe.generate(
                Guidance.from_k(k[part]), options.w, noise=noise[part], first_index=start, **options.solving()
            )
            yield Batch(images, [_record(options, k=[first, last], share=s, w=options.w) for s in shares[part]])


def _trajectory(pipe: "SelfGuidedPipeline", options: SampleOptions) -> Iterator[Batch]:
    """Each row one image: the predicted clean image at up to ten steps, the last one finished."""
    chosen = signals(pipe, options)
    columns = min(10, options.steps)
    shown = [round(i * (options.steps - 1) / max(1, columns - 1)) for i in range(columns)]
    for i in range(len(chosen)):
        seen: dict[int, Tensor] = {}
        watch = lambda step, x0, seen=seen: seen.update({step: x0}) if step in shown else None  # noqa: E731
        final = pipe.generate(chosen[torch.tensor([i])], options.w, first_index=i, watch=watch, **options.solving())
        frames = [pipe.decode(seen[step]) for step in shown[:-1]] + [final]
        said = chosen.describe(i)
        records = [_record(options, **said, index=i, step=s, w=options.w) for s in shown]
        yield Batch(torch.cat(frames), records, chosen[torch.full((len(frames),), i)])


def _record(options: SampleOptions, **what: Any) -> dict[str, Any]:
    return {"seed": options.seed, **what, **options.method()}
