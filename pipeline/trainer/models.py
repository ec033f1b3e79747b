"""The models that a run is made of: actor-critic and frozen reference."""

import copy
from collections.abc import Iterator
from typing import Any, TypeAlias, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from tieback.cli.errors import UsageError, first_line
from tieback.pipeline.model_loading import loading
from tieback.pipeline.rollout.adapters import adapter_parameters, add_adapter
from tieback.pipeline.trainer.actor_critic import ActorCritic
from tieback.pipeline.trainer.binned_critics import set_bins, start_of_head
from tieback.pipeline.trainer.config import PPOConfig
from tieback.pipeline.trainer.critics import CRITIC, AdapterCritic, RewardRole, SharedCritic
from tieback.pipeline.trainer.sharded_tensors import copy_model, copy_weights, gathered
from tieback.reward_model.adapter import (
    ScalarAdapter,
    ScalarHead,
    base_of,
    read_scalar_adapter,
    same_model,
)
from tieback.reward_model.architectures import classifier_class
from tieback.reward_model.head import (
    as_reward_model,
    init_head,
    is_binned,
    load_reward_model,
    reward_head,
)
from tieback.reward_model.scoring import RewardScorer

CRITICS: dict[str, type[ActorCritic]] = {
    "separate": ActorCritic,
    "adapter": AdapterCritic,
    "shared": SharedCritic,
}

CriticSource: TypeAlias = PreTrainedModel | PeftModel | ScalarAdapter | str | None


def make_actor_critic(
    model: PreTrainedModel | PeftModel,
    value_model: CriticSource,
    scorers: list[RewardScorer],
    peft_config: PeftConfig | None,
    args: PPOConfig,
) -> tuple[ActorCritic, nn.Module | None]:
    """What is trained, and the frozen reference: None where it is the policy's own base or another adapter of it.

    Reward models of `scorers` that are adapters of the policy's base become adapters of the policy.

    Raises:
        UsageError: the models do not fit together (see `make_critic`, `split_reference` and `make_inner_critic`).
    """
    if isinstance(value_model, str) and args.critic != "separate":
        own_base = same_model(base_of_adapter(model, peft_config), base_of(value_model))
        value_model = read_scalar_adapter(value_model, as_critic=True) if own_base else value_model
    kind = kind_of_critic(args.critic, model, value_model, peft_config)
    # A copy of the policy's backbone must be made before it has an adapter.
    critic: Any = make_critic(value_model, model, scorers, args) if kind == "separate" else None
    had_adapter = isinstance(model, PeftModel)
    moving = args.ref_model_sync_steps is not None
    policy, reference, reference_adapter = split_reference(model, peft_config, moving)
    reward_heads = add_reward_adapters(policy, scorers)
    if kind != "separate":
        critic = make_inner_critic(kind, value_model, policy, had_adapter, args)
    value_range = None if args.value_bins is None else args.value_range
    actor_critic = CRITICS[kind](
        policy, critic, args.temperature, args.ent_coef > 0, reference_adapter, reward_heads, value_range
    )
    for scorer in scorers:
        if isinstance(scorer.model, ScalarAdapter):
            scorer.model = RewardRole(actor_critic, _adapter_name(scorers, scorer))
    if args.disable_dropout:
        for module in (actor_critic, *([reference] if reference is not None else [])):
            disable_dropout(module)
    return actor_critic, reference


