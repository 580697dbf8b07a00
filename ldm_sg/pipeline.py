"""SelfGuidedPipeline: everything that sampling needs, in one folder of diffusers' format."""

import json
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ldm_sg.data.images import MAX_SIDE, to_rgb
from ldm_sg.errors import InputError, need_choice, one_line
from ldm_sg.folder import WEIGHTS, file_sha256, pipeline_of, read_mapping
from ldm_sg.guidance.compose import Denoiser, Strategy, cfg
from ldm_sg.guidance.signal import Guidance
from ldm_sg.hardware import pick_device, use_bf16
from ldm_sg.models.snapshots import restore
from ldm_sg.models.unet import GuidedUNet
from ldm_sg.objective import Objective
from ldm_sg.sampling.draw import image_generator, unit_noise
from ldm_sg.sampling.schedules import check_fits, drive, objective_of, within
from ldm_sg.sampling.solvers import Grid, make_grid, make_step, solve

if TYPE_CHECKING:
    from ldm_sg.data.signals import Signals
    from ldm_sg.sampling.edit import Edit

OUTPUTS = ("pil", "np", "pt", "latent")
VERSION = 2  # of the folder
BASE = "base.json"
MOST_SIGNALS = 20_000  # masks or features that a pipeline folder carries
LEARNT_WITH = ("DDPMScheduler", "FlowMatchEulerDiscreteScheduler")  # what `sampling.schedules` makes


