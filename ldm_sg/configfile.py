"""Configs on disk: one YAML a thing a person runs, with one level of `base:`, and dotlist overrides. Unknown keys and wrong
types are refused with the nearest right one."""

import dataclasses
import difflib
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterable
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from ldm_sg.errors import InputError, choices, one_line

PACKAGE = Path(__file__).parent
ASSETS = PACKAGE / "assets"
# configs/ and autoencoders/ stand at the top of a checkout and travel inside the package in a wheel.
ROOT = PACKAGE.parent if (PACKAGE.parent / "configs").is_dir() else PACKAGE / "_root"

Schema = TypeVar("Schema")

EXPECTED = {  # by how OmegaConf says that it is something else
    "be converted to Integer": "a whole number",
    "be converted to Float": "a number",
    "is not a valid bool": "true or false",
    "Config' to string": "a text",
    "is not a ListConfig": "a list",
    "is not Optional": "anything but null",
    "is not a subclass of": "a mapping of keys to values",
    "Cannot merge": "a mapping of keys to values",
    "to Dict[": "a mapping of keys to values",
    "Incompatible value 'None'": "anything but null",
}


class Checked:
    """A config that knows what its values may be: each by itself beside its field (`setting` and those after it), and together
    with others by `rules`."""

    def check(self, prefix: str = "") -> None:
        """InputError for a value that cannot be; `prefix`: of its name."""
        for each in dataclasses.fields(self):  # type: ignore[arg-type]
            value, name = getattr(self, each.name), prefix + each.name
            if isinstance(value, Checked):
                value.check(f"{name}.")
            elif (right := each.metadata.get("right")) and not (value is each.default is None or right(value)):
                or_null = ", or null" if each.default is None else ""
                raise InputError(f"{name}={value}: {each.metadata['what'](value)}{or_null}")
        for name, fits, what in self.rules():
            if not fits:
                raise InputError(f"{prefix}{name}={attrgetter(name)(self)}: {what}")

    def rules(self) -> Iterable[tuple[str, object, str]]:
        """The name of a value, whether it is right beside the others, and what would be."""
        return ()


def setting(default: Any, right: Callable[[Any], bool], what: str | Callable[[Any], str]) -> Any:
    """A field whose values are `right`, which `what`, or what it makes of a wrong one, says in words; None is where it is the
    default."""
    say = what if callable(what) else lambda value: what
    return dataclasses.field(default=default, metadata={"right": right, "what": say})


def count(default: int | None, least: int = 1) -> Any:
    return setting(default, lambda value: value >= least, f"at least {least}")


def from_0(default: float) -> Any:
    return setting(default, lambda value: 0 <= value < math.inf, "0 or more")


def above_0(default: float | None) -> Any:
    return setting(default, lambda value: 0 < value < math.inf, "a finite number above 0")


def share(default: float) -> Any:
    return setting(default, lambda value: 0 <= value <= 1, "a share between 0 and 1")


def below_1(default: float) -> Any:
    return setting(default, lambda value: 0 <= value < 1, "from 0 to below 1")


def one_of(*allowed: Any) -> Any:
    """The first one is the default."""
    return setting(allowed[0], lambda value: value in allowed, lambda value: choices(value, allowed))


def load(schema: type[Schema], given: Any = None, overrides: list[str] | None = None) -> Schema:
    """A YAML's path (with one level of `base:`), a config or a mapping, + `key=value` overrides -> a filled `schema`.

    Raises InputError naming the file, the key and the nearest right key, a wrong type, or a missing required value."""
    merged = OmegaConf.structured(schema)
    files, typed = _layers(given, schema), _dotlist(overrides or [])
    for source, layer in [*files, *typed]:
        try:
            merged.merge_with(layer)  # in place: `OmegaConf.merge` copies all of it each time
        except ConfigKeyError as err:
            prefix = str(err.full_key).removesuffix(str(err.key))
            known = [f"{prefix}{key}" for key in err.parent_node.keys()]  # type: ignore[union-attr]
            raise InputError(f"{source}: unknown key {err.full_key!r}; {choices(err.full_key, known)}") from err
        except (OmegaConfBaseException, TypeError) as err:  # a list where a mapping belongs, and the other way round
            raise InputError(_wrong_type(source, layer, err)) from err
    source = files[-1][0] if files else "config"
    try:
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise InputError(f"{source}: no value for {', '.join(missing)}: give it as {missing[0]}=...")
        loaded: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as err:  # ${...} that leads nowhere
        raise InputError(f"{source}: {one_line(err)[:200]}") from err
    if hasattr(loaded, "check"):
        loaded.check()
    if hasattr(loaded, "check_given"):
        loaded.check_given([*(layer for _, layer in files), OmegaConf.merge({}, *(layer for _, layer in typed))])
    return loaded


def _wrong_type(source: str, layer: DictConfig, err: Exception) -> str:
    """What a file, or an override KEY=VALUE, has of a wrong type, and what is expected there."""
    said, key = str(err).splitlines()[0], getattr(err, "full_key", None)
    if section := re.search(r"is not a subclass of (\w+)Config", said):
        key = section[1].lower()
    where = source if not key or source.startswith(f"{key}=") else f"{source}: {key}={OmegaConf.select(layer, key)}"
    return f"{where}: " + next((f"{right} is expected" for sign, right in EXPECTED.items() if sign in said), said)


def _layers(path: Any, schema: type) -> list[tuple[str, DictConfig]]:
    if path is None:
        return []
    if not isinstance(path, str | Path):
        name = schema.__name__.removesuffix("Config").lower()
        if dataclasses.is_dataclass(path):
            return [(name, OmegaConf.structured(path))]
        if not isinstance(path, dict | DictConfig):
            raise InputError(f"{name}={path!r}: a mapping of keys to values is expected")
        return [(name, OmegaConf.create(path))]
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
