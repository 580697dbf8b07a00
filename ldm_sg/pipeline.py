"""SelfGuidedPipeline: everything that sampling needs, in one folder of diffusers' format."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.utils.logging import disable_progress_bar
from safetensors import SafetensorError
from torch import Tensor

from ldm_sg.autoencoder import Autoencoder, load_autoencoder
from ldm_sg.config import ObjectiveConfig
from ldm_sg.data.signals import Signals
from ldm_sg.errors import InputError, choices, one_line
from ldm_sg.guidance.compose import Denoiser, cfg
from ldm_sg.guidance.signal import Guidance, GuidanceSpec
from ldm_sg.hardware import pick_device, use_bf16
from ldm_sg.models.conditioner import Conditioner
from ldm_sg.models.snapshots import restore
from ldm_sg.models.unet import GuidedUNet
from ldm_sg.objective import KINDS, Objective

disable_progress_bar()  # three small files load in a moment; its bar would stand in front of every message
MOST_SIGNALS = 20_000  # masks or features that a pipeline folder carries
PREDICTION = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SOLVERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}
FLOW_SOLVERS = {
    "euler": (FlowMatchEulerDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
}
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def noise_scheduler(config: ObjectiveConfig) -> SchedulerMixin:
    """The training schedule as a diffusers scheduler: what pipeline/scheduler holds."""
    if config.kind not in KINDS:
        raise InputError(f"objective.kind={config.kind!r}; {choices(config.kind, KINDS)}")
    if config.schedule not in SCHEDULES:
        raise InputError(f"objective.schedule={config.schedule!r}; {choices(config.schedule, SCHEDULES)}")
    if config.kind == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.timesteps)
    return DDPMScheduler(
        num_train_timesteps=config.timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.schedule,
        prediction_type=PREDICTION[config.kind],
        clip_sample=False,  # latents are never clipped
    )


def objective_of(scheduler: SchedulerMixin, min_snr: float | None = None) -> Objective:
    """The Objective that a training schedule stands for."""
    steps = scheduler.config.num_train_timesteps
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return Objective("flow", torch.zeros(steps), min_snr)
    kind = {v: k for k, v in PREDICTION.items()}[scheduler.config.prediction_type]
    return Objective(kind, scheduler.alphas_cumprod, min_snr)


def make_solver(name: str, base: SchedulerMixin, steps: int, device: torch.device) -> SchedulerMixin:
    """A solver of `steps` steps for what was trained with `base`; InputError names what there is."""
    if steps < 1:
        raise InputError(f"steps={steps}: at least 1")
    if isinstance(base, FlowMatchEulerDiscreteScheduler):
        if name not in FLOW_SOLVERS:
            raise InputError(f"scheduler={name!r} for a flow-matching run; {choices(name, FLOW_SOLVERS)}")
        kind, extra = FLOW_SOLVERS[name]
        solver = kind(num_train_timesteps=base.config.num_train_timesteps, **extra)
    else:
        if name not in SOLVERS:
            raise InputError(f"scheduler={name!r}; {choices(name, SOLVERS)}")
        if steps > base.config.num_train_timesteps:
            raise InputError(f"steps={steps}: the run has {base.config.num_train_timesteps} noise levels")
        solver = SOLVERS[name].from_config(base.config, timestep_spacing="trailing")  # Lin et al., 2023
    solver.set_timesteps(steps, device=device)
    return solver


def image_generator(seed: int, index: int, purpose: str = "noise") -> torch.Generator:
    """The randomness of image `index` under `seed`: the same whatever the batch it is made in."""
    digest = hashlib.sha256(f"{seed}/{index}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


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
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, conditioner=conditioner, scheduler=scheduler)
        self.register_to_config(source_size=source_size)
        self.set_progress_bar_config(disable=True)
        self.checkpoint: int | None = None  # step of the snapshot that it was opened at, where it was one

    def attach(self, autoencoder: Autoencoder, signals: Signals, annotator: Path) -> None:
        """The parts that diffusers does not know: first stage, the training set's signals, annotator folder."""
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
            pick = int(torch.randint(size, (1,), generator=image_generator(seed, first_index + i, "signal")))
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
    ) -> Tensor:
        """Guidance or signals of B images -> uint8 [B, 3, H, W]. Image i depends on (seed, first_index + i), not on the batch: to a
        grey level in fp32, to two or three with precision bf16 (or auto, which takes it where it is faster).

        eta: DDIM's (0 deterministic, 1 ancestral). noise [B, C, h, w] replaces the seeded start. watch(step, x0) sees
        the predicted clean latent of every step."""
        device = self.unet.device
        if isinstance(guidance, Signals):
            guidance = self.guidance(guidance)
        generators = [image_generator(seed, first_index + i) for i in range(len(guidance))]
        if noise is None:
            noise = torch.stack([torch.randn(self.latent_shape, generator=g) for g in generators])
        solver = make_solver(scheduler, self.scheduler, steps, device)
        objective = objective_of(self.scheduler).to(device)
        denoiser, guidance = cfg(GuidedUNet(self.unet, self.conditioner), w), guidance.to(device)
        extra = step_arguments(scheduler, generators, eta)
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(precision, device)):
            x = solve(denoiser, noise.to(device, self.unet.dtype), guidance, solver, objective, extra, watch)
            return self.decode(x)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, h, w] -> uint8 [B, 3, H, W] on the CPU."""
        images = self.autoencoder.decode(latents.to(self.unet.device, torch.float32))
        return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def solve(
    denoiser: Denoiser,
    noise: Tensor,
    guidance: Guidance,
    solver: SchedulerMixin,
    objective: Objective,
    extra: dict[str, Any],
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Unit noise [B, C, h, w] -> clean latents [B, C, h, w] along the solver's timesteps."""
    x = noise * getattr(solver, "init_noise_sigma", 1.0)
    for i, t in enumerate(solver.timesteps):
        scaled = solver.scale_model_input(x, t) if hasattr(solver, "scale_model_input") else x
        times = t.to(x.device).expand(len(x))
        prediction = denoiser(scaled, times, guidance).to(x.dtype)  # the solver's own arithmetic stays in fp32
        if watch is not None:
            exact = times if objective.kind == "flow" else times.round().long()
            watch(i, objective.x0(prediction, scaled, exact))
        x = solver.step(prediction, t, x, return_dict=False, **extra)[0]
    return x


