"""demo: the whole main job on the embedded photos; every stage that is already done is kept."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ldm_sg.config import AnnotateConfig, TrainConfig
from ldm_sg.configfile import ASSETS, ROOT, load
from ldm_sg.data.latents import LatentSet
from ldm_sg.errors import need_choice
from ldm_sg.folder import write_json
from ldm_sg.pipeline import SelfGuidedPipeline, open_pipeline
from ldm_sg.report import grids
from ldm_sg.report.annotation import first_images
from ldm_sg.report.run import write_report
from ldm_sg.report.signals import pictures
from ldm_sg.sampling.options import SampleOptions
from ldm_sg.verbs.annotate import annotate
from ldm_sg.verbs.evaluate import evaluate
from ldm_sg.verbs.pack import pack
from ldm_sg.verbs.sample import sample
from ldm_sg.verbs.train import train

CONFIGS = ("demo", "demo_masks")
EVALUATED = 1000  # samples, and as many real images
ROWS, REAL, SAMPLES = 8, 6, 8  # of the cluster picture
STRENGTHS = [0.0, 1.0, 2.0, 3.0]


def demo(out: Path | None = None, config: str = "demo", steps: int | None = None, device: str = "auto") -> Path:
    """pack -> annotate -> train -> sample -> evaluate -> report into `out` (default runs/CONFIG), data beside it in OUT-data;
    returns the report. `config` names configs/annotate/CONFIG.yaml and configs/train/CONFIG.yaml."""
    need_choice("config", config, CONFIGS)
    out = out or Path("runs") / config
    data = out.with_name(out.name + "-data")
    shards, annotation, timings = data / "shards", data / "annotation", data / "timings.json"
    with _stage("pack", timings):
        pack(str(ASSETS / "fruit64"), shards, size=64, shard_size=1027, format="png")
    with _stage("annotate", timings):
        places = [f"shards={shards}/*.tar", f"out={annotation}", f"device={device}"]
        annotate(load(AnnotateConfig, ROOT / "configs" / "annotate" / f"{config}.yaml", places))
    with _stage("train", timings):
        places = [f"annotation={annotation}", f"out={out}", f"device={device}"] + [f"steps={steps}"] * bool(steps)
        train(load(TrainConfig, ROOT / "configs" / "train" / f"{config}.yaml", places))
    with _stage("sample", timings):
        picture = _pictures(out, annotation, device)
    with _stage("evaluate", timings):
        metrics = _evaluate(out, shards, device)
    seconds = json.loads(timings.read_text())
    metrics["seconds"] = round(sum(seconds.values()), 1)
    write_json(out / "metrics.json", metrics)
    write_json(out / "timings.json", seconds)
    (out / "command.txt").write_text(f"ldm-sg demo --config {config} --out {out}\n")
    report = write_report(out)
    print(json.dumps(metrics, indent=2))
    print(f"report   {report}\npicture  {picture}")
    return report


@contextmanager
def _stage(name: str, timings: Path) -> Iterator[None]:
    """Its seconds of work are added up over starts in the file `timings`, so that a second start still knows them."""
    print(f"== {name}", flush=True)
    started = time.perf_counter()
    try:
        yield
    finally:
        spent = time.perf_counter() - started
        seconds = json.loads(timings.read_text()) if timings.is_file() else {}
        if spent > 3 or name not in seconds:  # finding a stage done is not work
            write_json(timings, seconds | {name: round(seconds.get(name, 0.0) + spent, 1)})


def _evaluate(run: Path, shards: Path, device: str) -> dict[str, Any]:
    """The figures of metrics.json; an evaluation younger than the pipeline it judged is not made again."""
    found: dict[str, dict[str, Any]] = {}
    for name, pipeline, w, metrics in (
        ("untrained", "pipeline_untrained", 1.0, "fd"),
        ("w0", "pipeline", 0.0, "fd"),
        ("w1", "pipeline", 1.0, None),
        ("w2", "pipeline", 2.0, None),
    ):
        source, file = run / pipeline, run / "evaluations" / f"demo_{pipeline}_w{w:g}.json"
        if _is_fresh(file, source):
            result = json.loads(file.read_text())
        else:
            source = run if pipeline == "pipeline" else source
            how = {"n": EVALUATED, "features": "demo-g", "w": w, "batch_size": 125, "out": file, "device": device}
            result = evaluate(source, str(shards), metrics, **how)
        # a run's g may read another layer of demo-g
        found[name] = result["metrics"].get("own", {}) | result["metrics"]["demo-g"]
    last = found["w2"]
    control = "consistency" if "consistency" in last else "layout_agreement"
    figures = {f"fd_{name}": values["fd"] for name, values in found.items()}
    figures |= {f"{m}_{w}": found[w][m] for m in (control, "precision", "recall") for w in ("w1", "w2")}
    controls = (f"{control}_{name}" for name in ("real", "chance", "shuffled"))
    return figures | {name: last[name] for name in controls if name in last}


def _is_fresh(made: Path, pipeline: Path) -> bool:
    return made.is_file() and made.stat().st_mtime > (pipeline / "model_index.json").stat().st_mtime


def _pictures(run: Path, annotation: Path, device: str) -> Path:
    """The run's pictures; returns the one that says most."""
    layouts = LatentSet(annotation).spec.spatial is not None
    best = run / ("layouts.png" if layouts else "clusters.png")
    if _is_fresh(best, run / "pipeline"):
        return best
    wanted: dict[str, dict[str, Any]] = {
        "sweep_w": {"n": 10, "sweep_w": STRENGTHS},
        "trajectory": {"n": 5, "trajectory": True},
    }
    if not layouts:
        wanted["interpolation"] = {"n": 10, "interpolate": _largest(annotation)[:2]}
    for name, asked in wanted.items():
        options = SampleOptions(**asked, device=device, precision="auto")
        shutil.copyfile(sample(str(run), options, overwrite=True) / "grid.png", run / f"{name}.png")
    draw = _layout_picture if layouts else _cluster_picture
    draw(open_pipeline(run, device), annotation, best)
    return best


