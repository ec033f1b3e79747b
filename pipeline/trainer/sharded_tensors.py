"""Weights and optimiser states that are sharded (FSDP 2, DeepSpeed ZeRO-3): gathered, copied, saved and loaded.

On tensors that are whole each function does what its plain counterpart would.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel


@contextmanager
def gathered(parameters: Iterable[Tensor], modifier_rank: int | None = None) -> Iterator[None]:
    """Parameters whole on each process, where ZeRO-3 holds them in parts.

    Args:
        parameters: any; buffers are whole as they are.
        modifier_rank: the process whose changes all others take over; None where nothing is changed.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=modifier_rank):
        yield


def copy_model(model: PreTrainedModel, whole: bool = False) -> PreTrainedModel:
    """A copy, sharded as the model is, of which no more than one parameter is whole at any time.

    Args:
        model: to copy.
        whole: hold the copy whole on each process instead.
    """
    copied = copy.deepcopy(model)
    for source, target in zip(model.parameters(), copied.parameters(), strict=True):
        if hasattr(source, "ds_id"):
            with gathered([source]):
                target.data = source.data.clone()
            if not whole:
                source.convert_to_zero_parameters(param_list=[target])
    return copied


def split_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that every process has whole, split as FSDP 2 has split a parameter, if it has."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(
        whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def load_into(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved tensors, whole, into those of a `state_dict`, which may be split.

    Raises:
        KeyError: the two do not name the same tensors.
    """
    if own.keys() != saved.keys():
        raise KeyError(f"tensors of another model: {sorted(own.keys() ^ saved.keys())}")
    for name, tensor in own.items():
        tensor.copy_(split_like(saved[name], tensor))


def whole_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """`optimizer.state_dict()` with every tensor whole on the CPU, as one process would have it. All processes must call."""
    state = optimizer.state_dict()

    def whole(value: Any) -> Any:
        return value.full_tensor().cpu() if isinstance(value, DTensor) else value

    entries = {
        number: {name: whole(value) for name, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": entries}


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load what `whole_optimizer_state` gave. A parameter that was never trained has no entry, and gets none."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def split(number: int, value: Any) -> Any:
        parameter = parameters[number]
        same_shape = isinstance(value, Tensor) and value.shape == parameter.shape
        return split_like(value, parameter) if same_shape else value

    entries = {
        number: {name: split(number, value) for name, value in entry.items()}
        for number, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy all parameters and buffers of a module into another of the same architecture; either may be sharded."""
    for name, parameter in source.named_parameters():
        other = target.get_parameter(name)
        with torch.no_grad(), gathered([parameter, other], modifier_rank=0):
            other.copy_(parameter)
    for name, buffer in source.named_buffers():
        target.get_buffer(name).copy_(buffer)
