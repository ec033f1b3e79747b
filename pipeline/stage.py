"""Beginning and end of every stage: quiet libraries; metrics.json, settings.json and a table."""

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate import PartialState

from tieback.cli.results import print_metrics, write_json, write_metrics
from tieback.pipeline.peak_memory import peak_memory


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


def finish_stage(
    stage: str, output_dir: str | Path, metrics: dict[str, float], recipe: dict[str, Any]
) -> None:
    """Write `settings.json` and `metrics.json` into `output_dir` and print a table, on the main process only.

    `recipe` is what the recipe and the command line set, with digests of the models that the stage started from.
    """
    if not PartialState().is_main_process:
        return
    folder = Path(output_dir)
    # A pickle that Trainer leaves beside a model; the settings stand in the recipe.
    (folder / "training_args.bin").unlink(missing_ok=True)
    write_json(folder / "settings.json", json.loads(json.dumps(recipe, default=str)))
    # PPO's own is of all processes; here it is that of the first.
    metrics = {
        **metrics,
        "memory/peak": metrics.get("memory/peak", peak_memory(PartialState().device) / 2**20),
    }
    write_metrics(folder, metrics)
    print_metrics(f"{stage} → {output_dir}", metrics)
