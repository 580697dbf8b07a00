"""fit-autoencoder: images -> a small KL autoencoder that `autoencoder=FOLDER` uses."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor
from tqdm import tqdm

from ldm_sg.autoencoder import Autoencoder, measure_normalisation
from ldm_sg.autoencoder import manifest as manifests
from ldm_sg.autoencoder.kinds import KL, plain_config
from ldm_sg.config import FitAutoencoderConfig, claim
from ldm_sg.data.images import to_float, to_uint8
from ldm_sg.data.shards import expand, image_batches
from ldm_sg.errors import InputError, choices
from ldm_sg.hardware import pick_device, use_bf16
from ldm_sg.report.grids import labelled_rows, save
from ldm_sg.training.autoencoder import Fit, Source, draw
from ldm_sg.training.checkpoint import read_checkpoint
from ldm_sg.training.metrics import MetricsCsv

FREE = ("out", "device", "workers", "log_every", "val_every", "checkpoint_every", "data", "recipe", "licence")
NOISE_SHOWN = 0.2  # std of the noise on normalised latents in `psnr_noisy` and in the pictures


def fit_autoencoder(config: FitAutoencoderConfig) -> Path:
    """Fits, or goes on where the fit in `config.out` stopped; returns the folder, which is an autoencoder's when done.
    Ctrl-C saves and raises."""
    _check(config)
    device = pick_device(config.device)
    out = Path(config.out)
    claim(out, config, FREE)
    if (out / "manifest.yaml").is_file():
        print(f"{out}: already fitted")
        return out
    sources, held = read_images(config)
    fit = Fit(config, device, use_bf16(config.precision, device))
    checkpoint = out / "checkpoint.pt"
    if checkpoint.is_file():
        fit.load_state_dict(read_checkpoint(checkpoint, device))
    print(
        f"{sum(len(s.images) for s in sources):,} images, {sum(p.numel() for p in fit.net.parameters()) / 1e6:.2f}M "
        f"parameters, {device.type}, {'bf16' if fit.bf16 else 'fp32'}"
        + (f"; resuming at step {fit.steps:,}" if fit.steps else ""),
        file=sys.stderr,
    )
    finished = _loop(fit, sources, held, out)
    _save_checkpoint(fit, checkpoint)
    if not finished:
        print(f"interrupted and saved in {out}; the same command resumes", file=sys.stderr)
        raise KeyboardInterrupt
    autoencoder = export(fit, sources, held, out)
    print(f"{out}: {autoencoder.manifest['psnr']} dB on held-out images")
    return out


def _check(config: FitAutoencoderConfig) -> None:
    for name in (
        "size",
        "channels",
        "patch",
        "blocks",
        "steps",
        "batch_size",
        "log_every",
        "val_every",
        "checkpoint_every",
    ):
        if getattr(config, name) < 1:
            raise InputError(f"{name}={getattr(config, name)}: at least 1")
    if not config.widths or any(w < 8 or w % 8 for w in config.widths):
        raise InputError(f"widths={config.widths}: one multiple of 8 a level (group norm has 8 groups)")
    factor = config.patch * 2 ** (len(config.widths) - 1)
    if config.size % (2 * factor):
        raise InputError(
            f"size={config.size}: patch and widths make a factor of {factor}; give a multiple of {2 * factor}"
        )
    if not isinstance(config.shards, str | dict):
        raise InputError(f"shards={config.shards!r}: a glob, or a mapping from names to globs")
    names = list(config.shards) if isinstance(config.shards, dict) else ["train"]
    for key in ("holdout", "zoom"):
        for name in getattr(config, key):
            if name not in names:
                raise InputError(f"{key}.{name}: no such entry under shards; {choices(name, names)}")
    if any(z < 1 for z in config.zoom.values()):
        raise InputError(f"zoom={config.zoom}: at least 1")


def read_images(config: FitAutoencoderConfig) -> tuple[list[Source], dict[str, Tensor]]:
    """All images, in memory: the training sources in order, and name -> held-out images, uint8 [N, 3, size, size]."""
    shards = config.shards if isinstance(config.shards, dict) else {"train": config.shards}
    sources, held = [], {}
    for name, urls in shards.items():
        images = _read(name, urls, round(config.size * config.zoom.get(name, 1)), config.workers)
        last = config.holdout.get(name, 0)
        if not 0 <= last < len(images):
            raise InputError(f"holdout.{name}={last}: {urls!r} has {len(images)} images")
        if last:
            held[name] = torch.nn.functional.interpolate(images[-last:].float(), config.size, mode="area").byte()
        sources.append(Source(name, images[: len(images) - last]))
    for name, urls in config.val_shards.items():
        held[name] = _read(name, urls, config.size, config.workers)
    return sources, held


def _read(name: str, urls: str, side: int, workers: int) -> Tensor:
    bar = tqdm(desc=f"reading {name}", unit=" images", leave=False)
    parts = []
    for batch in image_batches(
        expand(urls), side, 64, workers, lambda *skipped: tqdm.write(f"skipped: {skipped}", file=sys.stderr)
    ):
        parts.append(batch.images)
        bar.update(len(batch.images))
    bar.close()
    if not parts:
        raise InputError(f"shards.{name}={urls!r}: no readable image")
    return torch.cat(parts)


def _loop(fit: Fit, sources: list[Source], held: dict[str, Tensor], out: Path) -> bool:
    """Steps until the end (True) or Ctrl-C (False)."""
    c = fit.config
    log = _Log(out / "metrics.csv", fit.steps)
    bar = tqdm(total=c.steps, initial=fit.steps, unit="step", desc="fit", dynamic_ncols=True)
    with _interruptible() as interrupted, bar:
        while fit.steps < c.steps and not interrupted:
            generator = torch.Generator().manual_seed(c.seed * 2**32 + fit.steps)
            losses = fit.step(draw(sources, c.size, c.batch_size, generator), generator)
            log.add(losses, c.batch_size)
            bar.update()
            last = fit.steps == c.steps
            if fit.steps % c.log_every == 0:
                bar.set_postfix({k: f"{v:.3g}" for k, v in log.write(fit.steps).items()})
            if held and (fit.steps % c.val_every == 0 or last):
                scores = validate(
                    current(fit, sources[0], out, 512), held, out / "samples" / f"step-{fit.steps:06d}.png"
                )
                tqdm.write(
                    f"step {fit.steps}: " + ", ".join(f"{k} {v:.2f} dB" for k, v in scores.items()), file=sys.stderr
                )
            if fit.steps % c.checkpoint_every == 0:
                _save_checkpoint(fit, out / "checkpoint.pt")
    return fit.steps >= c.steps


def _save_checkpoint(fit: Fit, path: Path) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    torch.save(fit.state_dict(), temporary)
    temporary.replace(path)


def current(fit: Fit, source: Source, out: Path, images: int) -> Autoencoder:
    """What would ship now: the averaged weights through float16 and model.safetensors, normalised over up to `images`
    images of `source`."""
    c = fit.config
    temporary = out / f"model.safetensors.tmp-{os.getpid()}"
    temporary.write_bytes(to_bytes({k: v.to("cpu", torch.float16).contiguous() for k, v in fit.average.items()}))
    temporary.replace(out / "model.safetensors")
    manifest = {
        "name": c.name or out.resolve().name,
        "kind": "kl",
        "source": {"file": "model.safetensors"},
        "sha256": manifests.sha256(out / "model.safetensors"),
        "licence": c.licence,
        "patch": c.patch,
        "net": plain_config(fit.net),
        "params": sum(p.numel() for p in fit.net.parameters()),
        "data": c.data,
        "recipe": c.recipe,
    }
    autoencoder = Autoencoder(KL(manifest, out / "model.safetensors"), manifest).to(fit.device)
    batches = source.images[:images].split(64)
    measure_normalisation(autoencoder, (_shrink(to_float(batch), c.size) for batch in batches))
    return autoencoder


def _shrink(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return torch.nn.functional.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)


@torch.no_grad()
def validate(autoencoder: Autoencoder, held: dict[str, Tensor], picture: Path | None) -> dict[str, float]:
    """dB of each held-out set, plain and (NAME+noise) with noise on the latents; `picture` gets 12 of each set in three
    rows: the images, their reconstructions, and those with noise."""
    scores, rows = {}, []
    for name, images in held.items():
        parts: list[list[Tensor]] = [[], []]
        generator = torch.Generator().manual_seed(0)
        for batch in images.split(64):
            z = autoencoder.encode(to_float(batch).to(autoencoder.mean.device))
            noise = NOISE_SHOWN * torch.randn(z.shape, generator=generator).to(z.device)
            for part, latents in zip(parts, (z, z + noise), strict=True):
                part.append(autoencoder.decode(latents).cpu())
        for label, decoded in ((name, torch.cat(parts[0])), (f"{name}+noise", torch.cat(parts[1]))):
            scores[label] = round(psnr(decoded, to_float(images)), 2)
            rows.append((label, to_uint8(decoded[:12])))
        rows.insert(-2, (f"{name} images", images[:12]))
    if picture is not None:
        save(labelled_rows([label for label, _ in rows], [row for _, row in rows]), picture)
    return scores


def psnr(decoded: Tensor, images: Tensor) -> float:
    """dB for a range of 2 ([-1, 1]), the mean over images."""
    return float((-10 * torch.log10(((decoded - images) / 2).square().mean(dim=(1, 2, 3)))).mean())


def export(fit: Fit, sources: list[Source], held: dict[str, Tensor], out: Path) -> Autoencoder:
    """The finished autoencoder, its latents normalised over all training images of the first source."""
    autoencoder = current(fit, sources[0], out, len(sources[0].images))
    scores = validate(autoencoder, held, out / "reconstructions.png")
    autoencoder.manifest["psnr"] = {name: scores[name] for name in held}
    autoencoder.manifest["psnr_noisy"] = {"std": NOISE_SHOWN, **{name: scores[f"{name}+noise"] for name in held}}
    autoencoder.manifest["source"] = {"file": "model.safetensors"}
    manifests.write(autoencoder.manifest, out)
    return autoencoder


class _Log:
    """Means of the losses since the last row of metrics.csv."""

    FIELDS = ("step", "images_per_s", "l1", "kl", "half", "lpips", "gan", "critic")

    def __init__(self, path: Path, step: int) -> None:
        self.file = MetricsCsv(path, self.FIELDS, step)
        self._reset()

    def _reset(self) -> None:
        self.sums, self.steps, self.images, self.start = {}, 0, 0, time.monotonic()

    def add(self, losses: dict[str, float], images: int) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps, self.images = self.steps + 1, self.images + images

    def write(self, step: int) -> dict[str, float]:
        row = {"images_per_s": self.images / (time.monotonic() - self.start)}
        row.update({name: value / self.steps for name, value in self.sums.items()})
        self.file.append(step=step, **{name: f"{value:.5g}" for name, value in row.items()})
        self._reset()
        return row


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Ctrl-C fills the list instead of breaking a step in the middle; a second one breaks."""
    got: list[int] = []

    def note(number: int, frame: object) -> None:
        got.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield got
    finally:
        signal.signal(signal.SIGINT, before)
