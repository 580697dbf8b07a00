"""evaluate: samples of a run, or any images, against real images -> figures with all that is needed to make them again."""

import itertools
import math
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm_sg.annotate.features import FeatureExtractor
from ldm_sg.annotate.kinds import LoadedAnnotator
from ldm_sg.data.images import MAX_SIDE, to_float, to_uint8
from ldm_sg.errors import InputError
from ldm_sg.evaluate import figures, layout, sources
from ldm_sg.evaluate.collect import Network, cached, collect
from ldm_sg.evaluate.consistency import consistency
from ldm_sg.evaluate.inception import Inception
from ldm_sg.hardware import pick_device
from ldm_sg.pipeline import SelfGuidedPipeline, open_pipeline
from ldm_sg.verbs.judged import from_disk, from_run
from ldm_sg.verbs.judges import layouts, open_judges
from ldm_sg.verbs.request import SampleOptions

MOST_REFERENCE = 50_000  # reference images, spread over the whole set
CEILING = 1_000  # of them pass through the autoencoder, for the best that consistency can be


def evaluate(
    source: str | Path,
    reference: str | Path,
    metrics: str | None = None,
    n: int = 10_000,
    features: str | None = None,
    out: str | Path | None = None,
    size: int | None = None,
    w: float = SampleOptions.w,
    steps: int = SampleOptions.steps,
    scheduler: str = SampleOptions.scheduler,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    precision: str = "auto",
    run: str | Path | None = None,
) -> dict[str, Any]:
    """Prints a table, writes `out` (default RUN/evaluations/SETTINGS.json, or evaluation.json in the folder of images)
    and returns what it wrote.

    metrics: default fd and prdc, and what the run's signals allow of consistency (ids) and layout (boxes, masks).
    source: a run or pipeline folder (n samples are drawn, their signals from the training distribution), a folder of
    images or of what `ldm-sg sample` made, or shards. features: the run's own g (default), `inception`,
    `inception:FILE`, any g by name, or a YAML of feature settings. run: whose g and f judge images on disk; default the
    run that holds them. Up to 50,000 reference images are used."""
    started = time.perf_counter()
    wanted = figures.parse_metrics(metrics) if metrics is not None else None
    if size is not None and not 1 <= size <= MAX_SIDE:
        raise InputError(f"size={size}: from 1 to {MAX_SIDE:,} pixels")
    if n < 1 or batch_size < 1 or not math.isfinite(w):
        raise InputError(f"n={n}, batch_size={batch_size}, w={w}: counts of at least 1 and a finite strength")
    real, on = sources.open_images(str(reference)), pick_device(device)
    home = _run_of(Path(source), run, needed=features is None or wanted is None or "consistency" in wanted)
    pipe = open_pipeline(home, device) if home else None
    wanted = wanted or ["fd", "prdc", *_own_metrics(pipe)]
    if pipe and home == Path(source):
        settings = {"w": w, "steps": steps, "scheduler": scheduler, "seed": seed, "precision": precision}
        samples = from_run(pipe, home, n, size, batch_size, settings, features)
    else:
        samples = from_disk(sources.open_images(str(source)), n, size, batch_size)
        if (w, steps, scheduler, precision) != (SampleOptions.w, SampleOptions.steps, SampleOptions.scheduler, "auto"):
            raise InputError(f"w, steps, scheduler and precision are for drawing from a run; {source} holds images")
    figures.check_enough(wanted, samples.total, samples.where)
    figures.check_enough(wanted, sources.count(real), str(reference))
    file = figures.prepare(Path(out) if out is not None else figures.free(samples.out, str(reference), wanted))
    judges = open_judges(wanted, features, samples, pipe, on)

    skipped: list[str] = []
    sizes = (samples.size, sources.first_size(real))
    places, found = collect(samples.batches(skipped), judges.networks(pipe), on, samples.total, "samples")
    within = pipe.source_size if pipe and pipe.image_size == samples.size else None
    real_features = _reference(real, judges.network, samples.size, within, batch_size, on, skipped)
    values = figures.compute(wanted, found["main"], real_features, judges.network, seed)
    if judges.annotator and judges.ids is not None and pipe:
        before, after = _ceiling(real, pipe, judges.annotator, judges.annotator.features, "features", batch_size, on)
        own = found.get("own", found["main"])
        values |= consistency(judges.ids[places], own, _signals(pipe), before, after, judges.annotator.f)
    if judges.annotator and judges.asked is not None and pipe:
        asked = layout.layout(judges.asked[places], pipe.latent_shape[1:])
        judge = layouts(judges.annotator, pipe)
        ceiling = _ceiling(real, pipe, judges.annotator, judge, "layout", batch_size, on)
        values |= layout.faithfulness(asked, found["layout"], *ceiling, pipe.spec.spatial)
    result = {
        "source": str(source),
        "reference": str(reference),
        "chosen": wanted,
        "metrics": values,
        "samples": len(places),
        "reference_images": len(real_features),
        "asked": n,
        "sampling": samples.sampling,
        "preprocessing": {"size": samples.size, **sources.PREPROCESSING},
        "features": dict(judges.network.manifest),
        "annotator": judges.describe(home),
        "notes": figures.remarks(wanted, n, found["main"], real_features, skipped, sizes),
        "seconds": round(time.perf_counter() - started, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {name: version(name) for name in ("ldm-sg", "torch", "diffusers", "torch-fidelity")},
    }
    print(figures.table(result))
    figures.write(file, result)
    print(f"-> {file}")
    return result


def _own_metrics(pipe: SelfGuidedPipeline | None) -> list[str]:
    if pipe is None:
        return []
    return ["consistency"] * pipe.spec.one_id + ["layout"] * (pipe.spec.spatial is not None)


def _is_run(folder: Path) -> bool:
    return any((place / "model_index.json").is_file() for place in (folder, folder / "pipeline"))


def _run_of(source: Path, run: str | Path | None, needed: bool) -> Path | None:
    """The source itself where it is a run; for images on disk, where g and f are `needed`, the run named or the one whose
    folder holds them; otherwise None."""
    if _is_run(source):
        if run is not None:
            raise InputError(f"run={str(run)!r}: {source} is a run itself; `run` is for images on disk")
        return source
    if not needed:
        return None
    return Path(run) if run is not None else next(filter(_is_run, source.resolve().parents), None)


def _signals(pipe: SelfGuidedPipeline) -> Tensor:
    assert pipe.signals.k is not None
    return pipe.signals.k.cpu()


def _reference(
    real: sources.ImageSet,
    network: Inception | FeatureExtractor,
    size: int,
    within: int | None,
    batch_size: int,
    on: torch.device,
    skipped: list[str],
) -> Tensor:
    """Features [M, D] of the reference images, remembered for these files, this preprocessing and these weights."""

    def compute() -> Tensor:
        lost = lambda name, reason: skipped.append(f"{name}: {reason}")  # noqa: E731
        batches = sources.batches(real, size, batch_size, MOST_REFERENCE, lost, within)
        total = sources.count(real)
        return collect(batches, {"main": network}, on, total and min(total, MOST_REFERENCE), "reference")[1]["main"]

    what = {key: network.manifest.get(key) for key in ("name", "sha256", "layer", "pool", "size", "precision")}
    made = {"size": size, "within": within, "limit": MOST_REFERENCE, "device": on.type, "network": what}
    return cached(sources.fingerprint(real, **made), compute)


def _ceiling(
    real: sources.ImageSet,
    pipe: SelfGuidedPipeline,
    annotator: LoadedAnnotator,
    judge: Network,
    what: str,
    batch_size: int,
    on: torch.device,
) -> tuple[Tensor, Tensor]:
    """What `judge`, the annotator's `what`, says of up to CEILING real images before and after the run's autoencoder, [M, X]
    each; remembered for these files, this annotator and this autoencoder."""

    def rebuilt(images: Tensor) -> Tensor:
        pixels = to_uint8(pipe.autoencoder.decode(pipe.autoencoder.encode(images)))
        return judge(to_float(pixels))

    @torch.no_grad()
    def compute() -> Tensor:
        photos, before, after = sources.pictures(real, CEILING), [], []
        bar = tqdm(desc="real, rebuilt", total=min(sources.count(real) or CEILING, CEILING), unit="image")
        while batch := list(itertools.islice(photos, batch_size)):
            squares, seen = annotator.see(batch, pipe.image_size, pipe.source_size)
            before.append(judge(seen).float().cpu())
            after.append(rebuilt(squares).float().cpu())
            bar.update(len(batch))
        return torch.stack([torch.cat(before), torch.cat(after)])

    made = {"what": what, "annotator": annotator.digest, "autoencoder": pipe.autoencoder.manifest.get("sha256")}
    made |= {"size": pipe.image_size, "within": pipe.source_size, "limit": CEILING, "device": on.type, "view": 2}
    before, after = cached(sources.fingerprint(real, **made), compute)
    return before, after
