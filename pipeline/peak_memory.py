"""The most memory that this process has held."""

import sys
from pathlib import Path

import psutil
import torch


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: allocated on the accelerator, or resident in the process where the device is a CPU."""
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated())
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not getrusage here: Linux counts what the process that started this one held, too.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
