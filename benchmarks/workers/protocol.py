"""How a worker takes turns with others: a line on its input for each measured iteration, a line of JSON in reply."""

import json
import os
import resource
import sys
import time
from typing import Any

# What libraries print must not stand among the replies.
_REPLIES = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


class Turns:
    """The measured iterations of one worker.

    A worker calls `wait` before each iteration, and `done` after it; the process ends where there is no further turn.
    """

    def __init__(self) -> None:
        self._began: tuple[float, float] | None = None

    def wait(self) -> None:
        """Wait for the turn, and start the clocks."""
        if not sys.stdin.readline():
            os._exit(0)
        _reset_peak()
        self._began = (time.process_time(), time.perf_counter())

    def done(self, **figures: Any) -> None:
        """Stop the clocks and tell them, in seconds, with `memory`, the peak of resident memory in MiB."""
        assert self._began is not None
        cpu, wall = time.process_time() - self._began[0], time.perf_counter() - self._began[1]
        reply = {"cpu": cpu, "wall": wall, "memory": _peak_mib(), **figures}
        print(json.dumps(reply), file=_REPLIES, flush=True)


def resident_mib() -> float:
    """Resident memory of this process now, in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _peak_mib() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
