"""What a checkpoint of a PPO run holds, and which checkpoints are whole.

A checkpoint is a folder `checkpoint-N` after iteration N: the policy as a stock model (or adapter), the critic in
`value_model/`, optimiser, schedule, random states and the Trainer's state. `ppo_state.json` is written last, in one
step, when every process has written its part, and lists all files: a folder without it was torn by a kill, one that
lacks a listed file was copied in part, and neither is resumed from.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from tieback.cli.errors import UsageError
from tieback.pipeline.trainer.actor_critic import ActorCritic

STATE_FILE = "ppo_state.json"
VALUE_MODEL = "value_model"


class CheckpointError(UsageError):
    """A checkpoint cannot be resumed from."""


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """Whole checkpoints in `output_dir`, oldest first."""
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if number and (folder / STATE_FILE).is_file():
            found.append((int(number[1]), folder))
    return [folder for _, folder in sorted(found)]


def resolve_checkpoint(output_dir: str | Path, resume: bool | str | None) -> str | None:
    """Folder to resume from: the one named, or for True the newest whole one (None where there is none).

    Raises:
        CheckpointError: the folder named is missing or torn, or a file of a checkpoint is.
    """
    if not resume:
        return None
    if resume is True:
        whole = complete_checkpoints(output_dir)
        if not whole:
            return None
        resume = str(whole[-1])
    if not (Path(resume) / STATE_FILE).is_file():
        others = ", ".join(folder.name for folder in complete_checkpoints(Path(resume).parent)) or "none"
        raise CheckpointError(
            f"{resume} is not a whole checkpoint of a PPO run: it lacks {STATE_FILE}, which is written last "
            f"(and not at all with save_only_model). Whole ones beside it: {others}."
        )
    _check_files(Path(resume))
    return str(resume)


def _check_files(folder: Path) -> None:
    for name, size in read_state(folder)["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            fault = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(
                f"{folder} is damaged: {name} {fault}. Delete that folder and resume from the checkpoint before it."
            )


def clear_state(folder: str | Path) -> None:
    """Take the mark of a whole checkpoint off a folder that is about to be written anew."""
    (Path(folder) / STATE_FILE).unlink(missing_ok=True)


def write_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Write `ppo_state.json`, which marks the checkpoint as whole, with the name and size of every file in it."""
    folder = Path(folder)
    draft = folder / f"{STATE_FILE}.tmp"
    draft.unlink(missing_ok=True)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    draft.write_text(json.dumps({**state, "files": files}, indent=2))
    os.replace(draft, folder / STATE_FILE)


def read_state(folder: str | Path) -> dict[str, Any]:
    """Read `ppo_state.json`."""
    state: dict[str, Any] = json.loads((Path(folder) / STATE_FILE).read_text())
    return state


def save_models(actor_critic: ActorCritic, folder: str, state_dict: dict[str, Tensor] | None) -> None:
    """Write the policy into `folder`, loadable by itself, and the critic into `folder/value_model`.

    Args:
        actor_critic: unwrapped.
        folder: made where missing.
        state_dict: gathered weights of the whole actor-critic where they are sharded (FSDP, ZeRO-3).
    """
    policy, critic = actor_critic.policy, actor_critic.critic
    adapter: dict[str, Any] = {"selected_adapters": ["default"]} if isinstance(policy, PeftModel) else {}
    policy.save_pretrained(folder, state_dict=_part(state_dict, "policy."), **adapter)
    critic.save_pretrained(os.path.join(folder, VALUE_MODEL), state_dict=_part(state_dict, "critic."))


def load_models(actor_critic: ActorCritic, folder: str) -> None:
    """Load what `save_models` wrote into the models that are there.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        policy = actor_critic.policy
        if isinstance(policy, PeftModel):
            set_peft_model_state_dict(policy, load_peft_weights(folder), adapter_name="default")
        else:
            _copy_weights(policy, folder)
        _copy_weights(actor_critic.critic, os.path.join(folder, VALUE_MODEL))
    except (
        Exception
    ) as error:  # safetensors, JSON and shape errors all mean the same to the person who resumes
        raise CheckpointError(
            f"The weights in {folder} cannot be loaded ({type(error).__name__}: {error}). Delete that folder and "
            "resume from the checkpoint before it."
        ) from error


def _copy_weights(model: nn.Module, folder: str) -> None:
    assert isinstance(model, PreTrainedModel)
    saved = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())


def _part(state_dict: dict[str, Tensor] | None, prefix: str) -> dict[str, Tensor] | None:
    if state_dict is None:
        return None
    return {
        name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)
    }
