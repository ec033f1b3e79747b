"""Weights as safetensors, the trackers of a task, and a check of its settings."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from tieback.cli.errors import UsageError


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict as safetensors, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, temporary)
    os.replace(temporary, path)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read what `save_weights` wrote, onto the CPU.

    Raises:
        UsageError: there is no such file, or it is torn.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file. Train first, or name the folder that a training wrote.")
    try:
        return load_file(path)
    except Exception as error:
        raise UsageError(f"{path} cannot be read as safetensors ({error}): the file is torn.") from error


def require_positive(settings: Any, *names: str) -> None:
    """Refuse settings below 1.

    Raises:
        UsageError: names the first of them.
    """
    for name in names:
        if getattr(settings, name) < 1:
            raise UsageError(f"{name} must be at least 1, but is {getattr(settings, name)}.")


def tracking_accelerator(report_to: str, folder: Path, use_cpu: bool, bf16: bool = False) -> Accelerator:
    """An `Accelerator` that logs into `folder` by the tracker `report_to`, or nowhere for "none"."""
    accelerator = Accelerator(
        cpu=use_cpu,
        mixed_precision="bf16" if bf16 else "no",
        log_with=None if report_to == "none" else report_to,
        project_dir=str(folder),
    )
    accelerator.init_trackers("logs")
    return accelerator
