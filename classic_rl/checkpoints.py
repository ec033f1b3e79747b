"""Checkpoints of a PPO training, from which it is resumed as if it had never stopped.

A checkpoint is a folder `checkpoints/<environment steps>` with safetensors and one JSON file. It is written beside its
place and renamed into it at the end, so that a folder with that name is whole, whenever the program was killed.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tieback.classic_rl.rollout import Collector
from tieback.classic_rl.weights import load_weights, save_weights
from tieback.cli.errors import UsageError
from tieback.cli.results import write_json

_KEPT = 2


def save_checkpoint(
    folder: Path,
    steps: int,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    collector: Collector,
    progress: dict[str, Any],
) -> None:
    """Write `folder`/checkpoints/`steps`, and remove all but the newest two.

    Args:
        folder: of the run.
        steps: environment steps so far.
        policy, optimizer, collector: what to keep, with the state of PyTorch's random numbers.
        progress: what the task keeps besides, as JSON.
    """
    place = folder / "checkpoints" / f"{steps:012d}"
    draft = place.with_name(place.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_weights(draft / "policy.safetensors", policy.state_dict())
    save_weights(draft / "optimizer.safetensors", dict(_flatten(optimizer.state_dict()["state"])))
    recorded = collector.state_dict()
    random_states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_states["cuda"] = torch.cuda.get_rng_state()
    save_weights(draft / "environment.safetensors", {"moves": recorded.pop("moves"), **random_states})
    write_json(draft / "state.json", {"steps": steps, "collector": recorded, "progress": progress})
    shutil.rmtree(place, ignore_errors=True)
    draft.rename(place)
    for old in list_checkpoints(folder)[:-_KEPT]:
        shutil.rmtree(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in (folder / "checkpoints").glob("*") if path.name.isdigit())


def load_checkpoint(
    folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, collector: Collector
) -> tuple[int, dict[str, Any]]:
    """Bring everything to where the newest checkpoint of a run left it.

    The environments get there by playing the recorded moves again.

    Returns:
        Environment steps so far, and the `progress` that was saved.

    Raises:
        UsageError: there is no checkpoint, or a file of it cannot be read.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise UsageError(f"{folder} has no checkpoint to resume from: start without --resume.")
    place = checkpoints[-1]
    try:
        state = json.loads((place / "state.json").read_text())
        policy.load_state_dict(load_weights(place / "policy.safetensors"))
        moments = load_weights(place / "optimizer.safetensors")
        environment = load_weights(place / "environment.safetensors")
    except (OSError, json.JSONDecodeError, RuntimeError) as error:
        raise UsageError(f"{place} is torn ({error}): remove it to resume from the one before.") from error
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.load_state_dict(
        {"state": _unflatten(moments, parameters), "param_groups": optimizer.state_dict()["param_groups"]}
    )
    collector.load_state_dict({**state["collector"], "moves": environment["moves"]})
    torch.set_rng_state(environment["cpu"])
    if torch.cuda.is_available() and "cuda" in environment:
        torch.cuda.set_rng_state(environment["cuda"])
    return int(state["steps"]), state["progress"]


def _flatten(state: dict[int, dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Adam's moments by name: parameter number and moment."""
    for number, moments in state.items():
        for name, tensor in moments.items():
            yield f"{number}.{name}", tensor


def _unflatten(tensors: dict[str, Tensor], parameters: list[Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".", 1)
        parameter = parameters[int(number)]
        if tensor.shape == parameter.shape:
            # A fused step goes through memory, so a moment must lie there as its parameter does (channels last).
            tensor = torch.empty_like(parameter, device="cpu").copy_(tensor)
        state.setdefault(int(number), {})[name] = tensor
    return state
