"""Configs on disk: one YAML a thing a person runs, with one level of `base:`, and dotlist overrides. Unknown keys and wrong
types are refused with the nearest right one."""

import dataclasses
import difflib
import itertools
import textwrap
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm_sg.errors import InputError, choices, one_line

PACKAGE = Path(__file__).parent
ASSETS = PACKAGE / "assets"
# configs/ and autoencoders/ stand at the top of a checkout and travel inside the package in a wheel.
ROOT = PACKAGE.parent if (PACKAGE.parent / "configs").is_dir() else PACKAGE / "_root"

Schema = TypeVar("Schema")


def load(schema: type[Schema], path: str | Path | Schema | None = None, overrides: list[str] | None = None) -> Schema:
    """YAML at `path` (with one level of `base:`), or a config, + `key=value` overrides -> a filled `schema`.

    Raises InputError naming the file, the key and the nearest right key, a wrong type, or a missing required value."""
    merged = OmegaConf.structured(schema)
    files, typed = _layers(path), list(_dotlist(overrides or []))
    for source, layer in [*files, *typed]:
        check_keys(layer, merged, source)
        try:
            merged = OmegaConf.merge(merged, layer)
        except (OmegaConfBaseException, TypeError) as err:  # a list where a mapping belongs, and the other way round
            raise InputError(f"{source}: {str(err).splitlines()[0]}") from err
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise InputError(
            f"{files[-1][0] if files else 'config'}: no value for {', '.join(missing)}: give it as {missing[0]}=..."
        )
    loaded: Any = OmegaConf.to_object(merged)
    if hasattr(loaded, "check"):
        loaded.check()
    if hasattr(loaded, "check_given"):
        loaded.check_given([*(layer for _, layer in files), OmegaConf.merge({}, *(layer for _, layer in typed))])
    return loaded


def _layers(path: Any) -> list[tuple[str, DictConfig]]:
    if path is None:
        return []
    if dataclasses.is_dataclass(path):
        return [(type(path).__name__, OmegaConf.structured(path))]
    if not Path(path).exists() and (ROOT / path).is_file():
        path = ROOT / path  # configs/... of the checkout or the wheel, from any folder
    top = read_yaml(path)
    if "base" not in top:
        return [(str(path), top)]
    base_path = Path(path).parent / str(top.pop("base"))
    base = read_yaml(base_path)
    if "base" in base:
        raise InputError(f"{base_path}: base: goes one level deep, and {path} already uses it as its base")
    return [(str(base_path), base), (str(path), top)]


def read_yaml(path: str | Path) -> DictConfig:
    """A YAML mapping, or InputError naming the file."""
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError as err:
        known = (p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.yaml"))
        [near, *_] = [*difflib.get_close_matches(str(path), known, n=1), ""]
        said = f"did you mean {near!r}?" if near else "`ldm-sg configs` lists those that are shipped"
        raise InputError(f"config {str(path)!r} not found; {said}") from err
    except Exception as err:  # yaml's errors have no common, importable base here
        raise InputError(f"{path}: not a readable YAML file: {str(err).splitlines()[0]}") from err
    if not isinstance(loaded, DictConfig):
        raise InputError(f"{path}: expected a YAML mapping of keys to values")
    return loaded


def listing() -> str:
    """The configs that ship, grouped by the verb that they are for, with the first sentence of each."""
    lines: list[str] = []
    for group in sorted(path for path in (ROOT / "configs").iterdir() if path.is_dir()):
        lines += [*[""] * bool(lines), f"configs/{group.name}/"]
        for path in sorted(group.glob("*.yaml")):
            comment = itertools.takewhile(
                lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines()
            )
            said = " ".join(line.lstrip("# ") for line in comment).split(". ")[0]
            lines.append(f"  {path.name:<34}{textwrap.shorten(said, 110, placeholder=' ...')}")
    return "\n".join(lines)


def _dotlist(overrides: list[str]) -> list[tuple[str, DictConfig]]:
    found = []
    for item in overrides:
        if "=" not in item or item.startswith("="):
            raise InputError(f"override {item!r}: write it as key=value, for example steps=1000")
        if item.endswith("="):
            raise InputError(f"override {item!r}: nothing stands after the = (null means no value)")
        try:
            found.append((item, OmegaConf.from_dotlist([item])))
        except yaml.YAMLError as err:
            raise InputError(f"override {item!r}: not YAML after the =: {one_line(err)[:160]}") from err
    return found


def check_keys(given: DictConfig, schema: DictConfig, source: str, prefix: str = "") -> None:
    """InputError for a key of `given` that `schema` does not have, at any depth."""
    for key in given:
        if key not in schema.keys():  # `in schema` is False for a key whose value is still missing
            known = [prefix + str(k) for k in schema]
            raise InputError(f"{source}: unknown key {prefix + str(key)!r}; {choices(prefix + str(key), known)}")
        inner, value = schema._get_node(key), given._get_node(key)
        if (
            isinstance(inner, DictConfig)
            and isinstance(value, DictConfig)
            and dataclasses.is_dataclass(OmegaConf.get_type(inner))
        ):
            check_keys(value, inner, source, prefix + str(key) + ".")


def from_mapping(schema: type[Schema], values: dict[str, Any], where: str) -> Schema:
    """A config that was written down as a mapping; InputError naming `where` when it is not one of this version."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))  # type: ignore[return-value]
    except OmegaConfBaseException as err:
        raise InputError(f"{where}: not of this version of ldm_sg: {str(err).splitlines()[0]}") from err


def to_mapping(config: Any) -> dict[str, Any]:
    """A config's keys and values as plain mappings and lists."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def to_yaml(config: Any) -> str:
    """The resolved, complete config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config) if dataclasses.is_dataclass(config) else config)
