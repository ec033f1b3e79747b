"""Which weights are kept in which precision: trained ones in fp32, frozen ones as they are computed with."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from tieback.cli.errors import UsageError

_FP32_SDPA = "sdpa_in_fp32"


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


def attend_in_fp32(module: nn.Module, accelerator: Accelerator) -> None:
    """Let the language models in `module` attend in fp32 on a CPU under bf16, in place; projections stay in bf16.

    PyTorch's fused attention takes three times as long backward in bf16 as in fp32 on a CPU (2.13; 64 rows of 80 tokens).
    A model that attends in a way of its own is left alone.
    """
    if accelerator.mixed_precision != "bf16" or accelerator.device.type != "cpu":
        return
    AttentionInterface.register(_FP32_SDPA, _sdpa_in_fp32)
    AttentionMaskInterface.register(_FP32_SDPA, sdpa_mask)
    for model in module.modules():
        if (
            isinstance(model, PreTrainedModel)
            and model.config._attn_implementation == "sdpa"
            and model._can_set_attn_implementation()
        ):
            model.set_attn_implementation(_FP32_SDPA)


def _sdpa_in_fp32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    mask = attention_mask
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    with torch.autocast("cpu", enabled=False):
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **kwargs)
    return output.to(value.dtype), None
