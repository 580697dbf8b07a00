"""The one exception that means "the user's input is wrong"; the command line turns it into one line and exit code 2."""

import difflib
import math
import re
from collections.abc import Iterable
from importlib import import_module
from typing import Any


class InputError(ValueError):
    """Wrong input: the message names the value, where it is, and what would be right."""


def one_line(err: Exception) -> str:
    """What an exception says, for a message of ours: without colours."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", str(err)).split()) or type(err).__name__


def need_within(name: str, value: float, low: float, high: float = math.inf) -> None:
    """InputError where a number is not from `low` to `high`."""
    if not low <= value <= high:
        raise InputError(f"{name}={value}: " + (f"from {low:,} to {high:,}" if high < math.inf else f"at least {low}"))


def need_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """InputError where a value is none of the allowed; None among them, a default, is not offered."""
    if value not in (known := list(allowed)):
        raise InputError(f"{name}={value!r}; {choices(value, [each for each in known if each is not None])}")


def need_package(name: str, what: str, install: str) -> Any:
    """A module that not everybody has installed; InputError where it is missing, naming `what` needs it."""
    try:
        return import_module(name)
    except ImportError as err:
        raise InputError(f"{what} needs {name.partition('.')[0]}: pip install {install}") from err


def choices(value: object, allowed: Iterable[object]) -> str:
    """'; did you mean X?' when something allowed is close to `value`, otherwise the list of what is allowed."""
    names = sorted(str(a) for a in allowed)
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    return f"choose one of: {shown}"
