"""`autoencoders/NAME/manifest.yaml`: what a first stage is, where its weights are, and how its latents are normalised."""

from pathlib import Path
from typing import Any

import yaml

from ldm_sg.configfile import ROOT
from ldm_sg.errors import InputError, choices
from ldm_sg.folder import file_sha256, read_mapping, write_json, write_text

KEYS = {
    "name": "how configs and reports call it; the folder's name by default",
    "kind": "kl, tiny, vq, vqmodel, patch",
    "source": "{hub: ID[@REVISION]}, {file: NAME beside the manifest}, {folder: diffusers folder} or none",
    "subfolder": "of a hub repository",
    "sha256": "of the weights file; checked at load",
    "licence": "of the weights",
    "channels": "of a latent",
    "factor": "image side / latent side",
    "patch": "kl: side of the pixel-unshuffle before the encoder and after the decoder",
    "latent_mean": "per channel, before normalisation; null = measured over the data when annotating",
    "latent_std": "likewise",
    "net": "the network's own configuration, for weights that come without one",
    "params": "number of weights",
    "psnr": "dB on held-out images",
    "psnr_noisy": "dB when the normalised latents carry Gaussian noise of that std",
    "rfid": "reconstruction FID, with what it was measured on",
    "data": "what it was trained on",
    "recipe": "how to train it again",
    "note": "anything a user must know",
}
DIFFUSERS_KINDS = {"AutoencoderKL": "kl", "AutoencoderTiny": "tiny", "VQModel": "vqmodel"}


def find(name_or_dir: str) -> tuple[dict[str, Any], Path]:
    """A name under autoencoders/, a folder with a manifest, or a bare diffusers folder -> (manifest, its folder).

    Raises InputError when it is neither, with the nearest name."""
    folder = Path(name_or_dir).expanduser()
    shipped = ROOT / "autoencoders"
    if not folder.is_dir() and (shipped / name_or_dir / "manifest.yaml").is_file():
        folder = shipped / name_or_dir
    if (folder / "manifest.yaml").is_file():
        return read(folder / "manifest.yaml"), folder
    if (folder / "config.json").is_file():
        return from_diffusers(folder), folder
    if folder.is_dir():
        raise InputError(f"autoencoder {name_or_dir!r}: no manifest.yaml and no diffusers config.json in that folder")
    names = [path.parent.name for path in shipped.glob("*/manifest.yaml")]
    raise InputError(
        f"autoencoder {name_or_dir!r} is neither a folder nor a name under {shipped}; {choices(name_or_dir, names)}"
    )


def read(path: Path) -> dict[str, Any]:
    """A manifest, its keys checked."""
    manifest = read_mapping(path, {"kind": str})
    for key in manifest:
        if key not in KEYS:
            raise InputError(f"{path}: unknown key {key!r}; {choices(key, KEYS)}")
    return {"name": path.parent.name, **manifest}


def from_diffusers(folder: Path) -> dict[str, Any]:
    """The manifest of a folder in diffusers' form: of one of its networks, or of the first stage of a pipeline."""
    config = read_mapping(folder / "config.json", {"_class_name": str})
    cls = config["_class_name"]
    if cls == "Autoencoder":
        return {key: value for key, value in config.items() if key in KEYS}
    if cls not in DIFFUSERS_KINDS:
        raise InputError(f"{folder / 'config.json'}: class {cls!r}; {choices(cls, DIFFUSERS_KINDS)}")
    return {"name": folder.resolve().name, "kind": DIFFUSERS_KINDS[cls], "source": {"folder": str(folder.resolve())}}


def write(manifest: dict[str, Any], folder: Path, config: bool = False) -> None:
    """manifest.yaml, whole or not at all, keys in the order of KEYS; with `config`, config.json as diffusers has it."""
    known = {key: manifest[key] for key in KEYS if manifest.get(key) is not None}
    if config:
        return write_json(folder / "config.json", {"_class_name": "Autoencoder", **known})
    text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=118, default_flow_style=None)
    write_text(folder / "manifest.yaml", text)


def weights_file(manifest: dict[str, Any], folder: Path) -> Path | None:
    """Where local weights lie (None for the hub and for kinds without weights), their sha256 checked.

    Fills manifest["sha256"]. InputError when the file is missing, or is not the one the manifest describes."""
    source = manifest.get("source")
    if isinstance(source, dict) and "file" in source:
        path = (folder / source["file"]).resolve()
        manifest["source"] = {"file": str(path)}  # so that a copy of the manifest elsewhere still finds it
    elif isinstance(source, dict) and "folder" in source:
        path = folder / source["folder"] / "diffusion_pytorch_model.safetensors"
    else:
        return None
    if not path.is_file():
        raise InputError(
            f"autoencoder {manifest['name']!r}: weights {path} not found. {manifest.get('note', '')}".strip()
        )
    digest = file_sha256(path)
    if manifest.get("sha256") not in (digest, None):
        raise InputError(f"{path}: sha256 {digest} is not the manifest's {manifest['sha256']}: the file was changed")
    manifest["sha256"] = digest
    return path
