"""Seconds of the phases of an iteration, tokens a second, and the most memory that was held."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from tieback.pipeline.peak_memory import peak_memory


class PhaseTimes:
    """Clock of one iteration; on an accelerator it waits for the device at both ends of a phase.

    Args:
        accelerator: of the training.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._seconds: dict[str, float] = {}
        # Sampled by this process in the iteration.
        self.tokens = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs within; of several such blocks the seconds are added up."""
        started = self._now()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - started

    def figures(self) -> dict[str, float]:
        """`time/<phase>`, `tokens_per_second` and `memory/peak`, over all processes, all of which must call.

        Returns:
            Seconds, and the memory in MiB, of the process that needed most; the tokens of all together.
        """
        own = torch.tensor(
            [
                *self._seconds.values(),
                sum(self._seconds.values()),
                peak_memory(self.accelerator.device) / 2**20,
            ],
            dtype=torch.float32,
            device=self.accelerator.device,
        )
        tokens = torch.tensor(float(self.tokens), device=self.accelerator.device)
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
