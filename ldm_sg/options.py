"""How a dataclass says what a verb takes: each option once, its help beside it. The command line makes its arguments and flags
of the fields, so whatever holds such a class is imported by `--help`, and leaves torch to its methods."""

from collections.abc import Callable
from dataclasses import MISSING, field
from typing import Any

from ldm_sg.errors import InputError

DEVICE = "auto, cpu, cuda, mps."
CHECKPOINT = "Step whose EMA weights the run keeps (keep_every=), or best: by fd. Default: its pipeline."
EXECUTOR = "local, or ray."
ADDRESS = "Of a Ray cluster, ray://HOST:PORT; default $RAY_ADDRESS, or none."


def argument(help: str, default: Any = MISSING) -> Any:
    """What is typed without a flag."""
    return field(default=default, metadata={"help": help})


def option(default: Any, help: str, *flags: str, parse: Callable[[str, Any], Any] | None = None) -> Any:
    """What is typed behind `flags`, where it is more than --NAME; MISSING: must be. `parse` (flag, typed) -> the value."""
    how = {"help": help, "flags": flags, "parse": parse}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=how)
    return field(default=default, metadata=how)


def numbers(flag: str, text: str, kind: type = float) -> list[Any]:
    """'0,1,2' -> [0.0, 1.0, 2.0]; 'x' does for a comma."""
    try:
        return [kind(part) for part in text.replace("x", ",").split(",")]
    except ValueError as err:
        raise InputError(f"{flag} {text!r}: write numbers with commas between, for example 0,1,2,3") from err
