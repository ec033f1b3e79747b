"""Settings that are no numbers, and settings of Trainer that PPO cannot honour: refused when `PPOConfig` is made."""

import math
import os
from dataclasses import fields
from numbers import Integral, Real
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch

# Settings of Trainer whose other values would have no effect here, or a wrong one: the values that may be, and why.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "fp16": ((False,), "its loss scaler skips optimiser steps. Use bf16=True or fp32."),
    "gradient_accumulation_steps": (
        (1,),
        "one step is one PPO iteration. Leave it at 1 and set micro_batch_size, which bounds memory without changing "
        "results.",
    ),
    "dataloader_drop_last": ((True,), "every iteration has the same number of prompts."),
    "remove_unused_columns": ((False,), "reward functions read the columns."),
    "auto_find_batch_size": (
        (False,),
        "an iteration would lose completions. Set micro_batch_size, which bounds memory without changing results.",
    ),
    "train_sampling_strategy": (
        ("random", "sequential"),
        "it needs each row's `input_ids`, and a prompt has none yet. Choose random or sequential.",
    ),
    "neftune_noise_alpha": (
        (None,),
        "with noise in the embeddings the probability ratio is not 1 before the first step.",
    ),
    "label_smoothing_factor": ((0.0,), "PPO has no labels."),
    "use_liger_kernel": (
        (False,),
        "Trainer would not reach the policy inside the actor-critic. Apply the kernels to the model before you give "
        "it to PPOTrainer.",
    ),
    "bf16_full_eval": ((False,), "evaluation computes as training does. Set bf16=True."),
    "fp16_full_eval": ((False,), "evaluation computes as training does. Set bf16=True."),
    "prediction_loss_only": ((False,), "evaluation has no loss."),
}
# Beginnings or ends of the names of optimisers that step elsewhere than in step(), or must be told of evaluation.
OTHER_OPTIMIZERS = ("lomo", "adalomo", "schedule_free", "_layerwise")


def check_numbers(settings: Any) -> None:
    """Check that what a dataclass declares as a number or a truth value is one.

    Raises:
        ValueError: names the field.
    """
    hints = get_type_hints(type(settings))
    for item in fields(settings):
        declared = set(get_args(hints[item.name]) or (hints[item.name],))
        kinds = declared - {NoneType}
        value = getattr(settings, item.name)
        if value is item.default or (value is None and NoneType in declared):
            continue
        if kinds <= {int, float, bool} and not _is_one_of(value, kinds):
            wanted = "true or false" if bool in kinds else "a number" if float in kinds else "a whole number"
            raise ValueError(f"{item.name} must be {wanted}, but is {value!r}.")


def _is_one_of(value: Any, kinds: set[type]) -> bool:
    if isinstance(value, bool) or bool in kinds:
        return isinstance(value, bool) and bool in kinds
    if float in kinds:
        return isinstance(value, Real) and not math.isnan(value)
    return isinstance(value, Integral)


def check_launched(args: Any) -> None:
    """Check that sharding which the arguments ask for has processes to shard over.

    Raises:
        ValueError: this process was started by no launcher.
    """
    for name in ("deepspeed", "fsdp"):
        if getattr(args, name) and "WORLD_SIZE" not in os.environ:
            raise ValueError(
                f"{name} needs a launcher. Leave it out of the arguments and start with `accelerate launch "
                f"--config_file accelerate_configs/{'zero2' if name == 'deepspeed' else 'fsdp2'}.yaml`."
            )


def check_supported(args: Any) -> None:
    """Check settings of Trainer, as it has read them.

    Raises:
        ValueError: one cannot be honoured.
    """
    for name, (values, why) in ONLY.items():
        value = getattr(args, name)
        if value not in values:
            raise ValueError(f"{name}={value} is not supported: {why}")
    optimizer = args.optim.value
    if optimizer.startswith(OTHER_OPTIMIZERS) or optimizer.endswith(OTHER_OPTIMIZERS):
        raise ValueError(
            f"optim={optimizer} is not supported: it does not step where PPO does. Choose another, such as adamw_torch."
        )
    loader = args.accelerator_config
    if loader.split_batches or loader.dispatch_batches:
        raise ValueError(
            "accelerator_config: split_batches and dispatch_batches are not supported: each process draws "
            "its own prompts."
        )
    if (loader.gradient_accumulation_kwargs or {}).get("num_steps", 1) != 1:
        raise ValueError(
            "accelerator_config: num_steps is not supported: " + ONLY["gradient_accumulation_steps"][1]
        )


def check_available(args: Any) -> None:
    """Check that what the settings name is installed, and that the schedule can be made.

    Raises:
        ValueError: a tracker, the optimiser's library or an argument of the schedule is missing.
    """
    # Here, since they load all that a run needs: the settings alone are printed by --help.
    from transformers import Trainer, get_scheduler
    from transformers.integrations import (
        get_available_reporting_integrations,
        get_reporting_integration_callbacks,
    )

    get_reporting_integration_callbacks(args.report_to)
    installed = (
        *get_available_reporting_integrations(),
        "flyte",
        "azure_ml",
    )  # these two are not told rightly
    for tracker in args.report_to:
        if tracker not in installed:
            raise ValueError(
                f"report_to: {tracker} is not installed. Install it, or report to another tracker."
            )
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise ValueError(f"optim={args.optim.value}: {error}") from error
    except ValueError:
        pass  # those that ask for the model, which is not there yet
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 1000, args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs of lr_scheduler_type={args.lr_scheduler_type.value}: {error}"
        ) from error
