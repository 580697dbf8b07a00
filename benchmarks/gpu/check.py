"""What check.sh runs: each section in a process of its own, so that one that fails, hangs or corrupts its GPU context says so
and the others go on. Prints a table a section, and writes OUT/check.json, OUT/check.md and OUT/check.log."""

import argparse
import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECONDS = {"machine": 40, "train": 130, "annotate": 70, "sample": 60, "faiss": 30, "configs": 130, "tests": 200}
WHOLE = 520  # seconds of all of them; what is installed before takes some of the nine minutes
PEAK = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165}  # dense bf16 TFLOP/s, by NVIDIA
TINY = {"channels": 16, "multipliers": [1, 2], "blocks": 1, "attention": [2], "heads": 2}  # a network for --tiny
TWO_STEPS = "steps=2 batch_size=8 workers=0 precision=bf16 val_share=0.25 val_every=2 log_every=1 checkpoint_every=2"
TRUTH = {"clusters": "labels", "boxes": "boxes", "segments": "masks"}  # what gives signals of the same shape at once


@dataclass
class Section:
    """Rows of a table, on disk after each: what is done when the time is over stays."""

    args: argparse.Namespace
    file: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def row(self, **cells: Any) -> None:
        self.rows.append({key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in cells.items()})
        self.file.write_text(json.dumps(self.rows))

    @contextlib.contextmanager
    def attempt(self, **cells: Any) -> Iterator[dict[str, Any]]:
        """One row; an error becomes its last cell."""
        found: dict[str, Any] = {}
        try:
            yield found
        except Exception as err:  # whatever CUDA, the compiler or the code under test raises
            found["error"] = f"{type(err).__name__}: {' '.join(str(err).split())[:300]}"
            print(f"{cells}: {found['error']}", flush=True)
        self.row(**cells, **found)

    @property
    def device(self) -> Any:
        from ldm_sg.hardware import pick_device

        return pick_device(self.args.device)

    def rate(self, n: int, call: Callable[[], Any], seconds: float = 1.5) -> float:
        """n things a call -> things a second, after two calls to warm up."""
        import torch

        synchronise = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        seconds, calls = 0.1 if self.args.tiny else seconds, 0
        call(), call(), synchronise()
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            call(), synchronise()
            calls += 1
        return n * calls / (time.perf_counter() - start)


# ---- sections


def machine(section: Section) -> None:
    """Versions, and what the device multiplies in practice."""
    import importlib.metadata as metadata

    import torch

    device, n = section.device, 256 if section.args.tiny else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    names = ["torch", "diffusers", "timm", "pytorch-lightning", "webdataset"]
    section.row(
        device=torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        **{name: metadata.version(name) for name in names},
        cores=os.cpu_count(),
        matmul_bf16_tflops=2 * n**3 * section.rate(1, lambda: a @ a) / 1e12,
    )


def train(section: Section) -> None:
    """Training images/s in bf16 on 4x32x32 latents, and model FLOPs utilisation: FLOPs of a step, forward and backward as
    torch counts them, against the device's dense bf16 peak (empty where that is not known)."""
    import torch
    from bench_train import step_maker
    from torch.utils.flop_counter import FlopCounterMode

    device, tiny = section.device, section.args.tiny
    known = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak = next((1e12 * tflops for name, tflops in PEAK.items() if name in known), None)

    def measure(model: Any, flops: float, batch: int, last: bool, comp: bool) -> float | None:
        cells = {"model": "tiny" if tiny else model, "batch": batch, "channels_last": last, "compile": comp}
        with section.attempt(**cells) as found:
            step = step_maker(model, (4, 32, 32), batch, device, True, last, comp)
            found["images_per_s"] = section.rate(batch, step)
            found["mfu"] = flops * found["images_per_s"] / peak if peak else None
            found["gib"] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return found.get("images_per_s")

    for model in [TINY] if tiny else ["ldm-church", "b"]:
        with FlopCounterMode(display=False) as counter:
            step_maker(model, (4, 32, 32), 2, device, True, False, False)()
        flops = counter.get_total_flops() / 2
        rates = {batch: measure(model, flops, batch, False, False) for batch in ([2] if tiny else [32, 96, 256, 512])}
        best = max(rates, key=lambda batch: rates[batch] or 0)
        for last, comp in [(True, False), (False, True), (True, True)]:
            measure(model, flops, best, last, comp)


