"""What happens around the steps: EMA, checkpoints that survive kill -9, metrics.csv, exports, a clean Ctrl-C."""

import json
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from ldm_sg.config import TrainConfig
from ldm_sg.errors import InputError
from ldm_sg.folder import temporary
from ldm_sg.training.interruption import Interruption
from ldm_sg.training.metrics import MetricsCsv
from ldm_sg.training.sharded import Sharded, gathered, put_back, share_out

LOST_IN_A_ROW = 20
COLUMNS = ["step", "train_loss", "val_loss_guided", "val_loss_null", "images_per_s", "lr", "fd_held_out"]


def ema_update(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """averaged += (1 - d) (current - averaged), d = min(decay, (1 + n) / (10 + n)) after n updates: short runs average too."""

    @torch.no_grad()
    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], n: Tensor | int) -> None:
        d = min(decay, (1 + int(n)) / (10 + int(n)))
        torch._foreach_lerp_(list(averaged), list(current), 1 - d)

    return update


@dataclass(frozen=True)
class Hooks:
    """What training needs from rooms that it does not import."""

    start: Callable[[nn.Module], None]  # untrained network -> pipeline folder
    export: Callable[[nn.Module], None]  # EMA network -> pipeline folder
    draw: Callable[[nn.Module, int], None]  # EMA network, step -> a grid on disk
    keep: Callable[[nn.Module, int], Any]  # EMA network, step -> its weights on disk
    saved: Callable[[], None] = lambda: None  # after each checkpoint
    judge: Callable[[nn.Module], float] | None = None  # EMA network -> FD of its samples to held-out images


