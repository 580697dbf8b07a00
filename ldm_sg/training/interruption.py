"""Ctrl-C, and the SIGTERM of clusters, between steps."""

import signal
from typing import Any


class Interruption:
    """Within `with`, SIGINT and SIGTERM are only `heard`, so that a step ends and is saved. A second one is obeyed at once."""

    heard = False

    def __enter__(self) -> "Interruption":
        self.previous = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        if self.heard:
            raise KeyboardInterrupt
        self.heard = True