def step_arguments(scheduler: str, generators: list[torch.Generator], eta: float) -> dict[str, Any]:
    if eta and scheduler != "ddim":
        raise InputError(f"eta={eta} belongs to scheduler ddim, not {scheduler}")
    if scheduler == "ddim":
        return {"eta": eta, "generator": generators if eta else None}
    return {"generator": generators} if scheduler == "ddpm" else {}


def slerp(a: Tensor, b: Tensor, share: float) -> tuple[float, float]:
    """Weights of a and b at `share` of the arc between them (Shoemake, 1985)."""
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if angle < 1e-4:
        return 1 - share, share
    return (
        float(torch.sin((1 - share) * angle) / torch.sin(angle)),
        float(torch.sin(share * angle) / torch.sin(angle)),
    )


def open_pipeline(source: str | Path, device: str = "auto", checkpoint: str | None = None) -> SelfGuidedPipeline:
    """A run folder or a pipeline folder; InputError when it is neither, or cannot be read. `checkpoint`: a step that the run
    keeps EMA weights of, or `best`."""
    folder = Path(source)
    for candidate in (folder / "pipeline", folder):
        if (candidate / "model_index.json").is_file():
            on = pick_device(device)
            try:
                pipe = SelfGuidedPipeline.from_pretrained(candidate).to(on)
                if checkpoint is not None:
                    pipe.checkpoint = restore(GuidedUNet(pipe.unet, pipe.conditioner), folder, checkpoint)
            except InputError:
                raise
            except (OSError, ValueError, KeyError, SafetensorError) as err:
                raise InputError(f"{candidate} is damaged or not complete: {one_line(err)}") from err
            pipe.unet.eval()
            return pipe
    if not folder.is_dir():
        raise InputError(f"run {str(source)!r} not found")
    raise InputError(f"{str(source)!r} has no pipeline/: give the folder of a run that has saved a checkpoint")
