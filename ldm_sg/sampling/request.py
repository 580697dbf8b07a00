"""What a person asks of `sample`: the options, checked, and the signals that they mean."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_sg.annotate.kinds import load_annotator
from ldm_sg.data.images import MAX_SIDE, BadImage, crop_resize_index, decode, decode_index, read_bytes
from ldm_sg.data.signals import PackedMasks, Signals
from ldm_sg.errors import InputError, choices
from ldm_sg.folder import file_sha256
from ldm_sg.guidance.compose import make_strategy
from ldm_sg.guidance.spatial import VOID
from ldm_sg.sampling.solvers import make_step

if TYPE_CHECKING:
    from ldm_sg.pipeline import SelfGuidedPipeline

MOST_W = 1000  # beyond it all is saturated, and float32 overflows
VARY = ("layout", "content")
PRESETS = {"paper": {"scheduler": "ddim", "steps": 250, "spacing": "uniform", "eta": 0.0, "strategy": "cfg", "w": 2.0}}


@dataclass
class SampleOptions:
    """What a person asks for; `settings()` is what decides the pixels."""

    cluster: list[int] = field(default_factory=list)
    box: list[float] = field(default_factory=list)  # x0, y0, x1, y1 in pixels of the image that is made
    mask: str | None = None  # file of an index mask
    like: str | None = None  # file of an image to imitate
    vary: str | None = None  # layout (other signals, the same noise) or content (one signal, other noise)
    n: int = 16
    w: float = 2.0
    steps: int = 25
    scheduler: str = "dpmpp_2m"
    spacing: str = "log_snr"
    eta: float = 0.0
    strategy: str = "cfg"
    rescale: float = 0.0
    interval: list[float] = field(default_factory=list)  # noise levels between which w is not 1
    seed: int = 0
    batch_size: int = 64
    sweep_w: list[float] = field(default_factory=list)
    interpolate: list[int] = field(default_factory=list)
    trajectory: bool = False
    precision: str = "fp32"
    device: str = "auto"
    checkpoint: str | None = None  # of the run: a step, or best
    lora: str | None = None  # folder of adapters
    size: list[int] = field(default_factory=list)  # width and height in pixels, where not the run's own

    def settings(self) -> dict[str, Any]:
        """What decides the pixels: files by their content too."""
        values = {k: v for k, v in asdict(self).items() if k not in ("batch_size", "device")}
        return values | {"sha256": [_digest(file) for file in (self.mask, self.like) if file]}

    def solving(self) -> dict[str, Any]:
        """What the pipeline takes besides signals and w."""
        names = ("steps", "scheduler", "spacing", "eta", "seed", "precision")
        limits = (self.interval[0], self.interval[1]) if self.interval else None
        strategy = make_strategy(self.strategy, self.rescale, limits)
        return {name: getattr(self, name) for name in names} | {"strategy": strategy}

    def method(self) -> dict[str, Any]:
        """How an image was made, beside its seed, signal and w: what stands in its record."""
        rare = {name: getattr(self, name) for name in ("eta", "rescale", "interval")}
        common = {name: getattr(self, name) for name in ("steps", "scheduler", "spacing", "strategy")}
        return common | {name: value for name, value in rare.items() if value}

    def name(self) -> str:
        """The folder of these samples, where none is named."""
        files = {flag: file for flag, file in (("mask", self.mask), ("like", self.like)) if file}
        what = {
            f"c{'-'.join(map(str, self.cluster))}"[:40]: self.cluster,
            f"box{_joined(self.box)}": self.box,
            **{f"{flag}-{Path(file).stem[:40]}-{_digest(file)[:6]}": True for flag, file in files.items()},
            f"vary-{self.vary}": self.vary,
            "sweep": self.sweep_w,
            f"interpolate{'-'.join(map(str, self.interpolate))}": self.interpolate,
            "trajectory": self.trajectory,
            f"step-{self.checkpoint}": self.checkpoint is not None,
            f"{'x'.join(map(str, self.size))}": self.size,
            f"lora-{Path(self.lora or '').resolve().parent.name}"[:40]: self.lora,
        }
        how = {
            f"w{_joined(self.sweep_w or [self.w])}": True,
            f"{self.scheduler}{self.steps}": True,
            self.strategy: self.strategy != SampleOptions.strategy,
            self.spacing: self.spacing != SampleOptions.spacing,
            f"rescale{self.rescale:g}": self.rescale,
            f"interval{_joined(self.interval)}": self.interval,
            f"seed{self.seed}": True,
        }
        first, last = ("_".join(part for part, there in parts.items() if there) for parts in (what, how))
        return f"{first or 'drawn'}_n{self.n}_{last}"

    def check(self) -> None:
        """InputError where values or their combination mean nothing."""
        for name in ("n", "batch_size", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: at least 1")
        for w in (self.w, *self.sweep_w):
            if not abs(w) <= MOST_W:
                raise InputError(f"w={w}: a finite number, at most {MOST_W}")
        if self.sweep_w and self.w != SampleOptions.w:
            raise InputError(f"--sweep-w names its own strengths: leave --w {self.w:g} out")
        for flag, file in (("mask", self.mask), ("like", self.like)):
            if file == "":
                raise InputError(f"--{flag} '': a file is needed")
        if not 0 <= self.eta <= 1:
            raise InputError(f"eta={self.eta}: a share between 0 and 1")
        make_step(self.scheduler, self.eta)
        if self.interval and len(self.interval) != 2:
            raise InputError(f"--interval takes two noise levels, for example 0.2,0.8; got {self.interval}")
        self.solving()
        modes = [bool(self.sweep_w), bool(self.interpolate), self.trajectory]
        if sum(modes) > 1:
            raise InputError("--sweep-w, --interpolate and --trajectory draw different pictures: give one")
        if self.interpolate and len(self.interpolate) != 2:
            raise InputError(f"--interpolate takes two cluster ids, for example 3,17; got {self.interpolate}")
        if self.interpolate and (self.cluster or self.box or self.mask or self.like):
            raise InputError("--interpolate names its own clusters: leave --cluster, --box, --mask and --like out")
        if self.box and len(self.box) != 4:
            raise InputError(f"--box takes x0,y0,x1,y1 in pixels, got {self.box}")
        if self.like and (self.cluster or self.box or self.mask):
            raise InputError("--like takes the whole signal from the image: leave --cluster, --box and --mask out")
        if self.vary not in (None, *VARY):
            raise InputError(f"--vary {self.vary!r}; {choices(self.vary, VARY)}")
        if self.size and (len(self.size) != 2 or self.mask or max(self.size) > MAX_SIDE):
            raise InputError(f"--size takes WIDTHxHEIGHT, for example 320x256, and no --mask; got {self.size}")
        if self.mask and self.cluster:
            raise InputError("--mask says which classes are where: leave --cluster out")
        if self.vary == "content" and len(self.cluster) > 1:
            raise InputError(f"--vary content varies one signal: give one --cluster, not {self.cluster}")
        if self.vary and (self.interpolate or self.trajectory):
            raise InputError("--vary, --interpolate and --trajectory draw different pictures: give one")
        if self.vary == "layout" and (self.box or self.mask or self.like):
            raise InputError("--vary layout draws other boxes or masks: leave --box, --mask and --like out")


def _joined(numbers: list[float]) -> str:
    return "-".join(f"{number:g}" for number in numbers)


def _digest(file: str) -> str:
    """sha256 of a file's content; empty where it cannot be read, which is told when it is."""
    try:
        return file_sha256(file)
    except OSError:
        return ""


