"""Random numbers that a part of a run draws without a trace in the rest of it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Within the block draw freely; after it Python, NumPy, PyTorch and the device stand where they stood before.

    Args:
        device: CPU or accelerator of this process.
    """
    accelerators = [] if device.type == "cpu" else [device]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(accelerators, device_type=device.type):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
