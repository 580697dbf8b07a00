"""SelfGuidedPipeline: everything that sampling needs, in one folder of diffusers' format."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.utils.logging import disable_progress_bar
from safetensors import SafetensorError
from torch import Tensor

from ldm_sg.autoencoder import Autoencoder, load_autoencoder
from ldm_sg.data.signals import Signals
from ldm_sg.errors import InputError, one_line
from ldm_sg.folder import pipeline_of, read_mapping, write_json
from ldm_sg.guidance.compose import Strategy, cfg
from ldm_sg.guidance.signal import Guidance, GuidanceSpec
from ldm_sg.hardware import pick_device, use_bf16
from ldm_sg.models.conditioner import Conditioner
from ldm_sg.models.lora import load_lora, save_lora
from ldm_sg.models.snapshots import restore
from ldm_sg.models.unet import GuidedUNet
from ldm_sg.sampling import draw, solvers
from ldm_sg.sampling.schedules import objective_of

disable_progress_bar()  # three small files load in a moment; its bar would stand in front of every message
MOST_SIGNALS = 20_000  # masks or features that a pipeline folder carries


class SelfGuidedPipeline(DiffusionPipeline):
    """EMA network, noise schedule, autoencoder, annotator and the training signals of one run.

    >>> pipe = SelfGuidedPipeline.from_pretrained("runs/demo/pipeline")
    >>> images = pipe(pipe.clusters([42] * 8), w=2.0)  # uint8 [8, 3, H, W]
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        conditioner: Conditioner,
        scheduler: SchedulerMixin,
        source_size: int | None = None,  # pixels of the images that it learnt crops from
        drop: float | None = None,  # share of samples that it was trained on with the null; None = not known
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, conditioner=conditioner, scheduler=scheduler)
        self.register_to_config(source_size=source_size, drop=drop)
        self.set_progress_bar_config(disable=True)
        self.checkpoint: int | None = None  # step of the snapshot that it was opened at, where it was one

    def attach(self, autoencoder: Autoencoder, signals: Signals, annotator: Path) -> None:
        """The parts that diffusers does not know: first stage, the training set's signals, annotator folder."""
        autoencoder.check_channels(self.latent_shape[0], "this run")
        self.autoencoder, self.signals, self.annotator_folder = autoencoder, signals, annotator
        self.spec, self._members = signals.spec, {}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.autoencoder.save(folder / "autoencoder")
        if (folder / "annotator").resolve() != self.annotator_folder.resolve():
            shutil.copytree(self.annotator_folder, folder / "annotator", dirs_exist_ok=True)
        self._portable_signals().save(folder / "signals.safetensors")
        (folder / "guidance.json").write_text(json.dumps(self.spec.to_dict(), indent=2) + "\n")
        super().save_pretrained(folder, **kwargs)

    def save_lora(self, unet: UNet2DConditionModel, folder: Path) -> None:
        """Into FOLDER: the adapters of `unet`, which are in this pipeline's weights, and what else the run it started from lacks:
        conditioner, signals and f. `load_lora` adds them to that run's pipeline."""
        self.conditioner.save_pretrained(folder / "conditioner")
        shutil.copytree(self.annotator_folder, folder / "annotator", ignore=shutil.ignore_patterns("g"))
        self._portable_signals().save(folder / "signals.safetensors")
        write_json(folder / "guidance.json", self.spec.to_dict())
        save_lora(unet, folder)

    def load_lora(self, folder: Path) -> None:
        """Makes this pipeline the one that was fine-tuned from it, with what `save_lora` wrote."""
        load_lora(self.unet, folder)
        spec = GuidanceSpec.from_dict(read_mapping(folder / "guidance.json"), str(folder))
        conditioner = Conditioner.from_pretrained(folder / "conditioner", low_cpu_mem_usage=False)
        self.register_modules(conditioner=conditioner.to(self.device, self.unet.dtype))
        self.attach(self.autoencoder, Signals.load(folder / "signals.safetensors", spec), folder / "annotator")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "SelfGuidedPipeline":
        """A pipeline folder, or a hub id that `push_to_hub` made."""
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(pretrained_model_name_or_path)))
        pipe = super().from_pretrained(folder, **{"low_cpu_mem_usage": False, **kwargs})
        spec = GuidanceSpec.from_dict(json.loads((folder / "guidance.json").read_text()), str(folder))
        signals = Signals.load(folder / "signals.safetensors", spec)
        pipe.attach(load_autoencoder(str(folder / "autoencoder")), signals, folder / "annotator")
        return pipe

    def _portable_signals(self) -> Signals:
        """All signals where they are ids, otherwise MOST_SIGNALS of them drawn at random: enough to sample from."""
        if len(self.signals) <= MOST_SIGNALS or (self.signals.mask is None and self.signals.feature is None):
            return self.signals
        order = torch.randperm(len(self.signals), generator=torch.Generator().manual_seed(0))
        return self.signals[order[:MOST_SIGNALS].sort().values]

    def to(self, *args: Any, **kwargs: Any) -> "SelfGuidedPipeline":
        super().to(*args, **kwargs)
        self.autoencoder.to(self.device)
        return self

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        return self.unet.config.out_channels, size, size

    @property
    def image_size(self) -> int:
        """Side of the images it makes, in pixels."""
        return self.latent_shape[-1] * self.autoencoder.factor

    @property
    def source_size(self) -> int:
        """Side in pixels at which real images are to be seen, the centre `image_size` of which is like what it makes."""
        return self.config.source_size or self.image_size

    def guidance(self, signals: Signals) -> Guidance:
        """Signals of B images -> what the network reads."""
        return signals.guidance(self.latent_shape[1:])

    def clusters(self, ids: Sequence[int], seed: int = 0) -> Guidance:
        """One cluster id an image; InputError for an id that the run does not have. Where a signal has other parts too (a box,
        say), they are those of a training image of that cluster."""
        return self.guidance(self.draw(len(ids), seed, clusters=ids))

    def draw(self, n: int, seed: int = 0, first_index: int = 0, clusters: Sequence[int] | None = None) -> Signals:
        """Signals of training images drawn at random: the empirical distribution, as the paper samples. With `clusters`, one
        an image, only those of that cluster (of a mask: with that class in it)."""
        picks = []
        for i in range(n):
            pool = None if clusters is None else self._with_label(clusters[i])
            size = len(self.signals) if pool is None else len(pool)
            pick = int(torch.randint(size, (1,), generator=draw.image_generator(seed, first_index + i, "signal")))
            picks.append(pick if pool is None else int(pool[pick]))
        return self.signals[torch.tensor(picks, dtype=torch.long)]

    def _with_label(self, label: int) -> Tensor:
        """Which training signals have `label`; InputError where the run has no such label, or no image has it."""
        if not self.spec.num_labels:
            raise InputError(f"cluster {label}: this run was trained without clusters; it accepts {self.accepts()}")
        if not 0 <= label < self.spec.num_labels:
            raise InputError(f"cluster {label}: this run has clusters 0 to {self.spec.num_labels - 1}")
        if label not in self._members:
            self._members[label] = self.signals.having(label)
        if not len(self._members[label]):
            raise InputError(f"cluster {label}: no training image of this run has it")
        return self._members[label]

    def accepts(self) -> str:
        """The flags of `ldm-sg sample` that this run's signals can be asked for with."""
        flags = ["--cluster"] * bool(self.spec.num_labels) + ["--box"] * (self.spec.spatial == "box")
        return ", ".join([*flags, *["--mask"] * (self.spec.spatial == "mask"), "--like"])

    def strength(self, w: float) -> float:
        """The w that can be had: 0 where guidance was always dropped in training, for the signals' embeddings are random there;
        InputError where it never was, for then the null's are."""
        if self.config.drop == 1 and w != 0:
            print("note: this run was trained without guidance (guidance.drop=1): w is 0", file=sys.stderr)
            return 0.0
        if self.config.drop == 0 and w != 1:
            raise InputError(f"w={w:g}: this run never learnt the null (guidance.drop=0): give w = 1")
        return w

    @property
    def usual_w(self) -> float:
        """2, the paper's, or what `strength` leaves of it."""
        return {1.0: 0.0, 0.0: 1.0}.get(self.config.drop, 2.0)

    @property
    def bounds(self) -> tuple[Tensor, Tensor] | None:
        """The latents [C, 1, 1] of a black and a white pixel where latents are pixels, which x0 is then clipped to as in the paper's
        code; None for those of a network, which have no bounds."""
        if self.autoencoder.kind != "patch":
            return None
        mean, std = (part.view(-1, 1, 1).to(self.unet.device) for part in (self.autoencoder.mean, self.autoencoder.std))
        return (-1 - mean) / std, (1 - mean) / std

    @torch.no_grad()
    def __call__(
        self,
        guidance: Guidance | Signals,
        w: float = 2.0,
        steps: int = 25,
        scheduler: str = "dpmpp_2m",
        seed: int = 0,
        first_index: int = 0,
        eta: float = 0.0,
        noise: Tensor | None = None,
        watch: Callable[[int, Tensor], None] | None = None,
        precision: str = "fp32",
        spacing: str = "log_snr",
        strategy: Strategy = cfg,
    ) -> Tensor:
        """Guidance or signals of B images -> uint8 [B, 3, H, W]. Image i depends on (seed, first_index + i), not on the batch: to a
        grey level in fp32, to two or three with precision bf16 (or auto, which takes it where it is faster).

        eta: DDIM's (0 deterministic, 1 ancestral). noise [B, C, h, w] replaces the seeded start. watch(step, x0) sees
        the predicted clean latent of every step. strategy: how w is applied (`guidance.compose`)."""
        device = self.unet.device
        if isinstance(guidance, Signals):
            guidance = self.guidance(guidance)
        generators = [draw.image_generator(seed, first_index + i) for i in range(len(guidance))]
        if noise is None:
            noise = draw.noise(self.latent_shape, generators)
        objective = objective_of(self.scheduler)
        grid = solvers.make_grid(objective, steps, spacing)
        step = solvers.make_step(scheduler, eta, lambda: draw.noise(self.latent_shape, generators).to(device))
        objective, guidance = objective.to(device), guidance.to(device)
        denoiser = strategy(GuidedUNet(self.unet, self.conditioner), self.strength(w), objective)
        start = noise.to(device, self.unet.dtype)
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(precision, device)):
            return self.decode(solvers.solve(denoiser, start, guidance, objective, grid, step, self.bounds, watch))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, h, w] -> uint8 [B, 3, H, W] on the CPU."""
        images = self.autoencoder.decode(latents.to(self.unet.device, torch.float32))
        return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def open_pipeline(
    source: str | Path, device: str = "auto", checkpoint: str | None = None, lora: str | None = None
) -> SelfGuidedPipeline:
    """A run folder or a pipeline folder; InputError when it is neither, or cannot be read. `checkpoint`: a step that the run
    keeps EMA weights of, or `best`. `lora`: the lora/ folder of a run that was fine-tuned from this one."""
    folder = pipeline_of(source)
    if folder is None:
        if not Path(source).is_dir():
            raise InputError(f"run {str(source)!r} not found")
        raise InputError(f"{str(source)!r} has no pipeline/: give the folder of a run that has saved a checkpoint")
    on = pick_device(device)
    try:
        pipe = SelfGuidedPipeline.from_pretrained(folder).to(on)
        if checkpoint is not None:
            pipe.checkpoint = restore(GuidedUNet(pipe.unet, pipe.conditioner), Path(source), checkpoint)
        if lora is not None:
            pipe.load_lora(Path(lora))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as err:
        raise InputError(f"{folder} is damaged or not complete: {one_line(err)}") from err
    pipe.unet.eval()
    return pipe
