"""Which weights are kept in which precision: trained ones in fp32, frozen ones as they are computed with."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers.pytorch_utils import Conv1D

from tieback.cli.errors import UsageError


def check_trained(model: nn.Module, accelerator: Accelerator) -> None:
    """Refuse to train weights in low precision, of which a step at a small learning rate rounds to nothing.

    In bf16, 40 steps of AdamW at a learning rate of 3e-6 moved 3.8% of a model's weights. DeepSpeed keeps fp32 copies of
    its own.

    Raises:
        UsageError: names a weight.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise UsageError(
                f"{name} would be trained in {kind}, in which most steps at a small learning rate round to nothing. Load the "
                "model in float32 (leave out dtype), and set bf16: true to compute in bf16; or train an adapter (use_peft), "
                "which is in float32 whatever its base is in."
            )


def keep_frozen_in_bf16(model: nn.Module, accelerator: Accelerator) -> None:
    """Keep the frozen matrices of a model in bf16 where autocast would cast them again at every token, in place.

    Autocast multiplies in bf16 and leaves everything else as it is, so that every result stays the same to the bit. What
    is not multiplied (norms, embeddings) is left alone, and a head that is tied to frozen embeddings becomes a matrix of
    its own. FSDP and DeepSpeed have a precision of their own.
    """
    if accelerator.mixed_precision != "bf16" or accelerator.distributed_type in (
        DistributedType.FSDP,
        DistributedType.DEEPSPEED,
    ):
        return
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in _multiplying(model):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad or parameter.dtype != torch.float32:
                continue
            if id(parameter) in embedded:
                setattr(module, name, nn.Parameter(parameter.bfloat16(), requires_grad=False))
            else:
                parameter.data = parameter.data.bfloat16()


def _multiplying(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if type(module) is nn.Linear or isinstance(module, Conv1D):
            yield module
