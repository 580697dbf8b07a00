"""Lightning's trainer set up for one run: fresh or resumed."""

import hashlib
import logging
import os
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from ldm_sg.config import TrainConfig
from ldm_sg.configfile import to_mapping
from ldm_sg.errors import InputError, one_line
from ldm_sg.training.callbacks import EMA, Finite, Hooks, Keeper, Reports
from ldm_sg.training.checkpoint import read_checkpoint
from ldm_sg.training.data import LatentData
from ldm_sg.training.diffusion import DiffusionModule
from ldm_sg.training.interruption import Interruption
from ldm_sg.training.sharded import CPU_SHARES, Sharded


def checkpoint_step(path: Path) -> int:
    """global_step of a checkpoint, 0 where there is none; a file with code in it, or a broken one, is an InputError."""
    if not path.is_file():
        return 0
    return int(read_checkpoint(path, mmap=True)["global_step"])


def fit(
    module: DiffusionModule,
    data: LatentData,
    config: TrainConfig,
    run: Path,
    device: torch.device,
    bf16: bool,
    hooks: Hooks,
) -> bool:
    """Trains to `config.steps` or to an interruption; True when it came to the end."""
    last = run / "checkpoints" / "last.ckpt"
    last.parent.mkdir(exist_ok=True)
    data.first_step = checkpoint_step(last)
    ema, reports, interruption = EMA(config.ema), Reports(run / "metrics.csv", config), Interruption()
    keeper = Keeper(run, config, ema, hooks, reports, interruption)
    _quiet()
    validate = len(data.val_pool) > 0 and config.val_every > 0
    here, nodes = _processes(config, device)
    trainer = pl.Trainer(
        accelerator=device.type,
        devices=here,
        num_nodes=nodes,
        strategy=Sharded() if config.strategy == "fsdp" else config.strategy,
        precision="bf16-mixed" if bf16 else "32-true",
        max_steps=config.steps,
        max_epochs=-1,
        accumulate_grad_batches=config.accumulate,
        val_check_interval=config.val_every * config.accumulate if validate else None,
        check_val_every_n_epoch=None if validate else 1,
        limit_val_batches=1.0 if validate else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=config.log_every,
        logger=_loggers(config, run, data.first_step),
        # order matters: EMA averages before anything reads it, and metrics come before a checkpoint ends the step
        callbacks=[Finite(run), ema, reports, keeper],
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    try:
        with interruption:
            trainer.fit(module, datamodule=data, ckpt_path=str(last) if data.first_step else None, weights_only=True)
    except SystemExit as err:  # Lightning's answer to a second Ctrl-C
        raise KeyboardInterrupt(f"interrupted; {run} stands at its last checkpoint") from err
    except RuntimeError as err:
        if trainer.world_size == 1 or not any(word in str(err) for word in ("gloo", "NCCL", "peer", "onnection")):
            raise
        raise InputError(
            f"{run}: another of its {trainer.world_size} processes has ended ({one_line(err)[:80]}...); the same command "
            "resumes at the last checkpoint"
        ) from err
    return not interruption.heard


def _loggers(config: TrainConfig, run: Path, first_step: int) -> list[Logger]:
    loggers: list[Logger] = [TensorBoardLogger(run, name="", version="tensorboard", purge_step=first_step)]
    if config.logger == "wandb":  # one run there for one folder here, however often it is started
        name = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12]
        settings = {"config": to_mapping(config), "resume": "allow"}
        loggers.append(WandbLogger(run.name, run, id=name, project="ldm-sg", **settings))
    return loggers


def check_shares(config: TrainConfig, device: torch.device) -> None:
    """InputError for a batch that cannot be shared out evenly: a mean of the parts' means would weigh images unequally; and for
    a device that has no company."""
    if device.type == "mps" and config.strategy != "auto":
        raise InputError(f"strategy={config.strategy} on mps, which is one device: give strategy=auto")
    if device.type == "cpu" and config.strategy == "fsdp" and not CPU_SHARES:
        raise InputError(f"strategy=fsdp on CPUs needs torch 2.8, this is {torch.__version__}: give strategy=ddp")
    here, nodes = _processes(config, device)
    ranks = nodes * (len(here) if isinstance(here, list) else here)
    if config.batch_size % (ranks * config.accumulate):
        raise InputError(
            f"batch_size={config.batch_size}: give a multiple of {ranks * config.accumulate}, so that {ranks} devices take equal "
            f"shares in accumulate={config.accumulate} parts"
        )


def _processes(config: TrainConfig, device: torch.device) -> tuple[int | list[int], int]:
    """Processes, or the device, of each machine; machines. torchrun and Slurm's srun say it of their jobs."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return _count("LOCAL_WORLD_SIZE"), _count("GROUP_WORLD_SIZE")
    if "SLURM_PROCID" in os.environ and _count("SLURM_NTASKS") > 1:
        return _count("SLURM_NTASKS") // _count("SLURM_NNODES"), _count("SLURM_NNODES")
    if device.index is not None:
        return [device.index], 1
    if device.type == "cuda" and config.devices == -1:
        return torch.cuda.device_count(), 1
    # on CPUs: DDP over gloo, for tests and small clusters
    return (max(1, config.devices) if device.type != "mps" else 1), 1


def _count(name: str) -> int:
    value = os.environ.get(name, "1")
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"{name}={value!r} in the environment: a number from 1 is expected")
    return int(value)


def _quiet() -> None:
    known = (
        "many workers|TensorBoard|tensorboardX|dataloader is not resumable|LeafSpec|smaller than the logging interval"
    )
    warnings.filterwarnings("ignore", message=f".*({known})")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
