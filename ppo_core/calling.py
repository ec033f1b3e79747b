"""Computing with a module's weights in another way than its `forward` does."""

from collections.abc import Callable
from typing import Any

from torch import nn


def call_as(module: nn.Module, function: Callable[..., Any], *args: Any, through: Any = None) -> Any:
    """Call a function inside a call of a module, in place of its `forward`.

    This is the one way in. DDP, FSDP and DeepSpeed gather weights and synchronise gradients in a wrapper's `forward` or
    in hooks around the module's own, so that nothing may be computed past them. So, for one call, `module.forward`
    stands for `function`; inside it, `module.forward` is itself again.

    Args:
        module: whose weights `function` computes with.
        function: called with `args`.
        args: tensors on which hooks of the backward pass hang, and anything else.
        through: wrapper around `module` that is called (DDP, a DeepSpeed engine); the module itself where None.

    Returns:
        What `function` returns.
    """
    own_forward = module.__dict__.get("forward")  # Accelerate's mixed precision sets one on the instance

    def restore() -> None:
        if own_forward is not None:
            module.forward = own_forward
        else:
            module.__dict__.pop("forward", None)

    def instead(*args: Any) -> Any:
        restore()
        return function(*args)

    module.forward = instead
    try:
        return (module if through is None else through)(*args)
    finally:
        restore()
