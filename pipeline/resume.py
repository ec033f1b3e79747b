"""The checkpoint that a training stage goes on from, and what may have changed since it was written."""

import functools
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

from tieback.cli.arguments import nearest
from tieback.cli.errors import UsageError
from tieback.cli.results import METRICS, changed_settings, write_json

if TYPE_CHECKING:
    # It loads all that a run needs, and the settings here are part of a program's help.
    from transformers import Trainer

# What Trainer writes last: a checkpoint without it was torn by a kill.
TRAINER_STATE = "trainer_state.json"
SETTINGS = "settings.json"

# Settings that may change between a run and its continuation. What is learnt from a batch does not depend on them,
# but for rounding.
FREE = frozenset(
    {
        # Names and places. What lies there is compared by its content.
        *("run_dir", "output_dir", "config", "resume_from_checkpoint", "resume_with_changes"),
        *("model_name_or_path", "dataset_name"),
        # The end, and so the length of the schedule.
        *("max_steps", "num_train_epochs"),
        # What is shown.
        *("logging_dir", "logging_steps", "logging_strategy", "logging_first_step", "logging_nan_inf_filter"),
        *(
            "log_level",
            "log_level_replica",
            "log_on_each_node",
            "log_completions",
            "num_completions_to_print",
        ),
        *("report_to", "run_name", "project", "disable_tqdm", "include_num_input_tokens_seen"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("skip_memory_metrics", "debug"),
        # What is saved.
        *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
        *("enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id"),
        *("hub_strategy", "hub_always_push", "hub_revision"),
        # Evaluation.
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
        *(
            "prediction_loss_only",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "eval_accumulation_steps",
        ),
        *("include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "early_stopping_patience"),
        *("judge_funcs", "rollout_dir", "rollout_timeout"),
        *("do_train", "do_eval", "do_predict"),
        # Where and how it is computed; the batch of all processes together, the
        # precision and the backend are compared.
        *("use_cpu", "local_rank", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("bf16", "fp16"),
        *(
            "micro_batch_size",
            "replicate_frozen_models",
            "vllm_gpu_memory_utilization",
            "check_sampling",
            "gradient_checkpointing",
            "gradient_checkpointing_kwargs",
        ),
        *("activation_checkpointing", "activation_checkpointing_kwargs", "torch_empty_cache_steps"),
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        *("ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "parallelism_config"),
        "restore_callback_states_from_checkpoint",
    }
)
# Settings that the optimiser's state in a checkpoint is bound to.
FIXED = frozenset({"optim", "optim_args", "optim_target_modules", "backend"})
# Schedules whose learning rate is no function of the step, but a state of its own.
_STATEFUL_SCHEDULES = frozenset({"reduce_lr_on_plateau", "greedy"})
_RATES = frozenset({"learning_rate", "critic_learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"})


@dataclass
class ResumeSettings:
    """What may change where a run is resumed."""

    resume_with_changes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Settings and inputs (model, train_dataset, ...; for ppo the arguments of PPOTrainer) that may differ from those of the run that is resumed, which refuses any other difference. What is named takes effect from the first step on: a learning rate, say, in the place of the one that the checkpoint holds, and seed by sampling anew. The policy and the critic go on from the checkpoint in any case; model changes the reference of the KL penalty."
        },
    )


def whole_checkpoints(output_dir: str | Path, mark: str = TRAINER_STATE) -> list[Path]:
    """Folders `checkpoint-<n>` in which `mark`, the file that is written last, is there and whole, oldest first."""
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if number and _is_whole(folder / mark):
            found.append((int(number[1]), folder))
    return [folder for _, folder in sorted(found)]


def _is_whole(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def checkpoint_to_resume(
    output_dir: str | Path,
    asked: str | None,
    settings: dict[str, Any],
    check: Callable[[Path], object],
    mark: str = TRAINER_STATE,
) -> str | None:
    """Folder to go on from, and a clean output folder where the stage starts anew.

    Where nothing is asked, a stage that did not come to its end (its folder has checkpoints and no metrics.json) goes on
    from its newest whole checkpoint. Where it starts anew, checkpoints of the run before are removed, and the weights of
    one that came to its end, so that they are not taken for its own. The settings are written down once it is sure that the stage runs with them. All processes
    must call.

    Args:
        output_dir: where the stage keeps its checkpoints.
        asked: `--resume_from_checkpoint`: a folder, "true" (the newest whole one), "false" (start anew), or None.
        settings: what the recipe and the command line set, with digests of what the stage starts from.
        check: raises a UsageError where the run cannot go on from a checkpoint, for what changed since.
        mark: file of a checkpoint that is written last.

    Returns:
        The folder; None to start anew.

    Raises:
        UsageError: the folder asked for is missing or torn, or what `check` raises.
    """
    state, folder = PartialState(), Path(output_dir)
    whole = whole_checkpoints(folder, mark)
    resume: Path | None = None
    if asked is None:
        if whole and not (folder / METRICS).exists():
            resume = whole[-1]
    elif asked.lower() == "true":
        resume = whole[-1] if whole else None
    elif asked.lower() != "false":
        resume = Path(asked)
        if not _is_whole(resume / mark):
            others = ", ".join(path.name for path in whole_checkpoints(resume.parent, mark)) or "none"
            raise UsageError(
                f"--resume_from_checkpoint {asked}: no whole checkpoint is there ({mark} is missing or torn). Whole ones "
                f"beside it: {others}."
            )
    if resume is not None:
        check(resume)
        if asked is None:
            state.print(
                f"Going on from {resume}, where this run was interrupted (--resume_from_checkpoint false starts anew)."
            )

    state.wait_for_everyone()  # every process has seen the same files
    if state.is_main_process:
        if resume is None and whole:
            print(f"Removing the checkpoints of the run before this one in {folder}.")
            for path in folder.glob("checkpoint-*"):
                shutil.rmtree(path)
        if resume is None and (folder / METRICS).exists():
            _remove_weights(folder)
        # Only now: where a kill left checkpoints without it, they would be taken for those of an interrupted run.
        (folder / METRICS).unlink(missing_ok=True)
        write_json(folder / SETTINGS, as_json(settings))
    state.wait_for_everyone()
    return None if resume is None else str(resume)


def _remove_weights(folder: Path) -> None:
    """Remove what a finished run of other settings may have left and this one may not write, such as an adapter."""
    for pattern in ("*.safetensors", "*.safetensors.index.json", "adapter_config.json"):
        for path in folder.glob(pattern):
            path.unlink()
    for name in ("adapter", "value_model"):
        shutil.rmtree(folder / name, ignore_errors=True)


def settings_check(settings: dict[str, Any], allowed: Collection[str] | None) -> Callable[[Path], object]:
    """A `check` for `checkpoint_to_resume`: the settings.json beside a checkpoint against `settings`.

    Args:
        settings: of this start.
        allowed: `resume_with_changes`.
    """
    return functools.partial(_check_settings, settings, allowed)


def _check_settings(settings: dict[str, Any], allowed: Collection[str] | None, checkpoint: Path) -> None:
    path = checkpoint.parent / SETTINGS
    if path.is_file():
        check_changes(checkpoint.parent, json.loads(path.read_text(encoding="utf-8")), settings, allowed)


def check_changes(
    run: Path, before: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str] | None
) -> dict[str, str]:
    """What differs between a run and its continuation, where all of it is named.

    Args:
        run: folder of the run, for messages.
        before: settings and digests that the run was started with.
        now: those of the continuation.
        allowed: `resume_with_changes`.

    Returns:
        For each name that differs, what it was and what it is.

    Raises:
        UsageError: something else differs, something that the checkpoint is bound to, or a name is unknown.
    """
    allowed, now = set(allowed or ()), as_json(now)
    known = before.keys() | now.keys() | FREE
    unknown = sorted(allowed - known)
    if unknown:
        raise UsageError(
            f"resume_with_changes: nothing is called `{unknown[0]}`.{nearest(unknown[0], known)}"
        )
    changed = changed_settings(before, now, FREE)
    schedules = {settings.get("lr_scheduler_type") for settings in (before, now)}
    bound = sorted(changed.keys() & (FIXED | _RATES if schedules & _STATEFUL_SCHEDULES else FIXED))
    if bound:
        raise UsageError(
            f"The run in {run} cannot go on with this: {'; '.join(changed[name] for name in bound)}. The state of the optimiser "
            "and its schedule in a checkpoint is bound to it. Give what it was, or start anew (--resume_from_checkpoint false)."
        )
    refused = [name for name in changed if name not in allowed]
    if refused:
        raise UsageError(
            f"The run in {run} was started with other settings ({'; '.join(changed[name] for name in refused)}). Give the same "
            f"ones to go on; or name what is to change from here on with --resume_with_changes {' '.join(refused)}; or "
            "start anew with --resume_from_checkpoint false."
        )
    return changed


def launch_settings(trainer: "Trainer") -> dict[str, Any]:
    """What launcher and settings together decide: the batch of all processes, precision, and the form of checkpoints."""
    args, accelerator = trainer.args, trainer.accelerator
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return {
        "global_batch_size": sequences * accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "backend": backend_name(accelerator),
    }


def backend_name(accelerator: Accelerator) -> str:
    """Give "zero<stage>", "fsdp<version>", or "replicated" where every process holds the whole model."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return f"fsdp{accelerator.state.fsdp_plugin.fsdp_version}"
    return "replicated"


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from a file."""
    read: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return read
