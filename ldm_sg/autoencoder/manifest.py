"""`autoencoders/NAME/manifest.yaml`: what a first stage is, where its weights are, and how its latents are normalised."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download

from ldm_sg.configfile import ROOT
from ldm_sg.errors import InputError, choices, need_within
from ldm_sg.folder import WEIGHTS, check, file_sha256, read_mapping, write_json, write_text
from ldm_sg.hub import hub

KEYS = {
    "name": "how configs and reports call it; the folder's name by default",
    "kind": "kl, tiny, vq, vqmodel, patch",
    "source": "{hub: ID[@REVISION]}, {file: NAME beside the manifest}, {folder: diffusers folder} or none",
    "subfolder": "of a hub repository",
    "sha256": "of the weights file, here or on the hub; checked before it is read",
    "licence": "of the weights",
    "channels": "of a latent",
    "factor": "image side / latent side",
    "patch": "kl: side of the pixel-unshuffle before the encoder and after the decoder",
    "tile": "pixels: images with a longer side pass in overlapping tiles of this side; default 1024",
    "preview": "a small autoencoder of the same latents, for the pictures drawn while training",
    "latent_mean": "per channel, before normalisation; null = measured over the data when annotating",
    "latent_std": "likewise",
    "net": "the network's own configuration, for weights that come without one",
    "params": "number of weights",
    "psnr": "dB on held-out images",
    "round_trip": "dB on images of the annotation set that it was used for",
    "psnr_noisy": "dB when the normalised latents carry Gaussian noise of that std",
    "rfid": "reconstruction FID, with what it was measured on",
    "data": "what it was trained on",
    "recipe": "how to train it again",
    "note": "anything a user must know",
}
PLACES = {"hub", "file", "folder"}
NUMBER = (int, float)
TYPES = {  # of those that are read
    **dict.fromkeys(("name", "subfolder", "sha256", "preview", "note"), str),
    **dict.fromkeys(("channels", "factor", "patch"), int),
    "latent_mean": [NUMBER],
    "latent_std": [NUMBER],
    "round_trip": NUMBER,
    "net": dict,
}
HUB = "hub://"
LEAST = 24  # dB
WAY_OUT = f"bring that repository here and give its folder, the one with config.json and {WEIGHTS}: autoencoder=PATH"
DIFFUSERS_KINDS = {"AutoencoderKL": "kl", "AutoencoderTiny": "tiny", "VQModel": "vqmodel"}


def find(name_or_dir: str) -> tuple[dict[str, Any], Path]:
    """A name under autoencoders/, a folder with a manifest, a bare diffusers folder, or one on the hub -> (manifest, its folder).

    Raises InputError when it is neither, with the nearest name."""
    if name_or_dir.startswith(HUB):
        return on_hub(name_or_dir.removeprefix(HUB)), Path()
    folder = Path(name_or_dir).expanduser()
    if folder.is_file():
        raise InputError(f"autoencoder {name_or_dir!r}: no folder, make one by ldm-sg autoencoder import {name_or_dir}")
    shipped = ROOT / "autoencoders"
    if not folder.is_dir() and (shipped / name_or_dir / "manifest.yaml").is_file():
        folder = shipped / name_or_dir
    if (folder / "manifest.yaml").is_file():
        return read(folder / "manifest.yaml"), folder
    if (folder / "config.json").is_file():
        return from_diffusers(folder), folder
    if folder.is_dir():
        raise InputError(f"autoencoder {name_or_dir!r}: no manifest.yaml and no diffusers config.json in that folder")
    known = choices(name_or_dir, (path.parent.name for path in shipped.glob("*/manifest.yaml")))
    raise InputError(f"autoencoder {name_or_dir!r} is neither a folder nor a name under {shipped}; {known}")


def read(path: Path) -> dict[str, Any]:
    """A manifest, its keys and what is read of them checked."""
    manifest = read_mapping(path, {"kind": str})
    for key, value in manifest.items():
        if key not in KEYS:
            raise InputError(f"{path}: unknown key {key!r}; {choices(key, KEYS)}")
        if key in TYPES and value is not None:
            check(value, TYPES[key], f"{path}: {key}")
        if TYPES.get(key) is int and value is not None:
            need_within(f"{path}: {key}", value, 1)
    if isinstance(source := manifest.get("source"), dict) and not all(isinstance(v, str) for v in source.values()):
        raise InputError(f"{path}: source: {source}: {KEYS['source']}")
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


def on_hub(name: str) -> dict[str, Any]:
    """The manifest of USER/NAME[@REVISION][/SUBFOLDER], whose config.json tells the kind."""
    parts = name.split("/", 2)
    repository, subfolder = "/".join(parts[:2]), "".join(parts[2:])
    plain, _, revision = repository.partition("@")
    with hub(f"autoencoder {HUB + name!r}", WAY_OUT):
        config = hf_hub_download(plain, "config.json", subfolder=subfolder or None, revision=revision or None)
    known = from_diffusers(Path(config).parent)
    return known | {"name": name.replace("/", "-"), "source": {"hub": repository}, "subfolder": subfolder or None}


def blurred(manifest: dict[str, Any]) -> str:
    """A warning where images came back worse than LEAST from the first stage, and the way out; otherwise ''."""
    found = manifest.get("round_trip")
    if found is None or found >= LEAST:
        return ""
    return (
        f"The autoencoder {manifest['name']!r} gives these images back at {found} dB: under {LEAST} dB, detail is "
        "lost that no sample will have. Try another (ldm-sg autoencoder list), or fit one on: ldm-sg fit-autoencoder "
        f"configs/autoencoder/finetune.yaml init={manifest['name']} (kind kl or tiny)"
    )


def write(manifest: dict[str, Any], folder: Path, config: bool = False) -> None:
    """manifest.yaml, whole or not at all, keys in the order of KEYS; with `config`, config.json as diffusers has it."""
    known = {key: manifest[key] for key in KEYS if manifest.get(key) is not None}
    if config:
        return write_json(folder / "config.json", {"_class_name": "Autoencoder", **known})
    text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=118, default_flow_style=None)
    write_text(folder / "manifest.yaml", text)


def weights_file(manifest: dict[str, Any], folder: Path) -> Path | None:
    """Where local weights lie (None for the hub and for kinds without weights), their sha256 checked.

    Fills manifest["sha256"]. InputError when the file is missing, or is not the one the manifest describes, and where the
    manifest lacks what its kind cannot be made without."""
    if manifest["kind"] == "patch":
        _need(manifest, "factor", manifest.get("factor"))
        return None
    source = manifest.get("source") if isinstance(manifest.get("source"), dict) else {}
    _need(manifest, "source", source.keys() & PLACES)
    if "file" in source:
        _need(manifest, "net", manifest.get("net"))
        path = (folder / source["file"]).resolve()
        manifest["source"] = {"file": str(path)}  # so that a copy of the manifest elsewhere still finds it
    elif "folder" in source:
        path = folder / source["folder"] / WEIGHTS
    else:
        return None
    if not path.is_file():
        said = f"weights {path} not found. {manifest.get('note', '')}".strip()
        raise InputError(f"autoencoder {manifest['name']!r}: {said}")
    digest = file_sha256(path)
    if manifest.get("sha256") not in (digest, None):
        raise InputError(f"{path}: sha256 {digest} is not the manifest's {manifest['sha256']}: the file was changed")
    manifest["sha256"] = digest
    return path


def _need(manifest: dict[str, Any], key: str, found: Any) -> None:
    if not found:
        raise InputError(f"autoencoder {manifest['name']!r}: its manifest does not say {key}: {KEYS[key]}")