def _largest(annotation: Path) -> list[int]:
    """Cluster ids, most members first."""
    return (-LatentSet(annotation).signals.counts()).argsort(kind="stable").tolist()


def _cluster_picture(pipe: SelfGuidedPipeline, annotation: Path, path: Path) -> None:
    """Each row one of the clusters, spread from the largest to the median one."""
    ids = _largest(annotation)
    ids = [ids[i * len(ids) // (2 * ROWS)] for i in range(ROWS)]
    samples = pipe.generate(pipe.clusters([k for k in ids for _ in range(SAMPLES)]), precision="auto").split(SAMPLES)
    latents = LatentSet(annotation)
    chosen = [latents.signals.having(k)[:REAL] for k in ids]
    real = latents.images(torch.cat(chosen)).split([len(places) for places in chosen])
    grids.save(grids.cluster_picture(ids, real, samples), path)


def _layout_picture(pipe: SelfGuidedPipeline, annotation: Path, path: Path) -> None:
    """Each row one layout: a real image, its signal, samples that follow it."""
    latents = LatentSet(annotation)
    images, places = first_images(latents, ROWS)
    asked = latents.signals[places]
    drawn = pictures(asked, images.shape[-1])
    assert drawn is not None
    samples = pipe.generate(asked[torch.arange(ROWS).repeat_interleave(SAMPLES)], precision="auto").split(SAMPLES)
    rows = [torch.cat([images[i : i + 1], drawn[i : i + 1], samples[i]]) for i in range(ROWS)]
    heads = ["real", "asked", "samples"] + [""] * (SAMPLES - 1)
    grids.save(grids.labelled_rows([""] * ROWS, rows, heads), path)