def annotate(section: Section) -> None:
    """The streaming pass with ViT-B/16 and an SD-sized KL autoencoder against both networks' bare forward passes."""
    import timm
    from bench_annotate import make_shards, measure
    from safetensors.torch import save_file

    from ldm_sg.annotate.features import load_extractor
    from ldm_sg.config import AnnotateConfig, FeaturesConfig

    tiny = section.args.tiny
    model, size, n, batch = ("vit_tiny_patch16_224", 32, 16, 8) if tiny else ("vit_base_patch16_224", 256, 6000, 128)
    with tempfile.TemporaryDirectory() as temporary, section.attempt() as found:
        folder = Path(temporary)
        weights = str(folder / "random.safetensors")
        save_file(timm.create_model(model, num_classes=0).state_dict(), weights)
        features = FeaturesConfig(model=model, weights=weights, batch_size=batch)
        cfg = AnnotateConfig(
            shards="", out=str(folder / "out"), autoencoder=random_kl(folder / "kl", tiny), features=features
        )
        g = load_extractor(features, section.device)
        found |= measure(model, cfg, g, make_shards(folder, size, n), size)


def sample(section: Section) -> None:
    """Images/s of the default solver and of the paper's preset, from noise to pixels, and of decoding alone."""
    import torch

    from ldm_sg import build
    from ldm_sg.config import TrainConfig
    from ldm_sg.configfile import load
    from ldm_sg.data.latents import LatentSet

    tiny = section.args.tiny
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_set(Path(temporary), section, "kl", 64 if tiny else 256, "labels")
        places = [f"annotation={folder}", "compile=false", *[f"model={json.dumps(TINY)}"] * tiny]
        config, latents = load(TrainConfig, ROOT / "configs/train/churches256.yaml", places), LatentSet(folder)
        pipe = build.PipelineWriter(config, latents, section.device).pipeline(build.network(config, latents))
        pipe.to(section.device)
        for steps, n in [(2, 2)] if tiny else [(25, 64), (250, 64)]:
            with section.attempt(what=f"{steps} steps", batch=n) as found:
                call = partial(pipe.generate, pipe.draw(n), steps=steps, precision="auto")
                found["images_per_s"] = section.rate(n, call, 5)
        with section.attempt(what="decode, fp32", batch=n) as found:
            found["images_per_s"] = section.rate(n, partial(pipe.decode, torch.randn(n, *pipe.latent_shape)))


def faiss(section: Section) -> None:
    """k-means of unit vectors, by faiss: on the GPU where its build has one."""
    import faiss
    import torch

    from ldm_sg.annotate.clusters import Clusters, on_gpu
    from ldm_sg.config import AnnotatorConfig

    n, k = (500, 4) if section.args.tiny else (100_000, 1000)
    with section.attempt(faiss=faiss.__version__, gpu=on_gpu(), images=n, dim=768, k=k) as found:
        points, start = torch.randn(n, 768), time.perf_counter()
        Clusters(AnnotatorConfig(k=k, niter=10)).fit_features(points)
        found["seconds"] = time.perf_counter() - start


