"""Beginning and end of every stage: quiet libraries; metrics.json, settings.json and a table."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate import PartialState

from tieback.cli.results import print_metrics, write_json, write_metrics


def begin_stage(stage: str) -> None:
    """Let libraries speak of errors alone, and warn of what does not work yet."""
    quiet_libraries()
    for warning in backend_warnings(stage, os.environ):
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {warning}", file=sys.stderr)


def backend_warnings(stage: str, environment: Mapping[str, str]) -> list[str]:
    """What does not train rightly yet with the backend that `accelerate launch` put into the environment."""
    warnings_ = []
    fsdp2 = environment.get("ACCELERATE_USE_FSDP") == "true" and environment.get("FSDP_VERSION") == "2"
    if stage == "ppo" and fsdp2 and environment.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        warnings_.append(
            "FSDP 2 in bf16 rounds the log-probabilities that PPO compares, so this run does not train rightly. Use "
            "accelerate_configs/multi_gpu.yaml or zero2.yaml, or --mixed_precision no."
        )
    zero3 = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    if stage in ("reward", "ppo", "evaluate") and zero3:
        warnings_.append(
            f"DeepSpeed ZeRO 3 does not work with the stage {stage} yet. Use accelerate_configs/zero2.yaml or "
            "multi_gpu.yaml."
        )
    return warnings_


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
    write_metrics(folder, metrics)
    print_metrics(f"{stage} → {output_dir}", metrics)
