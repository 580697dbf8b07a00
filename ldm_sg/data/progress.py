"""How far an annotation set has come, without importing anything heavy."""

from pathlib import Path

from ldm_sg.configfile import read_yaml
from ldm_sg.errors import InputError


def finished_manifest(folder: Path) -> Path:
    """FOLDER/manifest.yaml, which `annotate` writes last; InputError that says how far it is where there is none."""
    if (folder / "manifest.yaml").is_file():
        return folder / "manifest.yaml"
    done = len(list((folder / "work").glob("[0-9]*.json")))
    if (folder / "config.yaml").is_file() and ((folder / "work").is_dir() or (folder / "shards").is_dir()):
        shards = read_yaml(folder / "config.yaml").get("shards")
        count = f" of {len(shards):,}" if shards and not isinstance(shards, str) else ""
        said = f"annotate has not finished: {done:,}{count} shards are through"
        raise InputError(f"{folder}: {said}; wait for it, or give its command again")
    raise InputError(f"{folder} is not an annotation set (no manifest.yaml); make one with `ldm-sg annotate`")
