"""train: annotation set -> run. What is wrong with the config is said before anything heavy is imported, which takes seconds."""

import errno
import sys
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_sg.config import TrainConfig
from ldm_sg.configfile import to_mapping
from ldm_sg.data.progress import finished_manifest
from ldm_sg.data.remote import RemoteSet
from ldm_sg.data.tars import is_remote
from ldm_sg.errors import InputError
from ldm_sg.folder import claim, file_sha256, holds_out, pipeline_of, read_mapping, write_json, write_text
from ldm_sg.mirror import keep, writes_anywhere

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor, nn

    from ldm_sg.build import PipelineWriter
    from ldm_sg.data.latents import LatentSet
    from ldm_sg.pipeline import SelfGuidedPipeline

# What may change between two starts of one run without making it another run.
FREE = ("steps", "out", "device", "devices", "strategy", "workers", "log_every", "val_every", "sample_every", "checkpoint_every",
        "keep_every", "logger", "cache_gb")  # fmt: skip
STOPPED = "stopped.json"
JUDGED = 200  # samples a judgement, with `patience`


@writes_anywhere
@partial(holds_out, ranks=True)
def train(config: TrainConfig) -> Path:
    """Trains, or goes on where the run in `config.out` stopped; returns the run folder. Ctrl-C saves and raises."""
    config.check()
    if is_remote(config.annotation):
        RemoteSet(config.annotation, 0).copy()
    else:
        finished_manifest(Path(config.annotation))
    if config.leave_out and not Path(config.leave_out).is_file():
        raise InputError(f"leave_out={config.leave_out!r}: no such file; `ldm-sg dedup {config.annotation}` writes one")
    if config.init and pipeline_of(config.init) is None:
        raise InputError(f"init={config.init!r}: no pipeline/ there; give the folder of a trained run")

    from ldm_sg import build
    from ldm_sg.data.latents import set_hash
    from ldm_sg.hardware import note_busy_cores, pick_device, use_bf16, use_compile
    from ldm_sg.models import snapshots
    from ldm_sg.report.run import write_report
    from ldm_sg.training.callbacks import Hooks
    from ldm_sg.training.data import LatentData
    from ldm_sg.training.diffusion import DiffusionModule
    from ldm_sg.training.fit import check_shares, checkpoint_step, fit

    device = pick_device(config.device)
    bf16 = use_bf16(config.precision, device)
    check_shares(config, device)
    latents = build.annotation(config)
    replay = build.replay(config, latents)
    network = build.network(config, latents)
    if config.strategy != "fsdp" and use_compile(config.compile, device):
        network.unet.compile()
    module = DiffusionModule(network, build.objective(config), config)
    data = LatentData(latents, config, build.view_side(config, latents), replay)
    run = Path(config.out)
    claim(run, "config.yaml", to_mapping(config), FREE)
    content = set_hash([latents.hash, file_sha256(config.leave_out)]) if config.leave_out else latents.hash
    _remember_annotation(run, config, content)
    done = checkpoint_step(run / "checkpoints" / "last.ckpt")
    if done >= config.steps and (run / "pipeline").is_dir():
        print(f"{run}: already trained for {done:,} steps (asked: {config.steps:,}); raise steps= to go on")
        return run

    if config.patience and (run / STOPPED).is_file():
        print(f"{run}: stopped early, {(run / STOPPED).read_text().strip()}; patience=0 into another out= goes on")
        return run
    writer = build.PipelineWriter(config, latents, device)
    print(
        f"{len(data.train_pool):,} latents of {data.shapes()} (+{len(data.val_pool):,} held "
        f"out), {latents.spec.num_labels:,} labels; {sum(p.numel() for p in network.parameters()) / 1e6:.1f}M parameters; "
        f"{device.type}, {'bf16' if bf16 else 'fp32'}; {'resuming at step ' + format(done, ',') if done else 'new run'}",
        file=sys.stderr,
    )
    if config.warmup > config.steps / 2:
        print(
            f"note: warmup={config.warmup:,} of steps={config.steps:,}: the learning rate never gets up",
            file=sys.stderr,
        )
    note_busy_cores(device)
    hooks = Hooks(
        start=lambda ema: writer.export(ema, run / "pipeline_untrained"),
        export=lambda ema: writer.export(ema, run / "pipeline", run / "lora"),
        draw=lambda ema, step: _draw(writer.pipeline(ema, preview=True), run / "samples" / f"step_{step:07d}.png"),
        keep=lambda ema, step: snapshots.keep(writer.plain(ema), run, step),
        saved=lambda: keep(run),
        judge=_judge(config, writer, latents, data.val_pool, device) if config.patience else None,
    )
    try:
        finished = fit(module, data, config, run, device, bf16, hooks)
    except OSError as err:
        if err.errno != errno.ENOSPC:
            raise
        raise InputError(f"{run}: no space left on its disk; make some and give the same command, it resumes") from err
    if module.global_rank == 0:
        if finished and config.patience and (step := checkpoint_step(run / "checkpoints" / "last.ckpt")) < config.steps:
            write_json(run / STOPPED, {"step": step})
        write_text(run / "command.txt", f"ldm-sg train {run / 'config.yaml'}\n")
        write_report(run)
    if not finished:
        raise KeyboardInterrupt(f"interrupted and saved in {run}; the same command resumes")
    print(run / "pipeline")
    return run


def _remember_annotation(run: Path, config: TrainConfig, found: str) -> None:
    """A run belongs to one content of its annotation set, whose hash is `found`."""
    path = run / "annotation.json"
    if path.is_file():
        known = read_mapping(path, {"hash": str})["hash"]
        if known != found:
            raise InputError(
                f"annotation={config.annotation!r} changed under {run}: its hash is {found[:12]}, the run was "
                f"trained on {known[:12]}; restore it, or train into another out= "
                "(init= that run starts from its weights, and labels of the same f stay what they are)"
            )
        return
    write_json(path, {"folder": config.annotation, "hash": found})


def _judge(
    config: TrainConfig, writer: "PipelineWriter", latents: "LatentSet", held_out: "Tensor", device: "torch.device"
) -> "Callable[[nn.Module], float]":
    """EMA network -> FD of samples, twice as many as there are held-out images and at most JUDGED, to those."""
    from ldm_sg.annotate.kinds import load_annotator
    from ldm_sg.evaluate.nearby import distance

    if len(held_out) < 2:
        raise InputError(
            f"patience={config.patience}: {len(held_out)} held-out images of {latents.folder}: give patience=0"
        )
    real = latents.features(held_out)
    g = cache(lambda: load_annotator(latents.folder / "annotator", device))  # by the rank that judges, the first

    def judge(ema: "nn.Module") -> float:
        pipe = writer.pipeline(ema)
        pipe.unet.eval()
        return distance(pipe, pipe.draw(min(JUDGED, 2 * len(real))), g(), real)

    return judge


def _draw(pipe: "SelfGuidedPipeline", path: Path) -> None:
    """The same 40 signals and noises at every call, so that grids of one run can be compared."""
    from ldm_sg.report.grids import grid

    path.parent.mkdir(exist_ok=True)
    pipe.unet.eval()
    images = pipe.generate(pipe.draw(40, seed=0), w=pipe.usual_w, seed=0, precision="auto")
    grid(images, columns=10).save(path)
