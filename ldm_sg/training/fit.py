"""Lightning's trainer set up for one run: fresh or resumed."""

import logging
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger

from ldm_sg.config import TrainConfig
from ldm_sg.training.callbacks import EMA, Hooked, Hooks, MetricsFile, Progress, SaveLast, StopCleanly
from ldm_sg.training.checkpoint import read_checkpoint
from ldm_sg.training.data import LatentData
from ldm_sg.training.diffusion import DiffusionModule


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
    ema = EMA(config.ema)
    saver = SaveLast(last, config.checkpoint_every, ema, hooks.export)
    stopper = StopCleanly(saver)
    metrics = MetricsFile(run / "metrics.csv", config)
    # order matters: EMA averages before anything reads it, and metrics come before a checkpoint ends the step
    callbacks = [ema, metrics, Hooked(hooks, config.sample_every, ema), saver, stopper]
    _quiet()
    validate = len(data.val_pool) > 0 and config.val_every > 0
    trainer = pl.Trainer(
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=_devices(config, device),
        strategy="auto",
        precision="bf16-mixed" if bf16 else "32-true",
        max_steps=config.steps,
        max_epochs=-1,
        val_check_interval=config.val_every if validate else None,
        check_val_every_n_epoch=None if validate else 1,
        limit_val_batches=1.0 if validate else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=config.log_every,
        logger=TensorBoardLogger(run, name="", version="tensorboard", purge_step=data.first_step),
        callbacks=[*callbacks, Progress()],
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=str(last) if data.first_step else None, weights_only=True)
    return not stopper.interrupted


def _count(config: TrainConfig, device: torch.device) -> int:
    if device.type != "cuda" or device.index is not None:
        return 1
    return torch.cuda.device_count() if config.devices == -1 else config.devices


def _devices(config: TrainConfig, device: torch.device) -> int | list[int]:
    if device.type == "cpu":
        return max(1, config.devices)  # more than one: DDP over gloo, for tests and small clusters
    return [device.index] if device.index is not None else _count(config, device)


def _quiet() -> None:
    for text in (
        ".*does not have many workers.*",
        ".*TensorBoard.*",
        ".*`LeafSpec`.*",
        ".*tensorboardX.*",
        ".*dataloader is not resumable.*",
        ".*LeafSpec.*",
        ".*smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=text)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