def apply_preset(options: SampleOptions, preset: str | None) -> SampleOptions:
    """`options` with the preset's settings; InputError where another value was asked for."""
    if preset is None:
        return options
    if preset not in PRESETS:
        raise InputError(f"preset {preset!r}; {choices(preset, PRESETS)}")
    for name, value in PRESETS[preset].items():
        if getattr(options, name) not in (value, getattr(SampleOptions, name)):
            raise InputError(f"{name}={getattr(options, name)}: preset {preset} means {name}={value}; leave one out")
    return SampleOptions(**{**asdict(options), **PRESETS[preset]})


def signals(pipe: "SelfGuidedPipeline", options: SampleOptions) -> Signals:
    """What is asked for: n samples of each cluster, of a box or mask, of an image's own signal, or n signals drawn from the
    training distribution. Parts that are not asked for are drawn."""
    if options.like:
        return _like(pipe, options.like)[torch.zeros(options.n, dtype=torch.long)]
    ids = [k for k in options.cluster for _ in range(options.n)] or None
    drawn = pipe.draw(len(ids) if ids else options.n, options.seed, clusters=ids)
    if options.vary == "layout" and pipe.spec.spatial is None:
        raise InputError(f"--vary layout: this run was trained without boxes or masks; it accepts {pipe.accepts()}")
    if options.vary == "content":
        drawn = drawn[torch.zeros(len(drawn), dtype=torch.long)]
    if options.box:
        _need_spatial(pipe, "box")
        drawn = drawn.replace(box=_box(options.box, pipe).expand(len(drawn), 1, 4))
    if options.mask:
        _need_spatial(pipe, "mask")
        mask = _read_mask(Path(options.mask), pipe)
        drawn = drawn.replace(mask=PackedMasks.of([mask] * len(drawn)))
    return drawn