class SelfGuidedPipeline(DiffusionPipeline):
    """EMA network, noise schedule, autoencoder, annotator and the training signals of one run.

    >>> pipe = SelfGuidedPipeline.from_pretrained("runs/demo/pipeline")
    >>> images = pipe(cluster=[42] * 8, generator=pipe.generators(8)).images  # PIL, those of `ldm-sg sample --cluster 42 -n 8`
    >>> images = pipe.generate(pipe.clusters([42] * 8), w=2.0)  # the same as uint8 [8, 3, H, W], by any solver and strategy
    """

    model_cpu_offload_seq = "unet->autoencoder"
    _exclude_from_cpu_offload = ["conditioner"]  # small, and asked before every step

    def __init__(
        self,
        unet: ModelMixin,
        conditioner: ModelMixin,
        scheduler: SchedulerMixin,
        autoencoder: ModelMixin,
        signals: object,  # Signals, whichever file their class is of
        source_size: int | None = None,  # pixels of the images that it learnt crops from
        drop: float | None = None,  # share of samples that it was trained on with the null; None = not known
        sizes: str | None = None,  # "80x48 64x64": those it learnt, first the one it makes unasked; None = a square
        version: int = VERSION,
    ) -> None:
        super().__init__()
        self.cells: tuple[int, int] | None = None  # (h, w) of the latents it makes, where it is not the size it learnt
        self.register_modules(
            unet=unet, conditioner=conditioner, scheduler=scheduler, autoencoder=autoencoder, signals=signals
        )
        self.register_to_config(source_size=source_size, drop=drop, sizes=sizes, version=version)
        self.set_progress_bar_config(disable=True)
        if next(autoencoder.parameters(), None) is None:  # pixels: nothing to move, and accelerate asks for something
            self.model_cpu_offload_seq, self._exclude_from_cpu_offload = "unet", ["conditioner", "autoencoder"]
        autoencoder.check_channels(self.latent_shape[0], "this run")
        self.spec, self.schedule = signals.spec, scheduler  # which it was trained with, whatever takes its place
        self.learnt = [(int(w), int(h)) for w, h in (size.split("x") for size in (sizes or "").split())]
        self.learnt = self.learnt or [(self.image_size, self.image_size)]
        if sizes:
            self.resize(*self.learnt[0])
        self.annotator_folder: Path | None = None
        self.checkpoint: int | None = None  # step of the snapshot that it was opened at, where it was one
        self._members: dict[int, Tensor] = {}

    def resize(self, width: int, height: int) -> None:
        """Makes images of this size in pixels from now on. Far from the sizes that the network has `learnt` objects are repeated or
        cut, and masks and boxes are stretched. InputError for sides that it cannot halve as often as it does."""
        self.cells = self._cells(width, height)

    def _cells(self, width: int | None, height: int | None) -> tuple[int, int]:
        """(h, w) of the latents of images of this size; of sides that are None, as it makes them."""
        factor, own = self.autoencoder.factor, self.latent_shape[1:]
        step = factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        rows, columns = (n * factor if side is None else side for side, n in zip((height, width), own))
        if any(type(side) is not int or side % step or not 0 < side <= MAX_SIDE for side in (rows, columns)):
            raise InputError(f"size {columns}x{rows}: this run makes multiples of {step} pixels, up to {MAX_SIDE:,}")
        if (width or height) and (columns, rows) not in self.learnt:
            known = ", ".join(f"{w}x{h}" for w, h in self.learnt)
            print(f"note: this run has learnt {known}: far from it objects are repeated or cut", file=sys.stderr)
        return rows // factor, columns // factor

    def save_pretrained(self, save_directory: str | Path, refer: bool = False, **kwargs: Any) -> None:
        """The folder, whole: also what loads it where ldm_sg is not installed. `refer`: a large first stage stays where it is,
        and is named. `kwargs`: of the networks' own `save_pretrained`."""
        from ldm_sg.folder import copy_plain
        from ldm_sg.parts import write_code

        folder = Path(save_directory)
        for name, part in self.components.items():
            part = self._portable_signals() if name == "signals" else part
            own = {"refer": refer} if name == "autoencoder" else kwargs if isinstance(part, ModelMixin) else {}
            part.save_pretrained(folder / name, **own)
        if self.annotator_folder and (folder / "annotator").resolve() != self.annotator_folder.resolve():
            copy_plain(self.annotator_folder, folder / "annotator")
        write_code(self, folder)
        self.save_config(folder)

    def to_json_string(self) -> str:
        """model_index.json, which says where its class lies: diffusers then needs no `custom_pipeline`."""
        index = json.loads(super().to_json_string()) | {"_class_name": ["pipeline", type(self).__name__]}
        return json.dumps(index, indent=2) + "\n"

    def save_lora(self, unet: ModelMixin, folder: Path, base: str) -> None:
        """Into FOLDER: the adapters of `unet`, which are in this pipeline's weights, and what else the run it started from lacks:
        conditioner, signals and f. `load_lora` adds them to that run's pipeline, whose unet file has the sha256 `base`."""
        from ldm_sg.folder import copy_plain, write_json

        self.conditioner.save_pretrained(folder / "conditioner")
        copy_plain(self.annotator_folder, folder / "annotator", without="g")
        self._portable_signals().save_pretrained(folder / "signals")
        write_json(folder / BASE, {"unet": base})
        unet.save_lora_adapter(folder)

    def load_lora(self, folder: Path) -> None:
        """Makes this pipeline the one that was fine-tuned from it, with what `save_lora` wrote."""
        from ldm_sg.models.lora import load_lora
        from ldm_sg.parts import check_whole

        safe, parts = {"low_cpu_mem_usage": False, "use_safetensors": True}, {}
        for name in ("conditioner", "signals"):
            if not (folder / name).is_dir():
                way = "give the lora/ folder of a run that was fine-tuned with lora="
                raise InputError(f"lora {str(folder)!r}: no {name}/ there; {way}")
            parts[name] = type(getattr(self, name)).from_pretrained(folder / name, **safe)
        check_whole(parts["conditioner"], folder / "conditioner")
        load_lora(self.unet, folder)
        self.register_modules(**parts)
        self.conditioner.to(self.device, self.unet.dtype)
        self.spec, self._members, self.annotator_folder = self.signals.spec, {}, folder / "annotator"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "SelfGuidedPipeline":
        """A pipeline folder, or the hub id of one (revision, token, cache_dir, local_files_only). None of its code is run: its parts
        are of this package's classes. `torch_dtype`, `device_map` (a device); parts in place of the folder's (scheduler=...);
        the rest goes to the networks' own `from_pretrained`. InputError for a folder of another version."""
        from ldm_sg.parts import fetch, read_parts

        folder = fetch(str(pretrained_model_name_or_path), kwargs)
        device = kwargs.pop("device_map", None)
        pipe = cls(**read_parts(folder, cls.load_config(folder), VERSION, kwargs))
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        pipe.annotator_folder = folder / "annotator"
        return pipe.to(device) if device else pipe

    def _portable_signals(self) -> "Signals":
        """All signals where they are ids, otherwise MOST_SIGNALS of them drawn at random: enough to sample from."""
        if len(self.signals) <= MOST_SIGNALS or (self.signals.mask is None and self.signals.feature is None):
            return self.signals
        order = torch.randperm(len(self.signals), generator=torch.Generator().manual_seed(0))
        return self.signals[order[:MOST_SIGNALS].sort().values]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        return (self.unet.config.out_channels, *(self.cells or (size, size)))

    @property
    def image_size(self) -> int:
        """Side of the images it learnt to make, in pixels; the short one where they are no squares."""
        return self.unet.config.sample_size * self.autoencoder.factor

    @property
    def source_size(self) -> int:
        """Side in pixels at which real images are to be seen, the centre `image_size` of which is like what it makes."""
        return self.config.source_size or self.image_size

    def guidance(self, signals: "Signals") -> Guidance:
        """Signals of B images -> what the network reads."""
        return signals.guidance(self.latent_shape[1:])

    def clusters(self, ids: Sequence[int], seed: int = 0) -> Guidance:
        """One cluster id an image; InputError for an id that the run does not have. Where a signal has other parts too (a box,
        say), they are those of a training image of that cluster."""
        return self.guidance(self.draw(len(ids), seed, clusters=ids))

    def draw(self, n: int, seed: int = 0, first_index: int = 0, clusters: Sequence[int] | None = None) -> "Signals":
        """Signals of training images drawn at random: the empirical distribution, as the paper samples. With `clusters`, one
        an image, only those of that cluster (of a mask: with that class in it)."""
        picks, every = [torch.empty(0, dtype=torch.long)], torch.arange(len(self.signals))
        for i in range(n):
            pool = every if clusters is None else self._with_label(clusters[i])
            generator = image_generator(seed, first_index + i, "signal")
            picks.append(pool[torch.randint(len(pool), (1,), generator=generator)])
        return self.signals[torch.cat(picks)]

    def _with_label(self, label: int) -> Tensor:
        """Which training signals have `label`; InputError where the run has no such label, or no image has it."""
        if not self.spec.num_labels:
            raise InputError(f"cluster {label}: this run was trained without clusters; it accepts {self.accepts()}")
        try:
            label = operator.index(None if isinstance(label, bool) else label)
        except TypeError as err:
            raise InputError(f"cluster {label!r}: a whole number is needed") from err
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
        parts = (self.autoencoder.mean, self.autoencoder.std)
        mean, std = (part.view(-1, 1, 1).to(self._execution_device) for part in parts)
        return (-1 - mean) / std, (1 - mean) / std

    @property
    def foreign(self) -> bool:
        """Whether a scheduler stands where the one was that the run learnt with: it is then diffusers' stepping that draws."""
        return self.scheduler is not self.schedule or type(self.scheduler).__name__ not in LEARNT_WITH

    @torch.no_grad()
    def __call__(
        self,
        cluster: int | Sequence[int] | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        height: int | None = None,
        width: int | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """As diffusers' pipelines are called: `num_images_per_prompt` images of each cluster; without clusters, of signals drawn from
        the training distribution.

        guidance_scale: w of Eq. 4, None = `usual_w` (2). generator: one stream for all images, or one an image, as `generators`
        gives them. latents: unit noise [B, C, h, w]. output_type: pil, np [B, H, W, 3] or pt [B, 3, H, W] in [0, 1], latent.
        height, width: in pixels, of this call's images alone; as in `resize`.
        callback_on_step_end(pipe, step, time, {"latents": x}) may return other latents. The solver is DPM-Solver++(2M) of
        ldm_sg, or whatever scheduler was put in the place of the run's."""
        need_choice("output_type", output_type, OUTPUTS)
        if set(callback_on_step_end_tensor_inputs) != {"latents"}:
            raise InputError(
                f"callback_on_step_end_tensor_inputs={callback_on_step_end_tensor_inputs}: there are latents"
            )
        asked = cluster if cluster is None or isinstance(cluster, Iterable) else [cluster]
        ids = None if asked is None else [k for k in asked for _ in range(num_images_per_prompt)]
        n = num_images_per_prompt if ids is None else len(ids)
        if n < 1:
            raise InputError(f"cluster={cluster}, num_images_per_prompt={num_images_per_prompt}: that is no image")
        if isinstance(generator, list) and len(generator) != n:
            raise InputError(f"generator: {len(generator)} of them for {n} images: give one, or one an image")
        cells = self._cells(width, height)
        shape = (n, self.latent_shape[0], *cells)
        first = generator[0] if isinstance(generator, list) else generator
        noise = randn_tensor(shape, generator, first.device if first else None) if latents is None else latents
        if noise.shape != shape:
            raise InputError(f"latents: {tuple(noise.shape)}, but {n} images of this run need {shape}")
        seed = int(torch.randint(2**31, (), generator=first, device=first.device if first else None))
        guidance = self.draw(n, seed, clusters=ids).guidance(cells)
        w = self.usual_w if guidance_scale is None else guidance_scale
        with self.progress_bar(total=num_inference_steps) as bar:

            def each(i: int, t: Tensor, x: Tensor) -> Tensor:
                bar.update()
                told = callback_on_step_end(self, i, t, {"latents": x}) if callback_on_step_end else {}
                return (told or {}).get("latents", x)

            if self.foreign:
                check_fits(self.scheduler, self.schedule)
                denoiser, guidance, noise = self._prepare(guidance, noise, w)
                denoiser = within(denoiser, self.objective.to(noise.device), self.bounds)
                x = drive(self.scheduler, denoiser, noise, guidance, num_inference_steps, generator, each)
            else:
                x = self.solve(guidance, noise, w, make_grid(self.objective, num_inference_steps), each=each)
        images = x if output_type == "latent" else self._output(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images) if return_dict else (images,)

    def edit(
        self, source: "int | Image.Image", edits: Sequence["Edit"], strength: float = 20.0, n: int = 1
    ) -> list[Image.Image]:
        """n images that this run draws with the seed `source`, or a photo, after `edits`: `pipe.edit(3, [Edit(5, dx=0.2)])`. More of
        it, layouts and parts of other images, by `sampling.editor.Editor(pipe)`. InputError as there."""
        from ldm_sg.sampling.editor import Editor  # it needs this file

        if not isinstance(source, int | Image.Image) or not n >= 1:
            raise InputError(f"source={source!r:.60}, n={n}: a seed or a PIL image, and at least 1")
        editor = Editor(self, self.usual_w)
        found = editor.drawn(n, source) if isinstance(source, int) else editor.photo(to_rgb(source))
        return _pil(editor.edit(found, edits, strength))

    def _output(self, latents: Tensor, kind: str) -> Any:
        if kind == "pil":
            return _pil(self.decode(latents))
        images = (self._pixels(latents) + 1) / 2
        return images if kind == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()

    @torch.no_grad()
    def generate(
        self,
        guidance: "Guidance | Signals",
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
        the predicted clean latent of every step. strategy: how w is applied (`guidance.compose`). InputError where another
        scheduler was put into the pipeline, for `scheduler` here names a solver of ldm_sg."""
        if self.foreign:
            raise InputError(
                f"pipe.scheduler is {type(self.scheduler).__name__}, which steps by itself: call pipe(cluster=...); `generate` and "
                "`ldm-sg sample` draw by ldm_sg's solvers, with the scheduler that the run learnt with in its place"
            )
        device = self._execution_device
        generators = self.generators(len(guidance), seed, first_index)
        if noise is None:
            noise = unit_noise(self.latent_shape, generators)
        else:  # that of the steps is not what it was drawn from
            generators = [image_generator(seed, first_index + i, "steps") for i in range(len(guidance))]
        step = make_step(scheduler, eta, lambda: unit_noise(self.latent_shape, generators).to(device))
        grid = make_grid(self.objective, steps, spacing)
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(precision, device)):
            images = self.decode(self.solve(guidance, noise, w, grid, strategy, step=step, watch=watch))
        self.maybe_free_model_hooks()
        return images

    def generators(self, n: int, seed: int = 0, first_index: int = 0) -> list[torch.Generator]:
        """The randomness of n images, one each: those that `generate` and `ldm-sg sample` draw with."""
        return [image_generator(seed, first_index + i) for i in range(n)]

    def _prepare(
        self, guidance: "Guidance | Signals", noise: Tensor, w: float, strategy: Strategy = cfg
    ) -> tuple[Denoiser, Guidance, Tensor]:
        """The guided network, and what it starts from, on its device."""
        device = self._execution_device
        if hasattr(guidance, "guidance"):  # signals, whichever file their class is of
            guidance = self.guidance(guidance)
        if self.config.drop == 1:  # nothing else was learnt, whatever a strategy asks for
            guidance = guidance.null()
        denoiser = strategy(GuidedUNet(self.unet, self.conditioner), self.strength(w), self.objective.to(device))
        return denoiser, guidance.to(device), noise.to(device, torch.float32)

    def solve(
        self, guidance: "Guidance | Signals", noise: Tensor, w: float, grid: Grid, strategy: Strategy = cfg, **how: Any
    ) -> Tensor:
        """Unit noise [B, C, h, w], or what a solver left at the first time of `grid` -> clean latents, by ldm_sg's solvers. `how`:
        step, watch and each of `solvers.solve`."""
        denoiser, guidance, noise = self._prepare(guidance, noise, w, strategy)
        return solve(denoiser, noise, guidance, self.objective.to(noise.device), grid, bounds=self.bounds, **how)

    @property
    def objective(self) -> Objective:
        """What the network predicts, under which schedule."""
        return objective_of(self.schedule)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, h, w] -> uint8 [B, 3, H, W] on the CPU."""
        return ((self._pixels(latents) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()

    def _pixels(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents.to(self._execution_device, self.autoencoder.dtype)).float()

    def enable_vae_tiling(self, tile: int = 512) -> None:
        """Images with a side longer than `tile` pixels are decoded in overlapping tiles of that side, which takes less memory."""
        self.autoencoder.set_tile(tile)

    def disable_vae_tiling(self) -> None:
        """The first stage's own tiles again."""
        self.autoencoder.set_tile()


def _pil(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]


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
            known = read_mapping(Path(lora) / BASE, {"unet": str}) if (Path(lora) / BASE).is_file() else None
            if known and (checkpoint is not None or known["unet"] != file_sha256(folder / "unet" / WEIGHTS)):
                raise InputError(
                    f"lora {lora!r} was trained beside the weights of another run than {source}, or of another step"
                )
            pipe.load_lora(Path(lora))
    except InputError:
        raise
    except Exception as err:  # files that may be anybody's: diffusers, safetensors and numpy raise anything
        raise InputError(f"{folder} is damaged or not complete: {one_line(err)[:300]}") from err
    pipe.unet.eval()
    return pipe
