"""Stands in for a machine with accelerators: launched processes shard, over gloo, on the CPU.

Accelerate 1.15 switches DeepSpeed and FSDP off where it computes on the CPU (`PartialState._prepare_backend` and
`AcceleratorState.__init__`). With this folder first on PYTHONPATH, each process that `accelerate launch` starts with a
sharded configuration reports one accelerator a process, whose device is the CPU, and the configuration decides the rest.
Nothing of Tieback, DeepSpeed or torch is replaced. `launching.launch` sets it up; DDP needs none of it.
"""

import os

if "RANK" in os.environ and "true" in (
    os.environ.get("ACCELERATE_USE_DEEPSPEED"),
    os.environ.get("ACCELERATE_USE_FSDP"),
):
    from typing import Any

    import torch
    from accelerate import state
    from accelerate.utils import DistributedType

    partial_init = state.PartialState.__init__
    state_init = state.AcceleratorState.__init__

    def prepare_backend(*_: Any, **__: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    def set_device(self: state.PartialState) -> None:
        self.device = torch.device("cpu")

    def init_partial(self: state.PartialState, cpu: bool = False, **kwargs: Any) -> None:
        partial_init(self, cpu=False, **kwargs)

    def init_state(
        self: state.AcceleratorState,
        mixed_precision: str | None = None,
        cpu: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        use_cpu = os.environ.pop("ACCELERATE_USE_CPU", None)
        try:
            state_init(self, mixed_precision, False, *args, **kwargs)
        finally:
            if use_cpu is not None:
                os.environ["ACCELERATE_USE_CPU"] = use_cpu

    state.PartialState._prepare_backend = prepare_backend
    state.PartialState.set_device = set_device
    state.PartialState.__init__ = init_partial
    state.AcceleratorState.__init__ = init_state
