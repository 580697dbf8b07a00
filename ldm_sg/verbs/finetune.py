"""finetune: a run -> a run on other, unlabelled images: pack and annotate as the run did, then train on from its weights."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm_sg.annotate.kinds import features_of, load_annotator, load_f
from ldm_sg.config import AnnotateConfig, ReplayConfig, TrainConfig
from ldm_sg.configfile import from_mapping, load
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.shards import holds_shards
from ldm_sg.data.signals import Signals
from ldm_sg.errors import InputError, choices
from ldm_sg.evaluate import nearby, sources
from ldm_sg.folder import pipeline_of, read_mapping, write_json
from ldm_sg.pipeline import SelfGuidedPipeline, open_pipeline
from ldm_sg.report import grids
from ldm_sg.report.run import read_curves, write_report
from ldm_sg.verbs.annotate import annotate
from ldm_sg.verbs.pack import pack
from ldm_sg.verbs.train import train

CLUSTERS = ("refit", "reuse", "extend")
DERIVED = ("warmup", "ema", "val_every", "sample_every", "checkpoint_every")  # from the steps asked for at first
IMAGES_A_CLUSTER = 40  # by default
FEWEST = 8  # held-out images by which training may be stopped
PAIRS = 12  # samples beside the training image nearest to each
JUDGED = 500  # samples with which it is measured what the base has forgotten


def finetune(
    run: str | Path,
    images: str,
    k: int | None = None,
    clusters: str = "refit",
    steps: int = 500,
    lora: int = 0,
    replay: float = 0.0,
    out: str | Path | None = None,
    device: str = "auto",
    overrides: list[str] | None = None,
) -> Path:
    """`images`: a photo folder, shards, or an annotation set made with the run's g and first stage. `clusters`: refit (k new ones,
    each starts from old ones like it), reuse (the run's own) or extend (the run's own and k more). `overrides`: of the
    training config. Data lies in OUT-data, as with the demo. Returns the new run; the same command resumes, and with more steps
    goes on, with the DERIVED settings of the start."""
    run = Path(run)
    if clusters not in CLUSTERS:
        raise InputError(f"clusters={clusters!r}; {choices(clusters, CLUSTERS)}")
    if clusters == "reuse" and k is not None:
        raise InputError(f"k={k}: clusters=reuse takes the run's own; give refit or extend")
    if replay and clusters == "refit":
        raise InputError(f"replay={replay}: after clusters=refit the old images have no label; give reuse or extend")
    if pipeline_of(run) != run / "pipeline" or not (run / "config.yaml").is_file():
        raise InputError(f"{run}: give the folder of a trained run, with config.yaml and pipeline/ in it")
    base = from_mapping(TrainConfig, read_mapping(run / "config.yaml"), str(run / "config.yaml"))
    of = Path(images).resolve().stem.strip("*") or "tuned"
    out = run.with_name(f"{run.name}-{of}") if out is None else Path(out)
    data = out.with_name(out.name + "-data")
    if bound := [o for o in overrides or [] if o.partition("=")[0] in ("annotation", "out", "init", "lora", "steps")]:
        raise InputError(f"{bound[0]}: this command decides that: by RUN, IMAGES and its flags")
    if k is not None and k < 1:
        raise InputError(f"k={k}: at least 1")
    begun: TrainConfig | None = None
    if out.exists() and any(out.iterdir()):
        if (path := out / "config.yaml").is_file():
            begun = from_mapping(TrainConfig, read_mapping(path), str(path))
        if begun is None or begun.init != str(run):
            raise InputError(f"{out} is there already, and not fine-tuned from {run}: choose another --out")
    annotated = (Path(images) / "manifest.yaml").is_file()
    if annotated and (k is not None or clusters != "refit"):
        raise InputError(f"{images} is annotated already: k and clusters were chosen then (annotator.reuse=, .extend=)")
    annotation = Path(images) if annotated else data / "annotation"
    config = _config(base, run, annotation, out, steps, lora, replay, device)
    if begun:
        config = replace(config, **{name: getattr(begun, name) for name in DERIVED})
    load(TrainConfig, config, overrides)  # refuses what cannot be before anything is packed
    pipe = open_pipeline(run, device)
    if not annotated:
        _annotate(pipe.source_size, run, images, data, k, clusters, device)
    if len(LatentSet(annotation)) * config.val_share < FEWEST:
        config = replace(config, patience=0)
        print(f"note: too few images to hold some out: all {steps} steps are taken", file=sys.stderr)
    train(load(TrainConfig, config, overrides))
    _look(open_pipeline(out, device), pipe, base, annotation, out, "annotated before" if annotated else clusters)
    print((out / "finetune.json").read_text() + str(out / "finetune.json"))
    return out


def _annotate(size: int, run: Path, images: str, data: Path, k: int | None, clusters: str, device: str) -> None:
    """DATA/annotation, of `images` at `size` pixels, by the run's g, f and first stage."""
    folder = run / "pipeline" / "annotator"
    f, settings = load_f(folder)
    g = features_of(folder, settings)
    shards = images
    if not holds_shards(images):
        shards = f"{data / 'shards'}/*.tar"
        pack(images, data / "shards", size=size, format="png" if size <= 64 else "jpg")
    count = sources.open_images(shards).total
    if not f.spec.num_labels and (k is not None or clusters != "refit"):
        raise InputError(f"{run}: its signals, of kind {f.kind}, have no labels: leave --k and --clusters out")
    if clusters == "extend" and not f.gives_ids:
        raise InputError(f"clusters=extend: {run} has {f.kind}, to which none can be added; give refit or reuse")
    if clusters != "reuse" and k is None and f.spec.num_labels:
        k = f.k if count is None or not f.gives_ids else max(2, min(f.k, count // IMAGES_A_CLUSTER))
    known = {name: str(folder) if clusters == name else None for name in ("reuse", "extend")}
    own = replace(f.cfg, k=k or f.cfg.k, **known)
    annotate(
        AnnotateConfig(
            shards=shards, out=str(data / "annotation"), autoencoder=str(run / "pipeline" / "autoencoder"), size=size,
            features=g, annotator=own, flips=True, device=device,
        )
    )  # fmt: skip


def _config(
    base: TrainConfig, run: Path, annotation: Path, out: Path, steps: int, lora: int, replay: float, device: str
) -> TrainConfig:
    """The run's own training, in `steps` steps: a rate that falls for the second half, an average over the last fifth."""
    each = max(1, steps // 5)
    return replace(
        base, annotation=str(annotation), out=str(out), init=str(run), steps=steps, lora=lora, device=device,
        lr=base.lr * (4 if lora else 0.5), warmup=min(base.warmup, steps // 10), decay=0.5, ema=min(base.ema, 1 - 5 / max(steps, 10)),
        val_share=max(base.val_share, 0.1), val_every=each, sample_every=each, checkpoint_every=each, keep_every=0,
        replay=ReplayConfig(base.annotation, replay) if replay else ReplayConfig(), patience=3,
    )  # fmt: skip


def _look(
    tuned: SelfGuidedPipeline, pipe: SelfGuidedPipeline, base: TrainConfig, annotation: Path, out: Path, clusters: str
) -> None:
    """finetune.json and nearest.png: what the base has forgotten, and whether the images were learnt by heart."""
    found: dict[str, Any] = {"clusters": clusters, "labels": tuned.spec.num_labels}
    judged = {int(step): fd for step, fd in read_curves(out / "metrics.csv").get("fd_held_out", [])}
    if judged:
        best = min(judged, key=lambda step: judged[step])
        found |= {"steps": max(judged), "best_step": best}
        found |= {"fd_held_out": judged[best], "fd_held_out_first": judged[min(judged)]}
    latents, g = LatentSet(annotation), load_annotator(annotation / "annotator", tuned.device)
    samples, real, cosine = nearby.nearest(tuned, g, latents, PAIRS)
    found["nearest_cosine"] = float(cosine.mean())
    grids.save(grids.labelled_rows(["sample", "nearest"], [samples, real]), out / "nearest.png")
    old = Path(base.annotation)
    if clusters in ("reuse", "extend") and (old / "manifest.yaml").is_file():
        print(f"what {base.out} has forgotten: {JUDGED} samples before, {JUDGED} after", file=sys.stderr)
        own = LatentSet(old)
        real = own.features()
        asked = pipe.draw(JUDGED)
        grown: Signals = asked.replace(spec=tuned.spec)
        judge = load_annotator(old / "annotator", tuned.device)
        found["fd_of_the_base_before"] = nearby.distance(pipe, asked, judge, real)
        found["fd_of_the_base_after"] = nearby.distance(tuned, grown, judge, real)
    write_json(out / "finetune.json", found)
    write_report(out)
