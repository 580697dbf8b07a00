"""The parts of a pipeline folder: read without running any code that lies in it, and written with code of their own."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin
from safetensors import safe_open

from ldm_sg.autoencoder import Autoencoder
from ldm_sg.config import ObjectiveConfig
from ldm_sg.data.signals import Signals
from ldm_sg.errors import InputError, choices
from ldm_sg.folder import WEIGHTS, read_mapping, write_text
from ldm_sg.hub import hub
from ldm_sg.models.conditioner import Conditioner
from ldm_sg.models.unet import PlainUNet
from ldm_sg.standalone import standalone
from ldm_sg.weights import check_finite

if TYPE_CHECKING:
    from ldm_sg.pipeline import SelfGuidedPipeline

OURS: dict[str, Any] = {part.__name__: part for part in (Autoencoder, Conditioner, PlainUNet, Signals)}
PARTS = ("unet", "conditioner", "scheduler", "autoencoder", "signals")
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def fetch(name: str, options: dict[str, Any]) -> Path:
    """A folder, or the copy of a hub repository; takes what is the hub's out of `options`."""
    asked = {key: options.pop(key) for key in HUB if key in options}
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    with hub(f"pipeline {name!r}", "give the folder of a pipeline, or a name on the Hugging Face hub"):
        return Path(snapshot_download(name, **asked))


def read_parts(folder: Path, index: dict[str, Any], version: int, options: dict[str, Any]) -> dict[str, Any]:
    """What builds the pipeline of model_index.json: its parts, those given in `options` instead of the folder's, and settings."""
    if (there := index.get("version", 1)) != version:
        said = f"of another version of ldm_sg (model_index.json says {there}, this one reads {version})"
        raise InputError(f"{folder}: a pipeline folder {said}: train the run on with steps=, or make it anew")
    for entry in folder.rglob("*"):
        if entry.exists() and not (entry.is_file() or entry.is_dir()):
            raise InputError(f"{entry}: no plain file: the folder is damaged")
    if "dtype" in options:
        options["torch_dtype"] = options.pop("dtype")
    named = {name: entry for name, entry in index.items() if isinstance(entry, list | tuple) and name[:1] != "_"}
    parts = {name: options.pop(name) for name in named if name in options}
    for name, entry in named.items():
        if name not in parts:
            known = _class_of(folder, name, entry)
            safe = {"low_cpu_mem_usage": False, "use_safetensors": True, **options}
            parts[name] = known.from_pretrained(folder / name, **({} if name == "scheduler" else safe))
            if isinstance(parts[name], torch.nn.Module):
                check_whole(parts[name], folder / name)
    return parts | {key: value for key, value in index.items() if key not in named and key[0] != "_"}


def _class_of(folder: Path, name: str, entry: Any) -> Any:
    """The class of the part that model_index.json calls `name`, which lies in FOLDER/`name`: diffusers would ask the hub for one
    that does not. InputError where it is no part or class of a pipeline of ours, or its schedule is too long to build."""
    index = folder / "model_index.json"
    if name not in PARTS:
        raise InputError(f"{index}: a part {name!r}; {choices(name, PARTS)}")
    library, cls = entry if len(entry) == 2 and all(isinstance(word, str) for word in entry) else ("?", str(entry))
    known = getattr(diffusers, cls, None) if library == "diffusers" else OURS.get(cls)
    base = SchedulerMixin if name == "scheduler" else (ModelMixin, Signals)
    if not (isinstance(known, type) and issubclass(known, base)):
        raise InputError(f"{index}: its {name} is a {cls} of {library}, which ldm_sg does not know")
    if not (folder / name).is_dir():
        raise InputError(f"{folder / name}: no such folder, which model_index.json names: the pipeline is not complete")
    if name == "scheduler":
        path = folder / name / "scheduler_config.json"
        ObjectiveConfig(timesteps=read_mapping(path).get("num_train_timesteps", 1000)).check(f"{path}: num_train_")
    return known


def check_whole(part: torch.nn.Module, folder: Path) -> None:
    """InputError where the file of weights lacks some of the part's, which would then be random, or holds NaN."""
    path = folder / WEIGHTS
    if path.is_file():
        with safe_open(path, "pt") as file:
            lacking = sorted(part.state_dict().keys() - set(file.keys()))
        if lacking and not isinstance(part, Autoencoder):  # which checks its own
            raise InputError(f"{path}: {lacking[0]} is not in it ({len(lacking)} missing): the folder is damaged")
    check_finite(part.state_dict(), folder)


def write_code(pipe: "SelfGuidedPipeline", folder: Path) -> None:
    """pipeline.py, and beside each part of a class of this package PART/MODULE.py, where diffusers looks for it."""
    for name, part in pipe.components.items():
        if own := OURS.get(type(part).__name__):
            pipe.register_to_config(**{name: (own.__module__, own.__name__)})
            write_text(folder / name / f"{own.__module__}.py", standalone(own.__module__, own.__name__))
    write_text(folder / "pipeline.py", standalone(f"{__package__}.pipeline", "SelfGuidedPipeline"))
