"""Adapters of PEFT that take turns on one base: the policy's, the reference's, the critic's, a reward model's."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn


@contextmanager
def using_adapter(model: PeftModel, name: str | None) -> Iterator[None]:
    """Compute with another adapter (None: the bare base); which parameters are trained stays as it is.

    PEFT's own `set_adapter` and `disable_adapter` take `requires_grad` off all other adapters. Autograd then drops the
    gradients of one that was used before, in the same graph.
    """
    layers = _layers(model)
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def recomputation(
    model: PeftModel,
) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
    """A `context_fn` for gradient checkpointing: layers are recomputed with the adapter that they were computed with.

    The backward pass comes when another adapter is active.
    """
    layer = _layers(model)[0]

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        name = None if layer._disable_adapters else layer.active_adapters[0]
        return nullcontext(), using_adapter(model, name)

    return contexts


def adapter_parameters(model: nn.Module, name: str, prefix: str = "") -> dict[str, nn.Parameter]:
    """Parameters of an adapter, by their names in the model with `prefix` before them."""
    return {full: p for full, p in model.named_parameters(prefix=prefix) if name in full.split(".")}


def add_adapter(
    model: PeftModel, name: str, config: PeftConfig, weights: dict[str, Tensor] | None = None
) -> None:
    """Put another adapter into a model; it is frozen, and the active one stays so.

    Args:
        model: with an adapter of the same kind.
        name: of the new one.
        config: of the new one.
        weights: as PEFT saves them; new ones, that change nothing yet, where None.
    """
    trained = {full for full, p in model.named_parameters() if p.requires_grad}
    model.add_adapter(name, copy.deepcopy(config))
    if weights is not None:
        result = set_peft_model_state_dict(model, weights, adapter_name=name)
        if result.unexpected_keys:
            raise ValueError(f"weights that the model has no place for: {sorted(result.unexpected_keys)[:3]}")
    for full, parameter in model.named_parameters():
        parameter.requires_grad_(full in trained)


def _layers(model: nn.Module) -> list:
    return [
        module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
