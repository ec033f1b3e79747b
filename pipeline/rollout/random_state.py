"""Random numbers that a part of a run draws without a trace in the rest of it."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


def random_state(device: torch.device) -> Callable[[], None]:
    """What brings Python, NumPy, PyTorch and the device back to where their random numbers stand now.

    Args:
        device: CPU or accelerator of this process.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    module = None if device.type == "cpu" else torch.get_device_module(device)
    device_state = None if module is None else module.get_rng_state(device)

    def restore() -> None:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if module is not None:
            module.set_rng_state(device_state, device)

    return restore


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Within the block draw freely; after it Python, NumPy, PyTorch and the device stand where they stood before.

    Args:
        device: CPU or accelerator of this process.
    """
    restore = random_state(device)
    try:
        yield
    finally:
        restore()
