"""autoencoder: which first stages there are, how well one gives images back, and checkpoints of others as one of ours."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure as ssim
from tqdm import tqdm

from ldm_sg.autoencoder import load_autoencoder, moments, psnr
from ldm_sg.autoencoder import manifest as manifests
from ldm_sg.autoencoder.compvis import convert
from ldm_sg.commands import MeasureOptions
from ldm_sg.configfile import ROOT
from ldm_sg.data.images import MAX_SIDE, to_float, to_uint8
from ldm_sg.errors import InputError, need_within
from ldm_sg.evaluate import sources
from ldm_sg.evaluate.inception import load_inception
from ldm_sg.evaluate.metrics import frechet_distance
from ldm_sg.folder import WEIGHTS, file_sha256, read_mapping, whole, write_json
from ldm_sg.hardware import pick_device
from ldm_sg.report import grids
from ldm_sg.training.autoencoder import enlarge, perceptual_distance

SHOWN = 8  # images of the picture
LEAST = 16  # pixels of an image: SSIM's window is 11
FIGURES = {"metrics": dict, "latent_mean": list, "autoencoder": str, "data": str, "size": int}
USUAL = {"model", "last", Path(WEIGHTS).stem, "ae"}  # names of files that say nothing


def show() -> None:
    """The shipped ones and those under ./autoencoders, a line each."""
    found = {path.parent.resolve(): path for top in (ROOT, Path()) for path in top.glob("autoencoders/*/manifest.yaml")}
    print(f"{'name':<18}{'kind':<9}{'latent':<8}{'licence':<26}where")
    for folder, path in sorted(found.items()):
        try:
            known = manifests.read(path)
        except InputError as err:
            print(f"{folder.name:<18}{err}")
            continue
        latent, source = f"f{known.get('factor')} c{known.get('channels')}", known.get("source")
        source = source if isinstance(source, dict) else {}
        where = f"hub {source['hub']}" if "hub" in source else "here"
        if "file" in source and not (folder / source["file"]).is_file():
            where = "its weights are yours to bring (see its note)"
        print(f"{known['name']!s:<18}{known['kind']:<9}{latent:<8}{known.get('licence', '')!s:<26.25}{where}")


def import_checkpoint(file: Path, config: Path | None = None, out: Path | None = None) -> Path:
    """A KL or VQ autoencoder in CompVis's names, alone or inside a larger checkpoint -> the folder `out` (default
    autoencoders/NAME OF THE FILE), which `autoencoder=OUT` uses. Code in the file is not run."""
    out = out or Path("autoencoders") / (file.absolute().parent.name if file.stem in USUAL else file.stem)
    if out.exists():
        raise InputError(f"{out} exists: choose another --out, or remove it")
    what, state, shape = convert(file, config)
    with whole(out) as new:
        new.mkdir()
        save_file({name: value.contiguous() for name, value in state.items()}, new / "model.safetensors")
        manifest = {"name": out.resolve().name, **what, "source": {"file": "model.safetensors"}}
        manifest["sha256"] = file_sha256(new / "model.safetensors")
        manifest["note"] = (
            f"Imported from {file.name}, sha256 {file_sha256(file)}. Mean and std are measured when annotating."
        )
        manifests.write(manifest, new)
        try:
            autoencoder = load_autoencoder(new)  # strict: every tensor has its place
        except InputError as err:
            raise InputError(str(err).replace(str(new.resolve() / "model.safetensors"), str(file))) from err
        manifest |= {"channels": autoencoder.channels, "factor": autoencoder.factor}
        manifest["params"] = sum(p.numel() for p in autoencoder.codec.parameters())
        manifests.write(manifest, new)
    told = ", ".join(f"{key} {value}" for key, value in shape.items() if value is not None)
    by = "read off its tensors" + (f", as {config} says" if config else " (resolution assumed)")
    print(f"{out}: kind {what['kind']}, {autoencoder.channels} channels, factor {autoencoder.factor}; {by}: {told}")
    return out


def measure(name: str | Path, data: str, **options: Any) -> dict[str, Any]:
    """What `name` gives back of up to `n` images of `data`, spread over it, cropped to `size` pixels (default: the first
    image's, down to a multiple of the factor). Prints a table, writes and returns the figures. `options`: the other fields of
    MeasureOptions. `lpips`, `inception`: what has no weights at hand is left out, and said so. `overwrite`: other figures than
    of these images by this autoencoder in `out` are replaced too; other files never are."""
    given = MeasureOptions(str(name), data, **options)
    need_within("n", given.n, 2)
    need_within("batch_size", given.batch_size, 1)
    device = pick_device(given.device)
    autoencoder, images = load_autoencoder(name).to(device), sources.open_images(data)
    size, picture = given.size, given.picture
    if size is None:
        size = min(sources.first_size(images), MAX_SIDE) // autoencoder.factor * autoencoder.factor
    need_within("size", size, LEAST, MAX_SIDE)
    out = given.out or Path(f"{autoencoder.name}-measured.json")
    asked = {"autoencoder": autoencoder.name, "data": data, "size": size, "n": given.n}
    _refuse_foreign(out, picture, asked, given.overwrite)
    networks, missing = _networks(given.lpips, given.inception, device)
    skipped: list[str] = []
    at_once = min(given.batch_size, MAX_SIDE**2 // size**2)  # as many pixels as one image may have
    batches = sources.batches(images, size, at_once, given.n, lambda image, why: skipped.append(f"{image}: {why}"))
    found: dict[str, list[Tensor]] = {}
    shown: list[tuple[Tensor, Tensor]] = []

    def latents(bar: tqdm) -> Iterator[Tensor]:
        for _, batch in batches:
            real = to_float(batch.to(device))
            z = autoencoder.encode_raw(real)
            rebuilt = autoencoder.decode_raw(z)
            for figure, values in _compare(rebuilt, real, networks).items():
                found.setdefault(figure, []).append(values.cpu())
            if len(shown) * len(batch) < SHOWN:
                shown.append((batch, to_uint8(rebuilt).cpu()))
            bar.update(len(batch))
            yield z

    with torch.no_grad(), tqdm(total=min(images.total or given.n, given.n), unit="image", desc="measure") as bar:
        normal = moments(latents(bar))
    if normal is None:
        raise InputError(f"--data {data!r}: no readable image" + (f"; the first: {skipped[0]}" if skipped else ""))
    joined = {figure: torch.cat(parts) for figure, parts in found.items()}
    metrics = {
        figure: round(float(joined[figure].mean()), 4) for figure in ("psnr", "ssim", "lpips") if figure in joined
    }
    if "real" in joined:
        metrics["rfid"] = round(frechet_distance(joined["rebuilt"], joined["real"]), 3)
    mean, std = ([round(value, 6) for value in values] for values in normal)
    result = {**asked, "sha256": autoencoder.manifest.get("sha256"), "picture": str(picture or ""), "images": bar.n,
              "skipped": len(skipped), "metrics": metrics, "not_measured": missing,
              "latent_mean": mean, "latent_std": std}  # fmt: skip
    write_json(out, result)
    if picture is not None:
        rows = [torch.cat(side)[:SHOWN] for side in zip(*shown)]
        grids.save(grids.labelled_rows(["original", autoencoder.name], rows, scale=1), picture)
    _print(result)
    print(f"-> {out}" + (f", {picture}" if picture else ""))
    return result


def _compare(rebuilt: Tensor, real: Tensor, networks: dict[str, Any]) -> dict[str, Tensor]:
    """Figures of each image, and what the rFID is computed from."""
    found = {
        "psnr": psnr(rebuilt, real).clamp(max=100),  # of an exact one infinite
        "ssim": ssim(rebuilt, real, data_range=2.0, reduction="none").flatten(),
    }
    if "lpips" in networks:
        found["lpips"] = networks["lpips"](enlarge(rebuilt, 64), enlarge(real, 64)).flatten()
    if "rfid" in networks:
        found |= {"real": networks["rfid"](real), "rebuilt": networks["rfid"](rebuilt)}
    return found


def _refuse_foreign(out: Path, picture: Path | None, asked: dict[str, Any], overwrite: bool) -> None:
    """InputError where `measure` would write over what it did not write, or without `overwrite` over other figures than `asked`."""
    known: dict[str, Any] = {}
    if out.exists():
        try:
            known = read_mapping(out, FIGURES)
        except InputError as err:
            raise InputError(f"--out {str(out)!r} holds no figures of this command: choose another") from err
        if not overwrite and any(known.get(key) != value for key, value in asked.items()):
            was = f"{known['autoencoder']}, {known['data']} at {known['size']} px"
            raise InputError(f"--out {str(out)!r} holds figures of {was}: choose another, or add --overwrite")
    if picture is not None and picture.exists() and known.get("picture") != str(picture):
        raise InputError(f"--picture {str(picture)!r} is there, and not of the figures in {out}: choose another")


def _networks(lpips: str | None, inception: str | None, device: torch.device) -> tuple[dict[str, Any], dict[str, str]]:
    """lpips and inception, as far as they can be had without being asked for, and why not."""
    networks, missing = {}, {}
    for name, file, load in (("lpips", lpips, perceptual_distance), ("rfid", inception, load_inception)):
        try:
            networks[name] = load(file).to(device)
        except InputError as err:
            if file is not None:
                raise
            missing[name] = f"{err} (here: --{'lpips' if name == 'lpips' else 'inception'} FILE)"
    return networks, missing


def _print(result: dict[str, Any]) -> None:
    print(f"{result['autoencoder']}: {result['images']:,} images of {result['data']}, {result['size']} px")
    units = {"psnr": "dB", "ssim": "", "lpips": "(AlexNet)", "rfid": "(Inception, against the same images)"}
    for name, value in result["metrics"].items():
        print(f"  {name:<6}{value:>9} {units[name]}".rstrip())
    for name, why in result["not_measured"].items():
        print(f"  {name:<6}not measured: {why}")
    print("  channel   mean       std")
    for i, (mean, std) in enumerate(zip(result["latent_mean"], result["latent_std"])):
        print(f"  {i:>5} {mean:>10.4f} {std:>9.4f}")
