"""What a person asks of `sample`: the options, and what they may be."""

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from ldm_sg.errors import InputError, need_choice, need_within
from ldm_sg.options import CHECKPOINT, DEVICE, numbers, option

MOST_W = 1000  # beyond it all is saturated, and float32 overflows
VARY = ("layout", "content")
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"scheduler": "ddim", "steps": 250, "spacing": "uniform", "eta": 0.0, "strategy": "cfg", "w": 2.0},
    # as low an FD as any of all strategies and w in docs/reproduction.md: 168.2, for 172.0 of plain guidance at its best w, 3 (174.0 at 2)
    "best": {
        "scheduler": "dpmpp_2m",
        "steps": 25,
        "spacing": "log_snr",
        "strategy": "cfg",
        "interval": [0.2, 0.8],
        "w": 5.0,
    },
}
LENGTHS = {"interval": "0.2,0.8", "interpolate": "3,17", "box": "40,60,200,240", "size": "320x256"}  # and examples
APART = {  # options, and those that they leave nothing to say
    "interpolate": ("sweep_w", "trajectory", "vary", "cluster", "box", "mask", "like"),
    "trajectory": ("sweep_w", "vary"),
    "like": ("cluster", "box", "mask"),
    "mask": ("cluster", "size"),
}


@dataclass
class SampleOptions:
    """What a person asks for; `settings()` is what decides the pixels."""

    cluster: list[int] = option([], "Cluster id; may be repeated. Default: drawn from the training distribution.")
    box: list[float] = option([], "Where the object is, in pixels: x0,y0,x1,y1 (runs with boxes).", parse=numbers)
    mask: str | None = option(None, "Index PNG of any size: which class is where (runs with masks).")
    like: str | None = option(None, "Image whose signal, by the run's own g and f, is taken.")
    vary: str | None = option(None, "layout: other signals, the same noise; content: one signal, other noise.")
    n: int = option(16, "Images (of each cluster).", "-n", "--n")
    w: float = option(2.0, "Guidance strength: 0 unconditional, 1 conditional.", "--w", "-w")
    steps: int = option(25, "Solver steps.")
    scheduler: str = option("dpmpp_2m", "dpmpp_2m, ddim, ddpm, unipc or euler.")
    spacing: str = option("log_snr", "Where the solver evaluates: log_snr, trailing, or uniform as the paper's code.")
    eta: float = option(0.0, "DDIM's noise share.")
    strategy: str = option("cfg", "How w is applied: cfg, cfg_zero or apg.")
    rescale: float = option(0.0, "cfg: share of the guided std brought back, 0 to 1.")
    interval: list[float] = option([], "w is 1 outside these noise levels: 0.2,0.8", parse=numbers)
    seed: int = option(0, "Image i of a seed is always the same.")
    batch_size: int = option(64, "Images at once; changes the speed, not the images.")
    sweep_w: list[float] = option([], "One row a strength: 0,1,2,3", parse=numbers)
    interpolate: list[int] = option([], "Walk between two clusters: 3,17", parse=partial(numbers, kind=int))
    trajectory: bool = option(False, "Rows of predicted images over the steps.")
    precision: str = option("fp32", "fp32; bf16 or auto: up to 2.5 times as fast, a grey level off.")
    device: str = option("auto", DEVICE)
    checkpoint: str | None = option(None, CHECKPOINT)
    lora: str | None = option(None, "lora/ folder of a run that was fine-tuned from this one.")
    size: list[int] = option(
        [],
        "WIDTHxHEIGHT of the images, where not the run's own: 320x256. Far from it objects repeat.",
        parse=partial(numbers, kind=int),
    )

    def settings(self) -> dict[str, Any]:
        """What decides the pixels: files by their content too."""
        names = [each.name for each in fields(SampleOptions) if each.name not in ("batch_size", "device")]
        return {name: getattr(self, name) for name in names} | {
            "sha256": [_digest(file) for file in (self.mask, self.like) if file]
        }

    def solving(self) -> dict[str, Any]:
        """What the pipeline takes besides signals and w."""
        from ldm_sg.guidance.compose import make_strategy

        names = ("steps", "scheduler", "spacing", "eta", "seed", "precision")
        strategy = make_strategy(self.strategy, self.rescale, tuple(self.interval) or None)
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
        from ldm_sg.data.images import MAX_SIDE
        from ldm_sg.hardware import PRECISIONS
        from ldm_sg.sampling.solvers import SPACINGS, make_step

        for name in ("n", "batch_size", "steps"):
            need_within(name, getattr(self, name), 1)
        for w in (self.w, *self.sweep_w):
            need_within("w", w, -MOST_W, MOST_W)
        if self.sweep_w and self.w != SampleOptions.w:
            raise InputError(f"--sweep-w names its own strengths: leave --w {self.w:g} out")
        if "" in (self.mask, self.like):
            raise InputError(f"--mask {self.mask!r}, --like {self.like!r}: a file is needed")
        need_within("eta", self.eta, 0, 1)
        make_step(self.scheduler, self.eta)
        need_choice("spacing", self.spacing, SPACINGS)
        need_choice("precision", self.precision, PRECISIONS)
        for name, example in LENGTHS.items():
            given = getattr(self, name)
            if given and len(given) != len(example.replace("x", ",").split(",")):
                raise InputError(f"--{name} {given}: write it as {example}")
        self.solving()
        for side in self.size:
            need_within("size", side, 1, MAX_SIDE)
        need_choice("vary", self.vary, (None, *VARY))
        apart = APART | ({"vary": ("box", "mask", "like")} if self.vary == "layout" else {})
        for name, others in apart.items():
            other = next((other for other in others if getattr(self, other)), None)
            if getattr(self, name) and other:
                raise InputError(f"--{name} and --{other.replace('_', '-')} do not go together: leave one out")
        if self.vary == "content" and len(self.cluster) > 1:
            raise InputError(f"--vary content varies one signal: give one --cluster, not {self.cluster}")


def _joined(numbers: list[float]) -> str:
    return "-".join(f"{number:g}" for number in numbers)


def _digest(file: str) -> str:
    """sha256 of a file's content; empty where it cannot be read, which is told when it is."""
    from ldm_sg.folder import file_sha256

    try:
        return file_sha256(file)
    except OSError:
        return ""


def with_preset(options: SampleOptions, preset: str | None, typed: Collection[str]) -> SampleOptions:
    """`options` with the preset's settings; InputError where one of those that were `typed` has another value."""
    if preset is None:
        return options
    need_choice("preset", preset, PRESETS)
    means = dict(PRESETS[preset])
    if options.sweep_w:
        del means["w"]
    for name, value in means.items():
        if name in typed and getattr(options, name) != value:
            raise InputError(f"{name}={getattr(options, name)}: preset {preset} means {name}={value}; leave one out")
    return replace(options, **means)
