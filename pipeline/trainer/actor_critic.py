"""The module that PPO trains: a policy and a separate critic, scored on sequences without left padding."""

import os
from collections.abc import Mapping
from typing import Any, Literal

from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from tieback.pipeline.rollout.adapters import using_adapter
from tieback.pipeline.rollout.token_scores import (
    base_model,
    completion_logprobs,
    completion_values,
    last_hidden,
)
from tieback.pipeline.trainer.sharded_tensors import load_into
from tieback.ppo_core import Batch, bin_offsets, expected_values
from tieback.reward_model.adapter import ScalarHead
from tieback.reward_model.head import reward_bias

VALUE_MODEL = "value_model"

# Whose learning rate a parameter follows.
Role = Literal["policy", "critic"]


class ActorCritic(nn.Module):
    """Policy and critic in one module, so that one engine, one optimiser and one checkpoint hold both.

    The trainer knows of its weights what this class says of them. Another kind of critic (see `critics`) is a subclass
    with its own `score_tokens`, `critic_bias`, `models_with_layers`, `units`, `trained_parameters`, `_save_critic` and `_load_critic`.

    Args:
        policy: causal language model, or one wrapped by PEFT.
        critic: sequence-classification model with one label and a `score` head; another kind may need less.
        temperature: sampling temperature.
        entropy_requires_grad: whether the objective has an entropy bonus.
        reference_adapter: for a PEFT policy, the adapter of the frozen reference (None: the base model without
            an adapter).
        reward_heads: heads of the reward models that are frozen adapters of a PEFT policy's base, by the names of the
            adapters.
        value_range: of a critic with `value_bins`, whose head gives logits; None for one number.
    """

    policy: Any
    critic: Any

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        critic: nn.Module,
        temperature: float,
        entropy_requires_grad: bool,
        reference_adapter: str | None = None,
        reward_heads: Mapping[str, ScalarHead] | None = None,
        value_range: float | None = None,
    ):
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.temperature = temperature
        self.entropy_requires_grad = entropy_requires_grad
        self.reference_adapter = reference_adapter
        self.value_range = value_range
        self.reward_heads = nn.ModuleDict(reward_heads or {}).requires_grad_(False)
        # What Trainer, DeepSpeed, FSDP and TRL ask of a model.
        self.is_gradient_checkpointing = False
        self._checkpointing: dict[str, Any] = {}
        self.config = policy.config
        self.generation_config = policy.generation_config
        layers = [
            getattr(base_model(model), "_no_split_modules", None) or [] for model in self.models_with_layers()
        ]
        self._no_split_modules = sorted({name for names in layers for name in names})

    def forward(self, inputs: dict[str, Tensor], task: str = "score") -> tuple[Tensor, ...]:
        """Scoring goes through here, which is what DDP, DeepSpeed, FSDP and autocast wrap; `update` calls `evaluate`.

        Args:
            inputs: see `completion_scores`; of a reward model `input_ids` and `attention_mask`, both [b, L].
            task: "score" (log-probabilities [b, T] and values [b, T + 1]), "reference" (log-probabilities [b, T]
                of the frozen reference adapter), or the name of a reward model's adapter (scores [b]).
        """
        if task == "reference":
            with using_adapter(self.policy, self.reference_adapter):
                return (completion_logprobs(self.policy, inputs, self.temperature)[0],)
        if task in self.reward_heads:
            with using_adapter(self.policy, task):
                hidden = last_hidden(self.policy, inputs)
            return (self.reward_heads[task](hidden),)
        logprobs, outputs, _ = self.score_tokens(inputs)
        if self.value_range is None:
            return logprobs, outputs
        return logprobs, expected_values(self._over_bins(outputs, self.value_range), self.value_range)

    def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, values and entropy, each [b, T]: all that `ppo_core.update` asks of an actor-critic.

        Of a critic with `value_bins`, logits [b, T, K] in place of the values.
        """
        logprobs, outputs, entropy = self.score_tokens(minibatch.inputs)
        outputs = outputs[:, :-1]
        if self.value_range is not None:
            outputs = self._over_bins(outputs, self.value_range)
        return logprobs, outputs, entropy

    def score_tokens(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities [b, T] and entropy [b, T] of completions (see `completion_logprobs`), and between them what the
        critic's head gives, [b, T + 1] or [b, T + 1, K].
        """
        logprobs, entropy = completion_logprobs(
            self.policy, inputs, self.temperature, self.entropy_requires_grad
        )
        return logprobs, completion_values(self.critic, inputs), entropy

    @property
    def critic_bias(self) -> float:
        """Constant that is added to what the critic's head gives."""
        return reward_bias(self.critic)

    def _over_bins(self, outputs: Tensor, value_range: float) -> Tensor:
        # The bias has been added to every logit, which the softmax does not see; its place is in the offsets.
        return outputs + bin_offsets(outputs.shape[-1], value_range, self.critic_bias, outputs.device)

    # Its weights.

    def models_with_layers(self) -> tuple[PreTrainedModel | PeftModel, ...]:
        """Models whose layers are sharded, and recomputed under gradient checkpointing."""
        return self.policy, self.critic

    def units(self) -> tuple[nn.Module, ...]:
        """Modules that `score_tokens` calls as a whole: units of sharding, beside each layer and head in them."""
        return self.policy, self.critic.base_model

    def trained_parameters(self) -> dict[Role, dict[str, nn.Parameter]]:
        """For each role, the parameters that are trained with its learning rate, by their names in this module."""
        return {"policy": trained(self.policy, "policy"), "critic": trained(self.critic, "critic")}

    def save(self, folder: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the policy into `folder`, loadable by itself, and the critic into `folder/value_model`.

        Args:
            folder: made where missing.
            state_dict: gathered weights of this module where they are sharded (FSDP, ZeRO-3).
        """
        adapter = {"selected_adapters": ["default"]} if isinstance(self.policy, PeftModel) else {}
        self.policy.save_pretrained(folder, state_dict=_part(state_dict, "policy.", self.policy), **adapter)
        self._save_critic(os.path.join(folder, VALUE_MODEL), _part(state_dict, "critic.", self.critic))

    def load(self, folder: str) -> None:
        """Load what `save` wrote into the models that are there.

        Raises:
            Exception: whatever reading a missing or damaged file raises.
        """
        if isinstance(self.policy, PeftModel):
            own = get_peft_model_state_dict(self.policy, adapter_name="default")
            load_into(own, load_peft_weights(folder))
        else:
            _load_model(self.policy, folder)
        self._load_critic(os.path.join(folder, VALUE_MODEL))

    def _save_critic(self, folder: str, state_dict: dict[str, Tensor] | None) -> None:
        self.critic.save_pretrained(folder, state_dict=state_dict)

    def _load_critic(self, folder: str) -> None:
        _load_model(self.critic, folder)

    # What Trainer and TRL call on a model.

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's `generate`, ruled by the given generation config alone.

        `generate` fills whatever a config leaves open from the model's own (a repetition penalty, say, which
        scoring would not know of), so the model's own is put aside meanwhile.
        """
        owners = [self.policy, *([base_model(self.policy)] if isinstance(self.policy, PeftModel) else [])]
        own = [owner.generation_config for owner in owners]
        for owner in owners:
            owner.generation_config = GenerationConfig()
        try:
            return self.policy.generate(*args, **kwargs)
        finally:
            for owner, config in zip(owners, own, strict=True):
                owner.generation_config = config

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute activations in the backward pass.

        The first settings stay: TRL switches this off to generate and on again after, with fewer than Trainer gave.
        """
        if not self._checkpointing:
            self._checkpointing = {"gradient_checkpointing_kwargs": gradient_checkpointing_kwargs, **kwargs}
        self.is_gradient_checkpointing = True
        for model in self.models_with_layers():
            model.gradient_checkpointing_enable(**self._checkpointing)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The same, by the name that newer versions of Trainer call it."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass."""
        self.is_gradient_checkpointing = False
        for model in self.models_with_layers():
            model.gradient_checkpointing_disable()


def trained(model: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    """Parameters of a model that are trained, by their names with `prefix` before them."""
    return {name: p for name, p in model.named_parameters(prefix=prefix) if p.requires_grad}


def _load_model(model: PreTrainedModel, folder: str) -> None:
    saved = type(model).from_pretrained(folder, dtype=model.dtype)
    load_into(model.state_dict(), saved.state_dict())


def _part(state_dict: dict[str, Tensor] | None, prefix: str, model: nn.Module) -> dict[str, Tensor] | None:
    if state_dict is None:
        return None
    # Gathering has made tensors of their own of tied weights; each is saved once.
    own = [name for tensors in (model.named_parameters(), model.named_buffers()) for name, _ in tensors]
    return {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
