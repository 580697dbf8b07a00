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
from ldm_sg.errors import InputError, choices
from ldm_sg.folder import write_json
from ldm_sg.pipeline import open_pipeline
from ldm_sg.report import grids
from ldm_sg.report.annotation import first_images
from ldm_sg.report.run import write_report
from ldm_sg.report.signals import pictures
from ldm_sg.sampling.request import SampleOptions
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
    if config not in CONFIGS:
        raise InputError(f"config {config!r}; {choices(config, CONFIGS)}")
    out = out or Path("runs") / config
    data = out.with_name(out.name + "-data")
    shards, annotation = data / "shards", data / "annotation"
    timings = _Timings(data / "timings.json")
    with timings.stage("pack"):
        pack(str(ASSETS / "fruit64"), shards, size=64, shard_size=1027, format="png")
    with timings.stage("annotate"):
        places = [f"shards={shards}/*.tar", f"out={annotation}", f"device={device}"]
        annotate(load(AnnotateConfig, ROOT / "configs" / "annotate" / f"{config}.yaml", places))
    with timings.stage("train"):
        places = [f"annotation={annotation}", f"out={out}", f"device={device}"] + [f"steps={steps}"] * bool(steps)
        train(load(TrainConfig, ROOT / "configs" / "train" / f"{config}.yaml", places))
    with timings.stage("sample"):
        picture = _pictures(out, annotation, device)
    with timings.stage("evaluate"):
        metrics = _evaluate(out, shards, device)
    metrics["seconds"] = round(sum(timings.seconds.values()), 1)
    write_json(out / "metrics.json", metrics)
    write_json(out / "timings.json", timings.seconds)
    (out / "command.txt").write_text(f"ldm-sg demo --config {config} --out {out}\n")
    report = write_report(out)
    print(json.dumps(metrics, indent=2))
    print(f"report   {report}\npicture  {picture}")
    return report


class _Timings:
    """Seconds of work a stage, added up over starts, and kept so that a second start still knows them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            if spent > 3 or name not in self.seconds:  # finding a stage done is not work
                self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 1)
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.path, self.seconds)


def _evaluate(run: Path, shards: Path, device: str) -> dict[str, Any]:
    """The figures of metrics.json; an evaluation younger than the pipeline it judged is not made again."""
    found = {
        "untrained": _evaluation(run / "pipeline_untrained", shards, device, 1.0, "fd"),
        "w0": _evaluation(run, shards, device, 0.0, "fd"),
        "w1": _evaluation(run, shards, device, 1.0, None),
        "w2": _evaluation(run, shards, device, 2.0, None),
    }
    figures = {f"fd_{name}": values["fd"] for name, values in found.items()}
    control = "consistency" if "consistency" in found["w2"] else "layout_agreement"
    figures |= {f"{control}_{w}": found[w][control] for w in ("w1", "w2")}
    for name in ("real", "chance", "shuffled"):
        if f"{control}_{name}" in found["w2"]:
            figures[f"{control}_{name}"] = found["w2"][f"{control}_{name}"]
    return figures | {f"{m}_{w}": found[w][m] for w in ("w1", "w2") for m in ("precision", "recall")}


def _evaluation(source: Path, shards: Path, device: str, w: float, metrics: str | None) -> dict[str, Any]:
    run = source.parent if source.name.startswith("pipeline") else source
    pipeline = source if source != run else run / "pipeline"
    file = run / "evaluations" / f"demo_{pipeline.name}_w{w:g}.json"
    if file.is_file() and file.stat().st_mtime > (pipeline / "model_index.json").stat().st_mtime:
        result = json.loads(file.read_text())
    else:
        result = evaluate(source, str(shards), metrics=metrics, n=EVALUATED, features="demo-g", w=w, batch_size=125, out=file,
                          device=device)  # fmt: skip
    return result["metrics"].get("own", {}) | result["metrics"]["demo-g"]  # a run's g may read another layer of demo-g


def _pictures(run: Path, annotation: Path, device: str) -> Path:
    """The run's pictures; returns the one that says most."""
    layouts = LatentSet(annotation).spec.spatial is not None
    best = run / ("layouts.png" if layouts else "clusters.png")
    if _fresh(best, run):
        return best
    base: dict[str, Any] = {"device": device, "precision": "auto"}
    wanted = {
        "sweep_w": SampleOptions(n=10, sweep_w=STRENGTHS, **base),
        "trajectory": SampleOptions(n=5, trajectory=True, **base),
    }
    if not layouts:
        wanted["interpolation"] = SampleOptions(n=10, interpolate=_largest(annotation)[:2], **base)
    for name, options in wanted.items():
        shutil.copyfile(sample(str(run), options, overwrite=True) / "grid.png", run / f"{name}.png")
    if layouts:
        _layout_picture(run, annotation, best, device)
    else:
        _cluster_picture(run, annotation, best, device)
    return best


def _fresh(picture: Path, run: Path) -> bool:
    model = run / "pipeline" / "model_index.json"
    return picture.is_file() and picture.stat().st_mtime > model.stat().st_mtime


def _largest(annotation: Path) -> list[int]:
    """Cluster ids, most members first."""
    return (-LatentSet(annotation).signals.counts()).argsort(kind="stable").tolist()


def _cluster_picture(run: Path, annotation: Path, path: Path, device: str) -> None:
    """Each row one of the clusters, spread from the largest to the median one."""
    ids = _largest(annotation)
    ids = [ids[i * len(ids) // (2 * ROWS)] for i in range(ROWS)]
    pipe = open_pipeline(run, device)
    samples = pipe.generate(pipe.clusters([k for k in ids for _ in range(SAMPLES)]), precision="auto").split(SAMPLES)
    latents = LatentSet(annotation)
    chosen = [latents.signals.having(k)[:REAL] for k in ids]
    real = latents.images(torch.cat(chosen)).split([len(places) for places in chosen])
    grids.save(grids.cluster_picture(ids, real, samples), path)


def _layout_picture(run: Path, annotation: Path, path: Path, device: str) -> None:
    """Each row one layout: a real image, its signal, samples that follow it."""
    latents, pipe = LatentSet(annotation), open_pipeline(run, device)
    images, places = first_images(latents, ROWS)
    asked = latents.signals[places]
    drawn = pictures(asked, images.shape[-1])
    assert drawn is not None
    samples = pipe.generate(asked[torch.arange(ROWS).repeat_interleave(SAMPLES)], precision="auto").split(SAMPLES)
    rows = [torch.cat([images[i : i + 1], drawn[i : i + 1], samples[i]]) for i in range(ROWS)]
    heads = ["real", "asked", "samples"] + [""] * (SAMPLES - 1)
    grids.save(grids.labelled_rows([""] * ROWS, rows, heads), path)