class EMA(WeightAveraging):
    """Lightning's averaged copy with a warm-up; validation runs on it."""

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=ema_update(decay))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.sharded, self.first = isinstance(trainer.strategy, Sharded), trainer.is_global_zero
        # the module itself moves there only after this, and in shares after the checkpoint is read
        self._device = None if self.sharded else trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    @property
    def average(self) -> AveragedModel:
        assert self._average_model is not None
        return self._average_model

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.sharded:
            self.plain = deepcopy(self.average.module.network) if self.first else None
            share_out(self.average.module.network)
            self.average.to(trainer.strategy.root_device)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        put_back(pl_module)
        super().on_validation_epoch_end(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["state_dict"] = gathered(checkpoint["state_dict"])

    def give(self, hook: Callable[..., Any], *more: Any, device: torch.device | str = "cpu") -> Any:
        """What `hook` makes of the averaged network, whole, on rank 0; all processes must ask. `device`: where it has to lie to
        be whole, if it is not anyway."""
        network = self.average.module.network
        if not self.sharded:
            return hook(network, *more) if self.first else None
        state = gathered(network.state_dict())
        if self.plain is not None:
            self.plain.load_state_dict(state)
            try:
                return hook(self.plain.to(device), *more)
            finally:
                self.plain.cpu()


class EachStep(Callback, ABC):
    """`on_step` after each step of the optimizer, however many parts its batch came in."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_step(trainer)

    @abstractmethod
    def on_step(self, trainer: pl.Trainer) -> None: ...


class Keeper(EachStep):
    """Writes what stands beside a run: by `hooks` pipelines, grids and snapshots of the EMA network, and checkpoints/last.ckpt,
    complete or not there. Where `hooks` can judge, every `val_every` steps and at the end, it exports the network whose samples are
    nearest to held-out images, and stops after `patience` judgements in a row without a better one. An interruption stops the
    run after its step."""

    state_key = "StopEarly"  # in a checkpoint: what it holds of judgements

    def __init__(
        self, run: Path, config: TrainConfig, ema: EMA, hooks: Hooks, reports: "Reports", interruption: Interruption
    ) -> None:
        self.path, self.config, self.ema, self.hooks = run / "checkpoints" / "last.ckpt", config, ema, hooks
        self.reports, self.interruption = reports, interruption
        self.best, self.best_step, self.since = math.inf, 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("best", "best_step", "since")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self.ema.give(self.hooks.start)

    def on_step(self, trainer: pl.Trainer) -> None:
        step, config, stops = trainer.global_step, self.config, False

        def due(every: int) -> bool:
            return every > 0 and (step % every == 0 or step == trainer.max_steps)

        if due(config.sample_every):
            self.ema.give(self.hooks.draw, step, device=trainer.strategy.root_device)
        if self.hooks.judge is not None and due(config.val_every):
            stops = self._judge(trainer)
        if config.keep_every and step % config.keep_every == 0:
            self.ema.give(self.hooks.keep, step)
        if trainer.world_size == 1 or step % 10 == 0:  # ranks agree on when to stop, which costs a message
            heard = trainer.strategy.reduce_boolean_decision(self.interruption.heard, all=False)
            self.interruption.heard = heard
            stops = stops or heard
        if stops or due(config.checkpoint_every):
            self._save(trainer)
        trainer.should_stop = trainer.should_stop or stops

    def _judge(self, trainer: pl.Trainer) -> bool:
        """Whether the network has not become better for long enough."""
        step = trainer.global_step
        fd = trainer.strategy.broadcast(self.ema.give(self.hooks.judge, device=trainer.strategy.root_device))
        if trainer.is_global_zero:
            self.reports.file.append(step=step, fd_held_out=round(fd, 5))
        self.since += 1
        if fd < self.best:
            self.best, self.best_step, self.since = fd, step, 0
            self.ema.give(self.hooks.export)
        self.reports.restart(step)
        if self.since < self.config.patience or step == trainer.max_steps:
            return False
        best = f"{self.best:.4f} at step {self.best_step}"
        tqdm.write(f"stopped at step {step}: no lower FD to held-out images than {best}", sys.stderr)
        return True

    def _save(self, trainer: pl.Trainer) -> None:
        new = temporary(self.path)
        try:
            trainer.save_checkpoint(new)
            if self.hooks.judge is None:  # first: who is killed in between makes it again, and none is left behind
                self.ema.give(self.hooks.export)
            if trainer.is_global_zero:
                new.replace(self.path)
                self.hooks.saved()
        finally:
            new.unlink(missing_ok=True)


class Finite(EachStep):
    """Tells of steps that were skipped because their gradient was not finite, in RUN/skipped_steps.jsonl too, and ends the run when
    LOST_IN_A_ROW of them follow each other. Looks at so many steps at once, not to wait for the device at each."""

    def __init__(self, run: Path) -> None:
        self.path, self.norms, self.row = run / "skipped_steps.jsonl", list[tuple[int, Tensor]](), 0

    def on_step(self, trainer: pl.Trainer) -> None:
        self.norms.append((trainer.global_step - 1, trainer.lightning_module.gradient_norm))
        if len(self.norms) >= LOST_IN_A_ROW or trainer.global_step == trainer.max_steps:
            self._look(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.norms:  # an interruption or `patience` left them
            self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        norms, lost = torch.stack([norm for _, norm in self.norms]).tolist(), []
        for (step, _), norm in zip(self.norms, norms):
            self.row = 0 if math.isfinite(norm) else self.row + 1
            if self.row:
                images = trainer.train_dataloader.sampler.images(step).tolist()
                lost.append({"step": step, "gradient_norm": str(norm), "images": images})
        self.norms = []
        if lost and trainer.is_global_zero:
            with self.path.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lost)
            tqdm.write(
                f"note: {len(lost)} steps up to {lost[-1]['step']} skipped: gradient not finite; {self.path}",
                sys.stderr,
            )
        if self.row >= LOST_IN_A_ROW:
            raise InputError(
                f"{self.path.parent}: {self.row} steps in a row up to step {lost[-1]['step']} gave a gradient that is not finite "
                f"(images of each: {self.path}); the checkpoint has none of them; a smaller lr, or precision=fp32, may help"
            )


class Reports(EachStep):
    """Losses, speed and learning rate: in metrics.csv, from one rank, and on a tqdm bar on stderr, in steps of the whole run."""

    bar: tqdm | None = None

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path, self.config, self.losses = path, config, list[Tensor]()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step, first = trainer.global_step, trainer.is_global_zero
        self.restart(step)
        if first:
            self.file = MetricsCsv(self.path, COLUMNS, step)
        total = trainer.max_steps
        self.bar = tqdm(total=total, initial=step, unit="step", desc="train", dynamic_ncols=True, disable=not first)

    def restart(self, step: int) -> None:
        """The speed is measured from here on."""
        self.start, self.start_step = time.perf_counter(), step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())  # Lightning has divided it by the number of parts
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step(self, trainer: pl.Trainer) -> None:
        assert self.bar is not None
        self.bar.update()
        step = trainer.global_step
        if step % self.config.log_every == 0 or step == trainer.max_steps < self.config.log_every:
            rate = (step - self.start_step) * self.config.batch_size / (time.perf_counter() - self.start)
            loss = torch.stack(self.losses).mean().item() * trainer.accumulate_grad_batches
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            trainer.lightning_module.log("images_per_s", rate, prog_bar=True)
            if trainer.is_global_zero:
                self.file.append(step=step, train_loss=round(loss, 6), images_per_s=round(rate, 1), lr=lr)
            self.losses = []
            self.restart(step)
        if step % 10 == 0 or step <= 10:  # to read them is to wait for the device
            metrics = trainer.progress_bar_metrics
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()}, refresh=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        known = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val_loss_")}
        if trainer.is_global_zero and known:
            self.file.append(step=trainer.global_step, **{name: round(m.item(), 6) for name, m in known.items()})
        self.restart(trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    on_exception = on_train_end
