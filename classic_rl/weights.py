"""Weights on disk, as safetensors."""

import os
from collections.abc import Mapping
from pathlib import Path

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