def _need_spatial(pipe: "SelfGuidedPipeline", part: str) -> None:
    if pipe.spec.spatial != part:
        without = {None: "boxes or masks", "box": "masks", "mask": "boxes"}[pipe.spec.spatial]
        raise InputError(f"--{part}: this run was trained without {without}; it accepts {pipe.accepts()}")


def _box(corners: list[float], pipe: "SelfGuidedPipeline") -> Tensor:
    """x0, y0, x1, y1 in pixels -> [1, 1, 4] as shares of the sides."""
    x0, y0, x1, y1 = corners
    height, width = (cells * pipe.autoencoder.factor for cells in pipe.latent_shape[1:])
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise InputError(
            f"--box {x0:g},{y0:g},{x1:g},{y1:g}: needs 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}, in pixels"
        )
    return torch.tensor(corners).view(1, 1, 4) / torch.tensor([width, height, width, height])


def _read_mask(path: Path, pipe: "SelfGuidedPipeline") -> np.ndarray:
    """An index image of any size -> uint8 [S, S] of the run's mask size; InputError for ids that the run does not have."""
    try:
        mask = np.array(crop_resize_index(decode_index(read_bytes(path)), pipe.image_size))
    except BadImage as err:
        raise InputError(f"--mask {path}: {err.reason}") from err
    ids = np.unique(mask[mask != VOID])
    if not len(ids):
        raise InputError(f"--mask {path}: all of it is {VOID}, which means no class")
    if ids[-1] >= pipe.spec.num_labels:
        raise InputError(
            f"--mask {path}: class {ids[-1]} in it; this run has 0 to {pipe.spec.num_labels - 1} ({VOID} = none)"
        )
    return mask


def _like(pipe: "SelfGuidedPipeline", file: str) -> Signals:
    """The signal of an image file, by the run's own g and f."""
    annotator = load_annotator(pipe.annotator_folder, pipe.device)
    return annotator.of_image(read_photo("--like", file), pipe.image_size, pipe.source_size)


def read_photo(flag: str, file: str) -> Image.Image:
    """The image file that `flag` names."""
    try:
        return decode(read_bytes(file))
    except BadImage as err:
        raise InputError(f"{flag} {file}: {err.reason}") from err
