"""Ctrl-C and SIGTERM as a request to stop at the next good moment."""

import signal
from types import FrameType
from typing import Any


class Interruption:
    """Turns the first ctrl-C (or SIGTERM) within a `with` block into a flag; the second one ends the program as usual.

    Attributes:
        requested: whether there was one.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "Interruption":
        self._before = {name: signal.signal(name, self._handle) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        for name, handler in self._before.items():
            signal.signal(name, handler)
