"""What is judged: samples drawn from a run as they are read, or images on disk."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_sg.annotate.kinds import load_annotator
from ldm_sg.data.images import squares
from ldm_sg.data.signals import Signals
from ldm_sg.errors import InputError
from ldm_sg.evaluate import sources
from ldm_sg.evaluate.options import DRAWING, Options
from ldm_sg.folder import pipeline_of
from ldm_sg.hardware import pick_device
from ldm_sg.pipeline import SelfGuidedPipeline, open_pipeline
from ldm_sg.sampling.draw import image_generator


@dataclass(frozen=True)
class Subject:
    """The images, and the run that they are of, if any."""

    where: str
    total: int
    size: int
    at_once: int  # images that pass through networks together
    batches: Callable[[slice, sources.OnSkip], Iterator[tuple[Tensor, Tensor]]]  # -> positions [B], uint8 [B, 3, H, W]
    images: sources.ImageSet | None  # where they lie on disk
    asked: Signals | None  # the whole signals, where they were drawn from a run
    sampling: dict[str, Any]  # w, steps, scheduler, seed, as far as they are known
    out: Path  # where the result goes when nothing else is said
    run: Path | None
    pipe: SelfGuidedPipeline | None

    @property
    def guided(self) -> bool:
        """False for a run that saw nothing but the null: its samples follow no signal."""
        return self.pipe is None or self.pipe.config.drop != 1

    def ids(self) -> Tensor:
        """The cluster each was asked for [N], by position; InputError where nothing says."""
        if self.images is not None:
            return self.images.ids()
        if self.asked is None or not self.asked.spec.one_id:
            raise InputError(f"{self.where}: cluster consistency is for runs with one cluster id an image; try layout")
        return self.asked.k

    def at(self, places: Collection[int]) -> dict[int, Tensor]:
        """The images at these positions, uint8 [3, H, W]; of a run, drawn again."""
        if self.images is not None:
            return sources.at(self.images, places, self.size)
        found: dict[int, Tensor] = {}
        for start in sorted({place - place % self.at_once for place in places}):
            for there, images in self.batches(slice(start, start + self.at_once), lambda *_: None):
                found |= dict(zip(there.tolist(), images))
        return found

    @property
    def within(self) -> int | None:
        """Pixels at which reference images are seen before their centre is taken, for a run that learnt crops."""
        return self.pipe.source_size if self.pipe and self.pipe.image_size == self.size else None


def fitting(size: int, device: torch.device) -> int:
    """How many images of `size` pixels a side pass through networks together: by nothing else, so that results are the same to the
    bit for any batch_size and processes; as many as 8 GB hold and as are faster than fewer."""
    return max(1, min(16 if device.type == "cpu" else 64, 2**20 // size**2))


def open_subject(options: Options, judges: list[str]) -> Subject:
    """`judges`: names for the file of the figures. InputError where the source is neither a run nor images."""
    source, run = Path(options.source), options.run and Path(options.run)
    drawn = pipeline_of(source) is not None
    if drawn and run:
        raise InputError(f"run={str(run)!r}: {source} is a run itself; `run` is for images on disk")
    run = source if drawn else run or next(filter(pipeline_of, source.resolve().parents), None)
    pipe = open_pipeline(run, options.device, options.checkpoint) if run else None
    if pipe and drawn:
        return _from_run(pipe, source, options, judges)
    drawing = ("w", *DRAWING, "checkpoint", "prior")
    if any(getattr(options, name) is not None for name in drawing):
        raise InputError(f"{', '.join(drawing)} are for drawing from a run; {source} holds images")
    return _from_disk(sources.open_images(options.source), options, run, pipe)


def _from_run(pipe: SelfGuidedPipeline, folder: Path, options: Options, judges: list[str]) -> Subject:
    """n samples drawn as they are read; image i and its signal depend on (seed, i) only, to the bit: other numbers at once would
    move single pixels by a grey level, so the last ones are drawn with further ones, which are dropped."""
    n, own = options.n, pipe.image_size
    if options.size not in (None, own):
        raise InputError(f"size={options.size}: the samples of {folder} have {own} pixels, and so the reference")
    given = {name: value for name in DRAWING if (value := getattr(options, name)) is not None}
    w = pipe.usual_w if options.w is None else pipe.strength(options.w)
    settings, solving = DRAWING | given | {"w": w, "seed": options.seed}, options.drawing().solving()
    at_once = fitting(own, pipe.device)
    prior, clusters = _prior(pipe, folder, options, n + -n % at_once)
    padded = pipe.draw(n + -n % at_once, options.seed, clusters=clusters)

    def batches(part: slice, _: sources.OnSkip) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(n)[part][::at_once]:
            places = torch.arange(start, start + at_once)
            images = squares(pipe.generate(padded[places], w=w, first_index=start, **solving))
            yield places[: n - start], images[: n - start]

    name = "w{w:g}_{scheduler}{steps}_seed{seed}".format(**settings)
    made = settings | {"signals": f"drawn from {prior}"}
    if pipe.checkpoint is not None:
        name, made = f"step{pipe.checkpoint}_{name}", made | {"checkpoint": pipe.checkpoint}
    home = folder
    if (folder / "model_index.json").is_file():  # a pipeline folder, which training replaces, of a run
        home, name = folder.parent, f"{folder.name}_{name}"
    file = home / "evaluations" / f"{name}_n{n}_{'_'.join(judges)[:80]}.json"
    return Subject(str(folder), n, own, at_once, batches, None, padded[torch.arange(n)], made, file, folder, pipe)


def _prior(pipe: SelfGuidedPipeline, folder: Path, options: Options, n: int) -> tuple[str, list[int] | None]:
    """What labels are drawn from, in words, and those of n samples; None: whole signals of training images are drawn."""
    if options.prior in (None, "empirical"):
        return "the training distribution", None
    if not pipe.spec.one_id:
        raise InputError(f"prior={options.prior}: {folder} has no cluster ids to draw from")
    if options.prior == "uniform":
        known = pipe.signals.k.unique().cpu()
        words = f"a uniform prior over the {len(known):,} clusters of training images"
    else:
        known = _ids(pipe, options)
        words = f"the clusters of {len(known):,} held-out images"
    generators = (image_generator(options.seed, i, "label") for i in range(n))
    return words, [int(known[torch.randint(len(known), (1,), generator=each)]) for each in generators]


def _ids(pipe: SelfGuidedPipeline, options: Options) -> Tensor:
    """The clusters [M] of the held-out images, seen as `annotate` sees them, by the run's own g and f."""
    if options.held_out is None:
        raise InputError("prior=held-out: name images that training did not see: --held-out SHARDS_OR_FOLDER")
    images, own = sources.open_images(options.held_out), load_annotator(pipe.annotator_folder, pipe.device)
    seen = {"size": pipe.image_size, "within": pipe.source_size}
    sources.first_size(images)  # one can be read

    def compute() -> dict[str, Tensor]:
        return {"k": torch.cat([own.of_image(photo, **seen).k for photo in sources.pictures(images, sources.MOST)])}

    return sources.remembered(images, compute, annotator=own.digest, what="k", **seen)["k"]


def _from_disk(
    images: sources.ImageSet, options: Options, run: Path | None, pipe: SelfGuidedPipeline | None
) -> Subject:
    """At most n images, spread over the set."""
    n, total, size = options.n, images.total, options.size or sources.first_size(images)
    at_once = fitting(size, pick_device(options.device))

    def batches(part: slice, on_skip: sources.OnSkip) -> Iterator[tuple[Tensor, Tensor]]:
        return sources.batches(images, size, at_once, n, on_skip, part=part)

    folder, count = Path(images.where), n if total is None else min(n, total)
    out = (folder if folder.is_dir() else Path()) / "evaluation.json"
    return Subject(images.where, count, size, at_once, batches, images, None, images.sampling(), out, run, pipe)
