"""The folder a task writes into: its arguments, its figures, its weights."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor


class UsageError(Exception):
    """Settings or files that do not do; the message says what to change."""


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader, or a kill, finds the old file or the new one and nothing between."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def write_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Write `metrics.json`: flat, numbers only, named as in docs/glossary.md."""
    write_json(folder / "metrics.json", {name: float(value) for name, value in sorted(metrics.items())})


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


def print_metrics(title: str, metrics: Mapping[str, float]) -> None:
    """Print the figures as a table."""
    table = Table("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}")
    console = Console()
    console.print(title, soft_wrap=True)
    console.print(table)


def choose_device(use_cpu: bool) -> torch.device:
    """CUDA where there is one, unless told otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")


def exit_with(error: Exception) -> None:
    """End the program with a person's message instead of a traceback."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from error