def base_of_adapter(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> str | None:
    """Name of the base that the policy's adapter has, or will have; None for a policy that is trained as a whole."""
    if isinstance(model, PeftModel):
        return model.active_peft_config.base_model_name_or_path
    return model.name_or_path if peft_config is not None else None


def kind_of_critic(
    asked: str | None, model: nn.Module, value_model: CriticSource, peft_config: PeftConfig | None
) -> str:
    """The setting `critic`, or what suits the models where it is None."""
    adapted = peft_config is not None or isinstance(model, PeftModel)
    if asked == "adapter" and not adapted:
        raise UsageError(
            "critic: adapter puts an adapter beside the policy's, which has none. Set use_peft (peft_config), or "
            "critic: shared or separate."
        )
    if asked is not None:
        return asked
    whole = value_model is not None and not isinstance(value_model, ScalarAdapter)
    return "adapter" if adapted and not whole else "separate"


def make_inner_critic(
    kind: str,
    value_model: CriticSource,
    policy: PreTrainedModel | PeftModel,
    had_adapter: bool,
    args: PPOConfig,
) -> ScalarHead:
    """The head of a critic on the policy's base; of `adapter`, the adapter is put into the policy.

    The adapter starts as `value_model`, where that is given, and otherwise as the policy's: without any effect where it
    is new. A new head is 0, so that the first values are: states of a pretrained model are so large that a random head
    would begin far from any return.

    Raises:
        UsageError: `value_model` is a whole model, its adapter does not fit into the policy's base, or its head has other
            bins.
    """
    new_head = start_of_head(
        torch.zeros(1, policy.config.get_text_config().hidden_size), None, args, "a new head"
    )
    if value_model is not None and not isinstance(value_model, ScalarAdapter):
        raise UsageError(
            f"critic: {kind} lives on the policy's own base, and cannot start from a whole model. Start it from the policy "
            "(value_model=None; critic_init policy), or set critic: separate."
        )
    start = value_model
    if kind == "shared":
        if start is not None:
            raise UsageError(
                "critic: shared is a head on the policy's own states, and cannot start from a reward model. Start it from "
                "the policy (value_model=None; critic_init policy), or set critic: adapter."
            )
        return ScalarHead(new_head)
    own = policy.peft_config["default"]
    config, weights = (own, None) if start is None else (start.config, start.weights)
    if start is None and had_adapter:
        weights = get_peft_model_state_dict(policy, adapter_name="default", save_embedding_layers=False)
    config, weights = _below_the_head(policy, config, weights)
    try:
        add_adapter(policy, CRITIC, config, weights)
    except (ValueError, RuntimeError) as error:
        source = "the policy's adapter" if start is None else start.source
        raise UsageError(f"The critic cannot start from {source}: {first_line(error)}") from error
    for parameter in adapter_parameters(policy, CRITIC).values():
        parameter.requires_grad_(True)
    if start is not None:
        return ScalarHead(start_of_head(start.head, start.value_range, args, start.source), start.bias)
    return ScalarHead(new_head)


def add_reward_adapters(policy: Any, scorers: list[RewardScorer]) -> dict[str, ScalarHead]:
    """Put the reward models that are adapters of the policy's base into it; their heads by the adapters' names.

    Raises:
        UsageError: one does not fit into the base.
    """
    heads = {}
    for scorer in scorers:
        adapter = scorer.model
        if isinstance(adapter, ScalarAdapter):
            name = _adapter_name(scorers, scorer)
            try:
                add_adapter(policy, name, adapter.config, adapter.weights)
            except (ValueError, RuntimeError) as error:
                raise UsageError(
                    f"The reward model {adapter.source} does not fit into the policy's base: {first_line(error)}"
                ) from error
            heads[name] = ScalarHead(adapter.head, adapter.bias)
    return heads


def _adapter_name(scorers: list[RewardScorer], scorer: RewardScorer) -> str:
    return f"reward{scorers.index(scorer)}"


def _below_the_head(
    policy: PeftModel, config: Any, weights: dict[str, Tensor] | None
) -> tuple[Any, dict[str, Tensor] | None]:
    """An adapter without its part in the head of the language model, which a critic does not use."""
    head = policy.get_base_model().get_output_embeddings()
    names = {full.split(".")[-1] for full, module in policy.named_modules() if module is head}
    config = copy.deepcopy(config)
    for setting in ("target_modules", "modules_to_save"):
        chosen = getattr(config, setting)
        if isinstance(chosen, set | list):
            setattr(config, setting, [module for module in chosen if module not in names] or None)
    if weights is not None:
        weights = {name: tensor for name, tensor in weights.items() if not names & set(name.split("."))}
    return config, weights


def split_reference(
    policy: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, moving: bool = False
) -> tuple[nn.Module, nn.Module | None, str | None]:
    """Freeze what the policy is now, as the reference of the KL penalty.

    A full model is copied. With `peft_config` the base serves both: the reference is the policy with its adapter off.
    A policy that comes with an adapter (trained in the SFT stage, say) keeps a frozen copy of it beside: to switch
    it off would make the base model the reference, without what SFT taught.

    Args:
        policy: model, or a model with one trainable adapter.
        peft_config: adapter to train on a model that has none.
        moving: whether the reference will be reset to the policy, so that it needs an adapter of its own.

    Returns:
        The policy to train; the reference model, None where it is the policy's own base; and the adapter that is
        the reference in that case (None: no adapter).

    Raises:
        UsageError: `peft_config` for a model that has an adapter, several adapters, or one that does not fit the model.
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
        for parameter in adapter_parameters(policy, "default").values():
            parameter.requires_grad_(True)  # which it was not, if it was loaded for inference
        _add_copy(policy)
        return policy, None, "reference"
    if peft_config is not None:
        try:
            adapted = get_peft_model(policy, peft_config)
        except ValueError as error:
            raise UsageError(f"The adapter cannot be put into the model: {error}") from error
        if not moving:
            return adapted, None, None
        _add_copy(adapted)
        return adapted, None, "reference"
    reference = copy_model(policy)
    reference.requires_grad_(False)
    return policy, reference.eval(), None


def _add_copy(policy: PeftModel) -> None:
    weights = get_peft_model_state_dict(policy, adapter_name="default", save_embedding_layers=False)
    add_adapter(policy, "reference", policy.peft_config["default"], weights)


def active_dropouts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every dropout probability, and noise of a router, above 0: the name of its module, the module, and its attribute.

    Some are modules (`nn.Dropout.p`), others plain numbers that a layer hands to its attention kernel (Llama's
    `attention_dropout`) or multiplies its input with (Mixtral's `jitter_noise`).
    """
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            holds = "drop" in attribute or attribute in ("jitter_noise", "input_jitter_noise")
            holds |= attribute == "p" and isinstance(module, nn.Dropout)
            if holds and isinstance(value, float) and value > 0:
                yield name, module, attribute


def disable_dropout(model: nn.Module) -> None:
    """Set what `active_dropouts` finds to 0 (`eval()` would switch gradient checkpointing off as well)."""
    for _, module, attribute in list(active_dropouts(model)):
        setattr(module, attribute, 0.0)


def make_critic(
    value_model: CriticSource,
    policy: PreTrainedModel | PeftModel,
    scorers: list[RewardScorer],
    args: PPOConfig,
) -> PreTrainedModel:
    """The critic: `value_model` (never the very object that scores), or the policy's backbone with a new head.

    Of a reward model it is an fp32 copy: a reward model may be kept in bf16, but steps of training vanish there.

    Raises:
        UsageError: the critic cannot read the policy's tokens, has no head for one value, or one for other bins.
    """
    if isinstance(value_model, ScalarAdapter):
        raise UsageError(
            f"critic: separate is a whole model, and {value_model.source} is an adapter. Set critic: adapter, or start the "
            "critic from the policy (critic_init policy)."
        )
    if isinstance(value_model, PeftModel):
        value_model = value_model.merge_and_unload()
    critic: Any
    if isinstance(value_model, str):
        with loading("value_model", value_model):
            critic = load_reward_model(value_model, as_critic=True, dtype=torch.float32)
    elif value_model is not None:
        shared = any(value_model is scorer.model for scorer in scorers)
        critic = copy_model(value_model) if shared else value_model
        if shared and not is_deepspeed_zero3_enabled():  # which has one dtype for all parameters
            critic.float()
    elif isinstance(policy, PeftModel):
        raise UsageError("Name a value_model: a critic is made of a policy only before it has an adapter.")
    else:
        critic = _critic_of(policy, args.seed)
    binned = hasattr(critic, "score") and is_binned(critic.config)
    if not binned and (not hasattr(critic, "score") or critic.score.out_features != 1):
        raise UsageError(
            f"The critic is a {type(critic).__name__} without a `score` head for one value, as encoders are, which read a text "
            "as a whole. Start it from the policy (critic_init policy; value_model=None), or name a causal reward model as its "
            "value_model."
        )
    vocabulary, own = policy.config.get_text_config().vocab_size, critic.config.get_text_config().vocab_size
    if own != vocabulary:
        raise UsageError(
            f"The critic's vocabulary has {own} tokens, the policy's {vocabulary}: a critic reads the policy's tokens. "
            "Start it from the policy (critic_init policy; value_model=None)."
        )
    set_bins(critic, args, value_model if isinstance(value_model, str) else "value_model")
    critic.requires_grad_(True)
    return as_reward_model(critic)


def _critic_of(policy: PreTrainedModel, seed: int) -> PreTrainedModel:
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    critic: Any = cast(Any, classifier_class(config))._from_config(config, dtype=torch.float32)
    copy_weights(policy.base_model, critic.base_model)
    with gathered(reward_head(critic).parameters(), modifier_rank=0):
        # The same head whatever the backend, which may have drawn other numbers before.
        init_head(critic, torch.Generator().manual_seed(seed))
    return critic.to(policy.device)
