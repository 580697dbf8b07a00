"""finetune: a run -> a run on other, unlabelled images: pack and annotate as the run did, then train on from its weights."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm_sg.annotate.kinds import features_of, load_annotator, load_f
from ldm_sg.commands import FinetuneOptions
from ldm_sg.config import AnnotateConfig, ReplayConfig, TrainConfig
from ldm_sg.configfile import from_mapping, load
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.shards import holds_shards
from ldm_sg.errors import InputError, need_choice, need_within
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
BOUND = ("annotation", "out", "init", "lora", "steps")  # keys that the command sets
FEWEST = 8  # held-out images by which training may be stopped
PAIRS = 12  # samples beside the training image nearest to each
JUDGED = 500  # samples with which it is measured what the base has forgotten


def finetune(run: str | Path, images: str, **options: Any) -> Path:
    """`options`: the other fields of FinetuneOptions. `images`: a photo folder, shards, or an annotation set made with the run's
    g and first stage. Data lies in OUT-data, as with the demo. Returns the new run; the same command resumes, and with more steps
    goes on, with the DERIVED settings of the start."""
    asked = FinetuneOptions(Path(run), images, **options)
    of = Path(images).resolve().stem.strip("*") or "tuned"
    asked.out = out = Path(asked.out or asked.run.with_name(f"{asked.run.name}-{of}"))
    annotated = (Path(images) / "manifest.yaml").is_file()
    _check(asked, annotated)
    base = _config_of(asked.run)
    begun = _config_of(out) if (out / "config.yaml").is_file() else None
    if (begun.init != str(run)) if begun else (out.exists() and any(out.iterdir())):
        raise InputError(f"{out} is there already, and not fine-tuned from {run}: choose another --out")
    data = out.with_name(out.name + "-data")
    annotation = Path(images) if annotated else data / "annotation"
    config = _config(base, asked, annotation)
    if begun:
        config = replace(config, **{name: getattr(begun, name) for name in DERIVED})
    load(TrainConfig, config, asked.overrides)  # refuses what cannot be before anything is packed
    pipe = open_pipeline(run, asked.device)
    if not annotated:
        _annotate(pipe.source_size, asked, data)
    if len(LatentSet(annotation)) * config.val_share < FEWEST:
        config = replace(config, patience=0)
        print(f"note: too few images to hold some out: all {asked.steps} steps are taken", file=sys.stderr)
    train(load(TrainConfig, config, asked.overrides))
    clusters = "annotated before" if annotated else asked.clusters
    _look(open_pipeline(out, asked.device), pipe, base, annotation, out, clusters)
    print((out / "finetune.json").read_text() + str(out / "finetune.json"))
    return out


def _check(asked: FinetuneOptions, annotated: bool) -> None:
    """InputError for options that mean nothing, or not together."""
    need_choice("clusters", asked.clusters, CLUSTERS)
    if asked.k is not None:
        need_within("k", asked.k, 1)
    if asked.clusters == "reuse" and asked.k is not None:
        raise InputError(f"k={asked.k}: clusters=reuse takes the run's own; give refit or extend")
    if asked.replay and asked.clusters == "refit":
        raise InputError(
            f"replay={asked.replay}: after clusters=refit the old images have no label; give reuse or extend"
        )
    if annotated and (asked.k is not None or asked.clusters != "refit"):
        raise InputError(
            f"{asked.images} is annotated already: k and clusters were chosen then (annotator.reuse=, .extend=)"
        )
    if bound := [o for o in asked.overrides or [] if o.partition("=")[0] in BOUND]:
        raise InputError(f"{bound[0]}: this command decides that: by RUN, IMAGES and its flags")
    if pipeline_of(asked.run) != asked.run / "pipeline" or not (asked.run / "config.yaml").is_file():
        raise InputError(f"{asked.run}: give the folder of a trained run, with config.yaml and pipeline/ in it")


def _config_of(run: Path) -> TrainConfig:
    return from_mapping(TrainConfig, read_mapping(run / "config.yaml"), str(run / "config.yaml"))


def _annotate(size: int, asked: FinetuneOptions, data: Path) -> None:
    """DATA/annotation, of the images at `size` pixels, by the run's g, f and first stage."""
    folder, shards, k = asked.run / "pipeline" / "annotator", asked.images, asked.k
    f, settings = load_f(folder)
    g = features_of(folder, settings)
    if not holds_shards(shards):
        pack(shards, data / "shards", size=size, format="png" if size <= 64 else "jpg")
        shards = f"{data / 'shards'}/*.tar"
    count = sources.open_images(shards).total
    if not f.spec.num_labels and (k is not None or asked.clusters != "refit"):
        raise InputError(f"{asked.run}: its signals, of kind {f.kind}, have no labels: leave --k and --clusters out")
    if asked.clusters == "extend" and not f.gives_ids:
        raise InputError(f"clusters=extend: {asked.run} has {f.kind}, to which none can be added; give refit or reuse")
    if asked.clusters != "reuse" and k is None and f.spec.num_labels:
        k = f.k if count is None or not f.gives_ids else max(2, min(f.k, count // IMAGES_A_CLUSTER))
    known = {name: str(folder) if asked.clusters == name else None for name in ("reuse", "extend")}
    own, autoencoder = replace(f.cfg, k=k or f.cfg.k, **known), str(asked.run / "pipeline" / "autoencoder")
    annotate(
        AnnotateConfig(
            shards=shards, out=str(data / "annotation"), autoencoder=autoencoder, size=size,
            features=g, annotator=own, flips=True, device=asked.device,
        )
    )  # fmt: skip


def _config(base: TrainConfig, asked: FinetuneOptions, annotation: Path) -> TrainConfig:
    """The run's own training, in `steps` steps: a rate that falls for the second half, an average over the last fifth."""
    steps, lora = asked.steps, asked.lora
    each = max(1, steps // 5)
    return replace(
        base, annotation=str(annotation), out=str(asked.out), init=str(asked.run), steps=steps, lora=lora, device=asked.device,
        lr=base.lr * (4 if lora else 0.5), warmup=min(base.warmup, steps // 10), decay=0.5, ema=min(base.ema, 1 - 5 / max(steps, 10)),
        val_share=max(base.val_share, 0.1), val_every=each, sample_every=each, checkpoint_every=each, keep_every=0,
        replay=ReplayConfig(base.annotation, asked.replay) if asked.replay else ReplayConfig(), patience=3,
        leave_out=None, block_shards=None,  # of the base's set
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
        asked, real = pipe.draw(JUDGED), LatentSet(old).features()
        judge = load_annotator(old / "annotator", tuned.device)
        found["fd_of_the_base_before"] = nearby.distance(pipe, asked, judge, real)
        found["fd_of_the_base_after"] = nearby.distance(tuned, asked.replace(spec=tuned.spec), judge, real)
    write_json(out / "finetune.json", found)
    write_report(out)
