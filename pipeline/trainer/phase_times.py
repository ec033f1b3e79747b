"""Seconds of the phases of an iteration, tokens a second, and the most memory that was held."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator


class PhaseTimes:
    """Clock of one iteration; on an accelerator it waits for the device at both ends of a phase.

    Args:
        accelerator: of the training.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs within; of several such blocks the seconds are added up."""
        started = self._now()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - started

    def figures(self, num_tokens: int) -> dict[str, float]:
        """`time/<phase>`, `tokens_per_second` and `memory/peak`, over all processes, all of which must call.

        Args:
            num_tokens: sampled by this process in the iteration.

        Returns:
            Seconds, and the memory in MiB, of the process that needed most; the tokens of all together.
        """
        own = torch.tensor(
            [*self._seconds.values(), sum(self._seconds.values()), self._peak_memory() / 2**20],
            dtype=torch.float32,
            device=self.accelerator.device,
        )
        tokens = torch.tensor(float(num_tokens), device=self.accelerator.device)
        *seconds, total, memory = self.accelerator.reduce(own, "max").tolist()
        return {
            **{f"time/{name}": value for name, value in zip(self._seconds, seconds, strict=True)},
            "tokens_per_second": self.accelerator.reduce(tokens, "sum").item() / total,
            "memory/peak": memory,
        }

    def _now(self) -> float:
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def _peak_memory(self) -> int:
        """Most bytes so far: allocated on the accelerator, or resident in the process."""
        if self.accelerator.device.type != "cpu":
            return int(torch.accelerator.max_memory_allocated())
        if sys.platform == "win32":
            return int(psutil.Process().memory_info().peak_wset)
        if sys.platform == "darwin":
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Not getrusage here: Linux counts what the process that started this one held, too.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
