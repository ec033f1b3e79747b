"""What makes a run the one that it is: its settings and digests of its inputs, which a checkpoint holds and resuming compares."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from tieback.cli.errors import UsageError
from tieback.pipeline.digests import (
    rows_digest,
    text_digest,
    tokenizer_digest,
    weights_digest,
)
from tieback.pipeline.resume import FREE, as_json, check_changes, launch_settings
from tieback.pipeline.scorers import Scorer
from tieback.pipeline.trainer.module_digest import module_digest
from tieback.reward_model.adapter import ScalarAdapter
from tieback.reward_model.scoring import RewardScorer


class Identity(TypedDict):
    """Settings and digests that a checkpoint was written under, and the number of processes that wrote it."""

    settings: dict[str, Any]
    inputs: dict[str, Any]
    processes: int


def input_digests(
    model: nn.Module,
    value_model: PreTrainedModel | PeftModel | ScalarAdapter | str | None,
    scorers: Sequence[Scorer],
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset | None,
    peft_config: PeftConfig | None,
    ptx_dataset: Dataset | None = None,
    rollout_func: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Digests of what a trainer was given, by the names of its arguments. All processes must call, before training.

    The critic's head is left out, which may be a new and random one at each start: a resumed run takes the critic's
    weights from the checkpoint. A reward function counts by its qualified name alone.

    Args:
        model: the policy at the start, which is also the reference.
        value_model: the critic at the start; None where it is made from the policy.
        scorers: reward functions and reward models.
        tokenizer: the policy's.
        train_dataset: prompt rows.
        peft_config: of a new adapter.
        ptx_dataset: texts that are imitated.
        rollout_func: what samples in the trainer's place; like a reward function, it counts by its name.
    """
    rewards = [_scorer_digest(scorer) for scorer in scorers]
    inputs = {
        "model": module_digest(model),
        "value_model": _critic_digest(value_model, scorers, rewards),
        "reward_funcs": rewards,
        "processing_class": tokenizer_digest(tokenizer),
        "train_dataset": None if train_dataset is None else rows_digest(train_dataset),
        "peft_config": None if peft_config is None else _adapter_settings(peft_config),
        "ptx_dataset": None if ptx_dataset is None else rows_digest(ptx_dataset),
        "rollout_func": None if rollout_func is None else _qualified_name(rollout_func),
    }
    return dict(broadcast_object_list([inputs])[0])


def run_identity(trainer: Trainer, inputs: dict[str, Any]) -> Identity:
    """The identity of a run as it is started now.

    Args:
        trainer: with its arguments and accelerator.
        inputs: from `input_digests`.
    """
    settings = {name: value for name, value in trainer.args.to_dict().items() if name not in FREE}
    if settings["data_seed"] == settings["seed"]:
        settings["data_seed"] = None  # as it is where only `seed` is set
    settings |= launch_settings(trainer)
    if settings["backend"].startswith("fsdp"):
        settings["backend"] = "replicated"  # whose checkpoints have the same files
    return {
        "settings": as_json(settings),
        "inputs": as_json(inputs),
        "processes": trainer.accelerator.num_processes,
    }


def compare_identities(folder: Path, before: Identity, trainer: Trainer, inputs: dict[str, Any]) -> list[str]:
    """Names of what has changed since a checkpoint was written, all of which `resume_with_changes` allows.

    Args:
        folder: the checkpoint.
        before: its identity.
        trainer: that is to go on from it.
        inputs: of that trainer.

    Raises:
        UsageError: something has changed that must not, or the number of processes does not fit.
    """
    now = run_identity(trainer, inputs)
    allowed = trainer.args.resume_with_changes
    _check_processes(folder, before, now, allowed or [])
    # A setting that only one of them has is one that a new version brought or took.
    shared = before["settings"].keys() & now["settings"].keys()
    old, new = (
        {name: identity["settings"][name] for name in shared} | identity["inputs"]
        for identity in (before, now)
    )
    return sorted(check_changes(folder.parent, old, new, allowed))


def seed_of_process(seed: int, step: int, process: int) -> int:
    """A seed, from 0 to 2³² − 1, that no other step or process of a run has."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {process}".encode()).digest()[:4])


def _check_processes(folder: Path, before: Identity, now: Identity, allowed: Sequence[str]) -> None:
    old, new = before["processes"], now["processes"]
    backend = now["settings"]["backend"]
    if old == new:
        return
    if backend.startswith("zero") and backend == before["settings"]["backend"]:
        raise UsageError(
            f"{folder}: the number of processes was {old}, is {new}. DeepSpeed has written the optimiser's state in {old} "
            f"parts, one a process: start {old} again, or start anew (--resume_from_checkpoint false)."
        )
    rows, rows_now = before["settings"]["global_batch_size"], now["settings"]["global_batch_size"]
    if rows != rows_now and "global_batch_size" not in allowed:
        remedy = (
            f"Set per_device_train_batch_size to {rows // new}."
            if rows % new == 0
            else f"{rows} do not divide among {new} processes: start another number."
        )
        raise UsageError(
            f"{folder}: the number of processes was {old}, is {new}. With per_device_train_batch_size={rows_now // new} an "
            f"iteration would have {rows_now} completions in the place of {rows}, and the run would be another. {remedy}"
        )


def _scorer_digest(scorer: Scorer) -> str:
    if isinstance(scorer, RewardScorer) and isinstance(scorer.model, ScalarAdapter):
        return text_digest(weights_digest(scorer.model.source), tokenizer_digest(scorer.tokenizer))
    if isinstance(scorer, RewardScorer):
        parts = (module_digest(scorer.model), tokenizer_digest(scorer.tokenizer), str(scorer.max_length))
        return text_digest(*parts)
    return _qualified_name(scorer)


def _qualified_name(called: Callable[..., Any]) -> str:
    function = called.func if isinstance(called, functools.partial) else called
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def _critic_digest(
    value_model: PreTrainedModel | PeftModel | ScalarAdapter | str | None,
    scorers: Sequence[Scorer],
    rewards: Sequence[str],
) -> str:
    if value_model is None:
        return "of the policy"
    if isinstance(value_model, ScalarAdapter):
        return weights_digest(value_model.source)
    if isinstance(value_model, str):
        return weights_digest(value_model)
    for scorer, digest in zip(scorers, rewards, strict=True):
        if isinstance(scorer, RewardScorer) and scorer.model is value_model:
            return digest
    return module_digest(value_model.base_model)


def _adapter_settings(peft_config: PeftConfig) -> dict[str, Any]:
    settings = {name: value for name, value in peft_config.to_dict().items() if value is not None}
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in settings.items()
        if name != "base_model_name_or_path"
    }
