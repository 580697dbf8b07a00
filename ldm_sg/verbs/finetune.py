"""finetune: a run -> a run on other, unlabelled images: pack and annotate as the run did, then train on from its weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm_sg.annotate.kinds import features_of, load_annotator, load_f
from ldm_sg.config import AnnotateConfig, ReplayConfig, TrainConfig
from ldm_sg.configfile import from_mapping, load, to_yaml
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.signals import Signals
from ldm_sg.errors import InputError, choices
from ldm_sg.evaluate import nearby, sources
from ldm_sg.folder import pipeline_of, read_mapping, write_json, write_text
from ldm_sg.pipeline import SelfGuidedPipeline, open_pipeline
from ldm_sg.report import grids
from ldm_sg.report.run import write_report
from ldm_sg.verbs.annotate import annotate
from ldm_sg.verbs.pack import pack
from ldm_sg.verbs.train import train

CLUSTERS = ("refit", "reuse", "extend")
IMAGES_A_CLUSTER = 20  # by default
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
    training config. Data lies in OUT-data, as with the demo. Returns the new run; the same command resumes."""
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
    out = (
        Path(out)
        if out is not None
        else run.with_name(f"{run.name}-{Path(images).resolve().stem.strip('*') or 'tuned'}")
    )
    data = out.with_name(out.name + "-data")
    pipe = open_pipeline(run, device)
    annotation = _annotation(pipe, run, images, data, k, clusters, device)
    config = _config(base, run, annotation, out, steps, lora, replay, device)
    write_text(data / "train.yaml", to_yaml(config))
    config = load(TrainConfig, data / "train.yaml", overrides)
    train(config)
    _look(open_pipeline(out, device), pipe, base, annotation, out, clusters)
    print(out / "finetune.json")
    return out


def _annotation(
    pipe: SelfGuidedPipeline, run: Path, images: str, data: Path, k: int | None, clusters: str, device: str
) -> Path:
    """The annotation set of `images`, made by the run's g, f and first stage unless it is one."""
    if (Path(images) / "manifest.yaml").is_file():
        if k is not None or clusters != "refit":
            raise InputError(
                f"{images} is annotated already: k and clusters were chosen then (annotator.reuse=, .extend=)"
            )
        return Path(images)
    folder, size = run / "pipeline" / "annotator", pipe.source_size
    f, settings = load_f(folder)
    g = features_of(folder, settings)
    shards = images
    if Path(images).is_dir() and any(Path(images).glob("*.tar")):
        shards = f"{images}/*.tar"
    elif ".tar" not in images:
        shards = f"{data / 'shards'}/*.tar"
        pack(images, data / "shards", size=size, format="png" if size <= 64 else "jpg")
    count = sources.open_images(shards).total
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
    return data / "annotation"


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
    latents, g = LatentSet(annotation), load_annotator(annotation / "annotator", tuned.device)
    samples, real, cosine = nearby.nearest(tuned, g, latents, PAIRS)
    found["nearest_cosine"] = float(cosine.mean())
    grids.save(grids.labelled_rows(["sample", "nearest"], [samples, real]), out / "nearest.png")
    old = Path(base.annotation)
    if clusters != "refit" and (old / "manifest.yaml").is_file():
        own = LatentSet(old)
        real = own.features(torch.arange(len(own)))
        asked = pipe.draw(JUDGED)
        grown: Signals = asked.replace(spec=tuned.spec)
        judge = load_annotator(old / "annotator", tuned.device)
        found["fd_of_the_base_before"] = nearby.distance(pipe, asked, judge, real)
        found["fd_of_the_base_after"] = nearby.distance(tuned, grown, judge, real)
    write_json(out / "finetune.json", found)
    write_report(out)
