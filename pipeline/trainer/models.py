"""The models that a run is made of: actor-critic and frozen reference."""

import copy
from collections.abc import Iterator

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedModel,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from tieback.cli.errors import UsageError
from tieback.pipeline.trainer.actor_critic import ActorCritic
from tieback.pipeline.trainer.config import PPOConfig
from tieback.pipeline.trainer.sharded_tensors import copy_model, copy_weights, gathered
from tieback.reward_model.head import as_reward_model, init_head, load_reward_model, reward_head
from tieback.reward_model.scoring import RewardScorer


def make_actor_critic(
    model: PreTrainedModel | PeftModel,
    value_model: PreTrainedModel | str | None,
    scorers: list[RewardScorer],
    peft_config: PeftConfig | None,
    args: PPOConfig,
) -> tuple[ActorCritic, nn.Module | None]:
    """What is trained, and the frozen reference: None where it is the policy's own base or another adapter of it.

    Raises:
        UsageError: the models do not fit together (see `make_critic` and `split_reference`).
    """
    critic = make_critic(value_model, model, scorers)
    policy, reference, reference_adapter = split_reference(model, peft_config)
    actor_critic = ActorCritic(policy, critic, args.temperature, args.ent_coef > 0, reference_adapter)
    if args.disable_dropout:
        for module in (actor_critic, *([reference] if reference is not None else [])):
            disable_dropout(module)
    return actor_critic, reference


def split_reference(
    policy: PreTrainedModel | PeftModel, peft_config: PeftConfig | None
) -> tuple[nn.Module, nn.Module | None, str | None]:
    """Freeze what the policy is now, as the reference of the KL penalty.

    A full model is copied. With `peft_config` the base serves both: the reference is the policy with its adapter off.
    A policy that comes with an adapter (trained in the SFT stage, say) keeps a frozen copy of it beside: to switch
    it off would make the base model the reference, without what SFT taught.

    Args:
        policy: model, or a model with one trainable adapter.
        peft_config: adapter to train on a model that has none.

    Returns:
        The policy to train; the reference model, None where it is the policy's own base; and the adapter that is
        the reference in that case (None: no adapter).

    Raises:
        UsageError: `peft_config` for a model that has an adapter, or several adapters.
    """
    if isinstance(policy, PeftModel):
        if peft_config is not None:
            raise UsageError(
                "The model has an adapter already, and peft_config asks for another. Merge the first "
                "(model.merge_and_unload()), or leave peft_config out to train it further."
            )
        if list(policy.peft_config) != ["default"]:
            raise UsageError(
                f"The model must have one adapter, named `default`, to train further; it has {list(policy.peft_config)}. "
                "Save the one that is meant and load it with PeftModel.from_pretrained, which names it so."
            )
        policy.add_adapter("reference", policy.peft_config["default"])
        weights = get_peft_model_state_dict(policy, adapter_name="default", save_embedding_layers=False)
        set_peft_model_state_dict(policy, weights, adapter_name="reference")
        policy.set_adapter("default")
        return policy, None, "reference"
    if peft_config is not None:
        return get_peft_model(policy, peft_config), None, None
    reference = copy_model(policy)
    reference.requires_grad_(False)
    return policy, reference.eval(), None


def active_dropouts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every dropout probability above 0: the name of its module, the module, and the attribute that holds it.

    Some are modules (`nn.Dropout.p`), others plain numbers that a layer hands to its attention kernel (Llama's
    `attention_dropout`).
    """
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            holds = "drop" in attribute or (attribute == "p" and isinstance(module, nn.Dropout))
            if holds and isinstance(value, float) and value > 0:
                yield name, module, attribute


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0 (`eval()` would switch gradient checkpointing off as well)."""
    for _, module, attribute in list(active_dropouts(model)):
        setattr(module, attribute, 0.0)


def make_critic(
    value_model: PreTrainedModel | str | None,
    policy: PreTrainedModel | PeftModel,
    scorers: list[RewardScorer],
) -> PreTrainedModel:
    """The critic: `value_model` (never the very object that scores), or the policy's backbone with a new head.

    Of a reward model it is an fp32 copy: a reward model may be kept in bf16, but steps of training vanish there.

    Raises:
        UsageError: the critic cannot read the policy's tokens, or has no head for one value.
    """
    if isinstance(value_model, str):
        critic = load_reward_model(value_model, dtype=torch.float32)
    elif value_model is not None:
        shared = any(value_model is scorer.model for scorer in scorers)
        critic = copy_model(value_model) if shared else value_model
        if shared and not is_deepspeed_zero3_enabled():  # which has one dtype for all parameters
            critic.float()
    elif isinstance(policy, PeftModel):
        raise UsageError("Name a value_model: a critic is made of a policy only before it has an adapter.")
    else:
        critic = _critic_of(policy)
    if not hasattr(critic, "score") or critic.score.out_features != 1:
        raise UsageError(
            f"The critic is a {type(critic).__name__} without a `score` head for one value. Use a "
            "sequence-classification model with num_labels=1."
        )
    vocabulary, own = policy.config.get_text_config().vocab_size, critic.config.get_text_config().vocab_size
    if own != vocabulary:
        raise UsageError(
            f"The critic's vocabulary has {own} tokens, the policy's {vocabulary}: a critic reads the policy's tokens. "
            "Start it from the policy (value_model=None)."
        )
    critic.requires_grad_(True)
    return as_reward_model(critic)


def _critic_of(policy: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UsageError(
            f"Transformers has no sequence-classification model for {type(config).__name__}; name a value_model."
        )
    critic_class = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    critic = critic_class._from_config(config, dtype=torch.float32)
    copy_weights(policy.base_model, critic.base_model)
    with gathered(reward_head(critic).parameters(), modifier_rank=0):
        init_head(critic)
    return critic.to(policy.device)
