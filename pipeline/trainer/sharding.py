"""Which process holds which weights: what FSDP 2 and DeepSpeed ZeRO-3 shard, and how the policy is gathered to generate.

Under every other backend each process holds every model whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from transformers import PreTrainedModel

from tieback.cli.errors import UsageError
from tieback.pipeline.resume import backend_name
from tieback.pipeline.trainer.actor_critic import ActorCritic
from tieback.pipeline.trainer.sharded_tensors import copy_model, gathered
from tieback.pipeline.trl_internals import (
    add_hooks,
    prepare_deepspeed,
    remove_hooks,
    unwrap_model_for_generation,
)
from tieback.reward_model.head import Fp32Linear


def check_backend(accelerator: Accelerator) -> None:
    """Refuse the backends that PPO has not been made to work with.

    Raises:
        UsageError: FSDP 1, Megatron-LM, fp16, or a way of loading or saving sharded models that loses weights.
    """
    backend = accelerator.distributed_type
    if backend == DistributedType.MEGATRON_LM:
        raise UsageError(
            "Megatron-LM is not supported: use FSDP 2 (accelerate_configs/fsdp2.yaml) or DeepSpeed."
        )
    if backend == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise UsageError("FSDP 1 is not supported: set fsdp_version: 2 in the Accelerate configuration.")
        plugin = accelerator.state.fsdp_plugin
        if plugin.cpu_ram_efficient_loading:
            raise UsageError(
                "fsdp_cpu_ram_efficient_loading is not supported, as models are copied before they are sharded: set it to "
                "false in the Accelerate configuration."
            )
        if "FULL" not in str(plugin.state_dict_type):
            raise UsageError(
                "Checkpoints hold whole models: set fsdp_state_dict_type to FULL_STATE_DICT in the Accelerate configuration."
            )
    if is_zero3(accelerator):
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise UsageError(
                "Checkpoints hold whole models: set zero3_save_16bit_model to true in the Accelerate configuration."
            )
    if accelerator.mixed_precision == "fp16":
        raise UsageError("fp16 is not supported: its loss scaler skips optimiser steps. Use bf16 or fp32.")


def is_zero3(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed shards parameters."""
    return backend_name(accelerator) == "zero3"


def place_trained(actor_critic: ActorCritic, accelerator: Accelerator) -> None:
    """Shard what is trained under FSDP 2, in place, after frozen models. DeepSpeed and DDP wrap it later, with the optimiser.

    Policy, critic and heads are units of their own, so that generation gathers the policy alone. What a unit returns is
    not cast (Accelerate's policy rounds log-probabilities and values to bf16), gradients are summed in fp32, and heads
    compute in fp32.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = _precision(accelerator)
    for head in filter(lambda module: isinstance(module, Fp32Linear), actor_critic.modules()):
        _shard(head, accelerator, MixedPrecisionPolicy())
    for unit in actor_critic.units():
        _shard(unit, accelerator)
    # Accelerate would look in vain for layers to shard, here and when it prepares the optimiser.
    actor_critic._no_split_modules = []
    plugin.transformer_cls_names_to_wrap = []
    _shard(actor_critic, accelerator)
    # It would take whichever module runs first, the policy say, for the root of all others.
    cast(FSDPModule, actor_critic)._get_fsdp_state()._lazy_init()
    register_fsdp_forward_method(actor_critic, "generate")


def place_reference(reference: PreTrainedModel, accelerator: Accelerator, replicate: bool) -> PreTrainedModel:
    """Shard the frozen reference model, or put it whole on the device; it computes as the policy does.

    Args:
        reference: causal language model.
        accelerator: names the backend.
        replicate: hold it whole on each process whatever the backend.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED and not (
        replicate and is_zero3(accelerator)
    ):
        # The hooks that gather are in the model itself; the engine's `forward` would hide its arguments.
        return prepare_deepspeed(reference, accelerator).module
    if accelerator.distributed_type == DistributedType.FSDP and not replicate:
        _shard_frozen(reference, accelerator, _precision(accelerator))
        return reference.eval()
    if is_zero3(accelerator):
        reference = copy_model(reference, whole=True)
        if accelerator.mixed_precision == "bf16":
            reference.bfloat16()  # as DeepSpeed does to the policy
    return reference.to(accelerator.device).eval()


def place_reward_model(model: PreTrainedModel, accelerator: Accelerator, replicate: bool) -> PreTrainedModel:
    """Shard a reward model, in the dtype that it was loaded in, or put it whole on the device (see `place_reference`)."""
    if accelerator.distributed_type == DistributedType.FSDP and not replicate:
        _shard_frozen(model.base_model, accelerator, MixedPrecisionPolicy())
    elif is_zero3(accelerator) and not replicate:
        return prepare_deepspeed(model, accelerator).module
    elif is_zero3(accelerator):
        model = copy_model(model, whole=True)
    return model.to(accelerator.device)


def _precision(accelerator: Accelerator) -> MixedPrecisionPolicy:
    """That of the configuration, but that nothing is rounded that a unit returns, nor a sum of gradients."""
    configured = accelerator.state.fsdp_plugin.mixed_precision_policy or MixedPrecisionPolicy()
    return replace(configured, reduce_dtype=torch.float32, output_dtype=None)


def _shard_frozen(module: nn.Module, accelerator: Accelerator, precision: MixedPrecisionPolicy) -> None:
    _shard(module, accelerator, precision)
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            # The first and the last unit would stay whole for a backward pass that never comes.
            unit.set_reshard_after_forward(True, recurse=False)


def _shard(
    module: nn.Module, accelerator: Accelerator, precision: MixedPrecisionPolicy | None = None
) -> None:
    plugin = accelerator.state.fsdp_plugin
    # The plugin would keep the names of this module's layers for the next one, which may be of another architecture.
    names = ("transformer_cls_names_to_wrap", "auto_wrap_policy", "mixed_precision_policy")
    before = {name: getattr(plugin, name) for name in names}
    if precision is not None:
        plugin.mixed_precision_policy = precision
    try:
        fsdp2_prepare_model(accelerator, module)
    finally:
        for name, value in before.items():
            setattr(plugin, name, value)


@contextmanager
def policy_for_generation(
    wrapped: nn.Module, accelerator: Accelerator, gradient_checkpointing_kwargs: dict | None
) -> Iterator[ActorCritic]:
    """The actor-critic with its policy whole on each process, which may then generate, or be copied, for as long as it likes.

    Processes sample different numbers of tokens, so that nothing may be gathered token by token.
    """
    with unwrap_model_for_generation(
        wrapped,
        accelerator,
        gather_deepspeed3_params=False,
        gradient_checkpointing_kwargs=gradient_checkpointing_kwargs,
    ) as actor_critic:
        zero3 = is_zero3(accelerator)
        policy = actor_critic.policy
        with _gathered_by_zero3(policy, wrapped) if zero3 else _kept_whole_by_fsdp(policy, accelerator):
            yield actor_critic


@contextmanager
def _gathered_by_zero3(policy: nn.Module, engine: nn.Module) -> Iterator[None]:
    with gathered(policy.parameters()):
        remove_hooks(engine)  # which would gather, and let go again, layer by layer
        try:
            yield
        finally:
            add_hooks(engine)


@contextmanager
def _kept_whole_by_fsdp(policy: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    units = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()  # now, for what reads the weights without a forward pass
    try:
        yield
    finally:
        for unit in units:
            reshard = bool(accelerator.state.fsdp_plugin.reshard_after_forward)
            unit.set_reshard_after_forward(reshard, recurse=False)
            unit.reshard()