def configs(section: Section) -> None:
    """Two steps of every config that differs from those before it, through annotate and train, in bf16; then once more
    compiled. Signals are ground truth of the same shape as the config's own, images and the KL autoencoder are random."""
    from ldm_sg.config import AnnotateConfig, TrainConfig, model_config
    from ldm_sg.configfile import load, to_yaml
    from ldm_sg.verbs.train import train as run

    tiny, seen = section.args.tiny, {}
    names = ["demo", "demo_masks", "voc64-boxes"] if tiny else [p.stem for p in (ROOT / "configs/train").glob("*.yaml")]
    with tempfile.TemporaryDirectory() as temporary:
        for name in sorted(names):
            config = load(TrainConfig, ROOT / f"configs/train/{name}.yaml")
            made_by = (
                ROOT
                / f"configs/annotate/{Path(config.annotation.removesuffix('/annotation').removesuffix('-data')).name}.yaml"
            )
            own = load(AnnotateConfig, made_by, ["shards=x", "out=x"])
            size = 32 if "cifar" in name else next((s for s in (256, 64, 32) if str(s) in name), 64)
            truth = TRUTH.get(own.annotator.kind, own.annotator.truth)
            hub = (ROOT / "autoencoders" / own.autoencoder / "manifest.yaml").read_text().count("{hub:")
            needs = ("kl" if hub else own.autoencoder, size, truth)
            same = seen.setdefault((to_yaml(model_config(config.model)), str(config.objective), needs), name)
            if same != name:
                section.row(config=name, compile="as " + same)
        for comp in (False, True):
            for (_, _, needs), name in seen.items():
                with section.attempt(config=name, compile=comp) as found:
                    annotation, start = make_set(Path(temporary), section, *needs), time.perf_counter()
                    places = (
                        f"annotation={annotation} out={temporary}/{name}-{comp} compile={str(comp).lower()} {TWO_STEPS}"
                    )
                    places += (
                        f" device={section.args.device} sample_every={0 if comp else 2}"  # an EMA grid, uncompiled
                    )
                    model = [f"model={json.dumps(TINY)}"] * tiny
                    with contextlib.redirect_stdout(io.StringIO()):
                        out = run(load(TrainConfig, ROOT / f"configs/train/{name}.yaml", places.split() + model))
                    found["seconds"] = time.perf_counter() - start
                    with (out / "metrics.csv").open() as file:
                        found["loss"] = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]][
                            -1
                        ]
                    shutil.rmtree(out)  # gigabytes, with ldm-church


def tests(section: Section) -> None:
    """The test suite, whatever it does on the CPU done on this device."""
    which = ["tests/test_images.py"] if section.args.tiny else []
    workers = [] if section.args.tiny else ["-n", str(min(8, os.cpu_count() or 1))]
    command = [sys.executable, "-m", "pytest", "-vv", "-rfE", "--tb=line", "-p", "no:cacheprovider", *workers, *which]
    found: dict[str, int] = {}
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {"LDM_SG_TEST_DEVICE": section.args.device})  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith(("FAILED", "ERROR")):  # of the summary
            section.rows.append({"wrong": line.strip()[:300]})
        elif match := re.search(r"::.* (PASSED|FAILED|ERROR|SKIPPED)|(PASSED|FAILED|ERROR|SKIPPED) .*::", line):
            word = (match[1] or match[2]).lower()
            found[word] = found.get(word, 0) + 1
        section.file.write_text(json.dumps([found, *section.rows]))


# ---- what they share


def random_kl(folder: Path, tiny: bool) -> str:
    """A KL autoencoder of Stable Diffusion's size (factor 8, 4 channels) with random weights, as diffusers saves it."""
    from diffusers import AutoencoderKL

    if not folder.is_dir():
        widths = (16, 16, 16, 16) if tiny else (128, 256, 512, 512)
        net = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4,
            block_out_channels=widths, layers_per_block=2, norm_num_groups=8 if tiny else 32,
        )  # fmt: skip
        net.save_pretrained(folder)
    return str(folder)


