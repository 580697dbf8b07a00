"""fit-autoencoder: images -> a small autoencoder that `autoencoder=FOLDER` uses."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor
from tqdm import tqdm

from ldm_sg.autoencoder import Autoencoder, load_autoencoder, measure_normalisation, psnr
from ldm_sg.autoencoder import manifest as manifests
from ldm_sg.autoencoder.kinds import KINDS, plain_config
from ldm_sg.config import FitAutoencoderConfig
from ldm_sg.configfile import to_mapping
from ldm_sg.data.images import to_float, to_uint8
from ldm_sg.data.shards import expand, image_batches
from ldm_sg.errors import InputError
from ldm_sg.folder import claim, file_sha256, holds_out, write_bytes
from ldm_sg.hardware import pick_device, use_bf16
from ldm_sg.report.grids import labelled_rows, save
from ldm_sg.training.autoencoder import Fit, Source, shrink
from ldm_sg.training.autoencoder_loop import loop
from ldm_sg.training.checkpoint import read_checkpoint

FREE = ("out", "device", "workers", "log_every", "val_every", "checkpoint_every", "data", "recipe", "licence")
OF_INIT = "that of init"
NOISE_SHOWN = 0.2  # std of the noise on normalised latents in `psnr_noisy` and in the pictures


@holds_out
def fit_autoencoder(config: FitAutoencoderConfig) -> Path:
    """Fits, or goes on where the fit in `config.out` stopped; returns the folder, which is an autoencoder's when done.
    Ctrl-C saves and raises."""
    config.check()
    device = pick_device(config.device)
    out = Path(config.out)
    claim(out, "config.yaml", to_mapping(config), FREE)
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

    before = {}
    if config.init and held:
        init = load_autoencoder(config.init).to(device)
        if not init.normalised:
            _normalise(init, sources[0].images[:512], config.size)
        before = validate(init, held, None)

    def report() -> None:
        if held:
            picture = out / "samples" / f"step-{fit.steps:06d}.png"
            scores = validate(current(fit, sources[0].images[:512], out), held, picture)
            said = ", ".join(f"{name} {value:.2f} dB" for name, value in scores.items())
            tqdm.write(f"step {fit.steps}: {said}", file=sys.stderr)

    if not loop(fit, sources, checkpoint, out / "metrics.csv", report):
        raise KeyboardInterrupt(f"interrupted and saved in {out}; the same command resumes")
    autoencoder = current(fit, sources[0].images, out)
    scores = validate(autoencoder, held, out / "reconstructions.png")
    after = autoencoder.manifest["psnr"] = {name: scores[name] for name in held}
    if held:
        autoencoder.manifest["psnr_noisy"] = {"std": NOISE_SHOWN, **{name: scores[f"{name}+noise"] for name in held}}
    manifests.write(autoencoder.manifest, out)
    print(f"{out}: {after} dB on held-out images")
    for name in before.keys() & after.keys():
        advice = "; it is better itself: more steps, or a smaller lr" if after[name] < before[name] else ""
        print(f"{name}: {before[name]} dB by {config.init} before, {after[name]} dB now{advice}", file=sys.stderr)
    return out


def read_images(config: FitAutoencoderConfig) -> tuple[list[Source], dict[str, Tensor]]:
    """All images, in memory: the training sources in order, and name -> held-out images, uint8 [N, 3, size, size]."""
    shards = config.shards if isinstance(config.shards, dict) else {"train": config.shards}
    sources, held = [], {}
    for name, urls in shards.items():
        images = _read(name, urls, round(config.size * config.zoom.get(name, 1)), config.workers)
        last = config.holdout.get(name, 0)
        if not sources and not config.holdout and not config.val_shards:
            last = min(200, len(images) // 10)  # of the first one, so that somebody knows how good it becomes
        if not 0 <= last < len(images):
            raise InputError(f"holdout.{name}={last}: {urls!r} has {len(images)} images")
        if last:
            held[name] = torch.nn.functional.interpolate(images[-last:].float(), config.size, mode="area").byte()
        sources.append(Source(name, images[: len(images) - last]))
    for name, urls in config.val_shards.items():
        held[name] = _read(name, urls, config.size, config.workers)
    return sources, held


def _read(name: str, urls: str, side: int, workers: int) -> Tensor:
    batches = image_batches(
        expand(urls), side, 64, workers, lambda *skipped: tqdm.write(f"skipped: {skipped}", file=sys.stderr)
    )
    parts = [batch.images for batch in tqdm(batches, f"reading {name}", unit=" batches", leave=False)]
    if not parts:
        raise InputError(f"shards.{name}={urls!r}: no readable image")
    return torch.cat(parts)


def current(fit: Fit, images: Tensor, out: Path) -> Autoencoder:
    """What would ship now: the averaged weights through float16 and model.safetensors, normalised over `images`, those of the
    first source."""
    c = fit.config
    state = {k: v.to("cpu", torch.float16).contiguous() for k, v in fit.average.items()}
    write_bytes(out / "model.safetensors", to_bytes(state))
    manifest = {
        "name": c.name or out.resolve().name,
        "kind": fit.kind,
        "source": {"file": "model.safetensors"},
        "sha256": file_sha256(out / "model.safetensors"),
        "licence": c.licence if c.init is None or c.licence != OF_INIT else manifests.find(c.init)[0].get("licence"),
        "patch": fit.patch if fit.kind == "kl" else None,
        "net": plain_config(fit.net),
        "params": sum(p.numel() for p in fit.net.parameters()),
        "data": c.data,
        "recipe": c.recipe,
    }
    autoencoder = Autoencoder(KINDS[fit.kind](manifest, out / "model.safetensors"), manifest).to(fit.device)
    _normalise(autoencoder, images, c.size)
    return autoencoder


def _normalise(autoencoder: Autoencoder, images: Tensor, size: int) -> None:
    measure_normalisation(
        autoencoder,
        (batch if batch.shape[-1] == size else shrink(batch, size) for batch in map(to_float, images.split(64))),
    )


@torch.no_grad()
def validate(autoencoder: Autoencoder, held: dict[str, Tensor], picture: Path | None) -> dict[str, float]:
    """dB of each held-out set, plain and (NAME+noise) with noise on the latents; `picture` gets 12 of each set in three
    rows: the images, their reconstructions, and those with noise."""
    scores, rows = {}, {}
    for name, images in held.items():
        decoded: dict[str, list[Tensor]] = {name: [], f"{name}+noise": []}
        generator = torch.Generator().manual_seed(0)
        for batch in images.split(64):
            z = autoencoder.encode(to_float(batch).to(autoencoder.mean.device))
            noise = NOISE_SHOWN * torch.randn(z.shape, generator=generator).to(z.device)
            for parts, latents in zip(decoded.values(), (z, z + noise), strict=True):
                parts.append(autoencoder.decode(latents).cpu())
        rows[f"{name} images"] = images[:12]
        for label, parts in decoded.items():
            made = torch.cat(parts)
            scores[label] = round(float(psnr(made, to_float(images)).mean()), 2)
            rows[label] = to_uint8(made[:12])
    if picture is not None and rows:
        save(labelled_rows(list(rows), list(rows.values())), picture)
    return scores
