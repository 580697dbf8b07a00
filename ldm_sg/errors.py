"""The one exception that means "the user's input is wrong"; the command line turns it into one line and exit code 2."""

import difflib
import re
from collections.abc import Iterable


class InputError(ValueError):
    """Wrong input: the message names the value, where it is, and what would be right."""


def one_line(err: Exception) -> str:
    """What an exception says, for a message of ours: without colours."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", str(err)).split()) or type(err).__name__


def choices(value: object, allowed: Iterable[object]) -> str:
    """'; did you mean X?' when something allowed is close to `value`, otherwise the list of what is allowed."""
    names = sorted(str(a) for a in allowed)
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    return f"choose one of: {shown}"