def make_set(folder: Path, section: Section, autoencoder: str, size: int, truth: str) -> Path:
    """An annotation set of 32 random images with labels, boxes and masks in their shard."""
    import numpy as np
    from PIL import Image

    from ldm_sg.annotate.run import annotate_shards
    from ldm_sg.config import AnnotateConfig, AnnotatorConfig
    from ldm_sg.data.shards import ShardWriter

    def png(array: Any) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        return buffer.getvalue()

    random, shard = np.random.default_rng(0), folder / f"{size}-{truth}.tar"
    if not shard.is_file():
        with ShardWriter(shard) as writer:
            for i in range(32):
                pixels = random.integers(256, size=(size, size, 3), dtype=np.uint8)
                boxes = json.dumps({"boxes": [[0, 0, size // 2, size // 2 + i % 8, i % 4]]}).encode()
                mask = png(random.integers(4, size=(size, size), dtype=np.uint8))
                files = {"png": png(pixels), "mask.png": mask, "cls": str(i % 4).encode()}
                writer.write(f"{i:03d}", files | {"json": boxes} if truth == "boxes" else files)
    first = random_kl(folder / "kl", section.args.tiny) if autoencoder == "kl" else autoencoder
    cfg = AnnotateConfig(shards=str(shard), out=str(folder / f"{autoencoder}-{size}-{truth}"), autoencoder=first)
    cfg.annotator, cfg.workers, cfg.device = AnnotatorConfig(kind="oracle", truth=truth), 0, section.args.device
    return annotate_shards(cfg)


# ---- running them


def run_section(name: str, args: argparse.Namespace, folder: Path, seconds: float) -> dict[str, Any]:
    """The section's rows, and how it ended."""
    file, log, start = folder / f"{name}.json", folder / f"{name}.log", time.perf_counter()
    command = [sys.executable, __file__, "--section", name, "--work", str(folder), "--device", args.device]
    with log.open("w") as out:
        process = subprocess.Popen(
            command + ["--tiny"] * args.tiny, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=max(1.0, seconds))
            ended = (
                "done"
                if code == 0
                else f"failed: {(log.read_text().strip().splitlines() or [f'exit {code}'])[-1][:300]}"
            )
        except subprocess.TimeoutExpired:
            ended = f"stopped after its {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # it, and what it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    rows = json.loads(file.read_text()) if file.is_file() else []
    return {"ended": ended, "seconds": round(time.perf_counter() - start, 1), "rows": rows}


def table(name: str, result: dict[str, Any]) -> str:
    """A section in markdown."""
    rows = result["rows"]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    shown = {None: "", True: "yes", False: "no"}
    lines = ["| " + " | ".join(keys) + " |", "| " + " | ".join("---" for _ in keys) + " |"] if keys else []
    for row in rows:
        cells = [row.get(key) for key in keys]
        lines.append(
            "| "
            + " | ".join(shown[c] if c is None or isinstance(c, bool) else str(c).replace("|", "/") for c in cells)
            + " |"
        )
    return "\n".join([f"## {name} ({result['ended']}, {result['seconds']} s)", "", *lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder of the page")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default=",".join(SECONDS), help="sections, with commas between")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: does the script itself work?")
    parser.add_argument("--section", choices=SECONDS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section:
        sys.path.insert(0, str(HERE.parent))
        globals()[args.section](Section(args, args.work / f"{args.section}.json"))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.only.split(","):
            left = WHOLE - (time.perf_counter() - start)
            seconds = 3600 if args.tiny else min(SECONDS[name], left)
            results[name] = run_section(name, args, Path(temporary), seconds)
            print(table(name, results[name]), flush=True)
            (args.out / "check.json").write_text(json.dumps(results, indent=1))
        (args.out / "check.md").write_text("\n".join(table(name, result) for name, result in results.items()))
        logs = (f"==== {name}\n{(Path(temporary) / f'{name}.log').read_text()}" for name in results)
        (args.out / "check.log").write_text("\n".join(logs))
    errors = [
        name
        for name, r in results.items()
        if r["ended"] != "done" or any("error" in row or "wrong" in row for row in r["rows"])
    ]
    print(f"{args.out / 'check.json'}; " + (f"not right: {', '.join(errors)}" if errors else "all sections are right"))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
