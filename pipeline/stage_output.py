"""What every stage leaves and says at its end: metrics.json, one table, and no walls of library warnings."""

import json
import logging
import math
import os
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from rich.console import Console
from rich.table import Table

from tieback.pipeline.arguments import UsageError


def quiet_libraries() -> None:
    """Let libraries speak of errors alone, and leave the bars to training and generation.

    TRANSFORMERS_VERBOSITY, where set, is respected and everything is left as it is.
    """
    if "TRANSFORMERS_VERBOSITY" in os.environ:
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for library in ("accelerate", "trl", "peft"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


def choose_device() -> PartialState:
    """This process among those that `accelerate launch` started; on the CPU where the machine has no accelerator.

    Accelerate 1.15 does not tell the processes of a `MULTI_GPU` configuration that `use_cpu` is set, and without that
    they do not find each other. Call it before anything else asks for the device.
    """
    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def finish_stage(
    stage: str, output_dir: str | Path, metrics: dict[str, float], recipe: dict[str, Any]
) -> None:
    """Write `metrics.json` and `settings.json` into `output_dir` and print a table, on the main process only.

    `recipe` is what the recipe and the command line set.
    """
    if not PartialState().is_main_process:
        return
    # A pickle that Trainer leaves beside a model; the settings stand in the recipe.
    (Path(output_dir) / "training_args.bin").unlink(missing_ok=True)
    settings = json.dumps(recipe, indent=2, ensure_ascii=False, default=str)
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    Path(output_dir, "settings.json").write_text(settings + "\n", encoding="utf-8")
    write_metrics(output_dir, metrics)
    table = Table("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
    console = Console()
    console.print(f"{stage} → {output_dir}", soft_wrap=True)
    console.print(table)


def write_metrics(output_dir: str | Path, metrics: dict[str, float]) -> None:
    """Write metrics.json whole or not at all: its presence says that the stage came to its end.

    Raises:
        ValueError: a value is not a finite number.
    """
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"metrics.json holds finite numbers only, but `{name}` is {value!r}.")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / "metrics.json.tmp"
    draft.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    draft.replace(folder / "metrics.json")


def checkpoint_to_resume(output_dir: str | Path, resume: str | None) -> str | None:
    """Folder that `--resume_from_checkpoint` means: the one named, or for "true" the newest whole one.

    The Trainer writes `trainer_state.json` last, so a checkpoint without it was torn by a kill.

    Args:
        output_dir: where the stage keeps its `checkpoint-<step>` folders.
        resume: as given on the command line; None or "false" starts afresh.

    Returns:
        The folder; None to start afresh, also where "true" finds no whole checkpoint.

    Raises:
        UsageError: the folder named is missing or torn.
    """
    if resume is None or resume.lower() == "false":
        return None
    if resume.lower() == "true":
        whole = [path.parent for path in Path(output_dir).glob("checkpoint-*/trainer_state.json")]
        return str(max(whole, key=lambda folder: int(folder.name.split("-")[-1]))) if whole else None
    if not (Path(resume) / "trainer_state.json").is_file():
        raise UsageError(
            f"--resume_from_checkpoint {resume}: no whole checkpoint there (trainer_state.json is missing)."
        )
    return resume
