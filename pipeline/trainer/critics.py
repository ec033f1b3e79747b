"""Critics that live on the policy's own base: a head on the policy's states, or an adapter and a head."""

import os
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from tieback.cli.errors import UsageError
from tieback.pipeline.rollout.adapters import adapter_parameters, recomputation, using_adapter
from tieback.pipeline.rollout.token_scores import completion_hidden, completion_logprobs, completion_scores
from tieback.pipeline.trainer.actor_critic import ActorCritic, Role, trained
from tieback.pipeline.trainer.sharded_tensors import load_into
from tieback.reward_model.adapter import read_scalar_adapter, write_scalar_adapter

HEAD = "value_head.safetensors"
CRITIC = "critic"


class SharedCritic(ActorCritic):
    """The critic is a head on the policy's own hidden states: one pass gives log-probabilities and values.

    Args:
        policy: causal language model, or one wrapped by PEFT.
        critic: a `ScalarHead`.
        settings: further arguments of `ActorCritic`.
    """

    def score_tokens(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, outputs of the critic's head and entropy (see `ActorCritic`)."""
        logprobs, entropy, hidden = completion_scores(
            self.policy, inputs, self.temperature, self.entropy_requires_grad
        )
        return logprobs, self.critic(hidden), entropy

    @property
    def critic_bias(self) -> float:
        """Constant that is added to what the critic's head gives."""
        bias: float = self.critic.bias
        return bias

    def models_with_layers(self) -> tuple[Any, ...]:
        """Models whose layers are sharded, and recomputed under gradient checkpointing."""
        return (self.policy,)

    def units(self) -> tuple[nn.Module, ...]:
        """Modules that `score_tokens` calls as a whole: units of sharding, beside each layer and head in them."""
        return (self.policy,)

    def _save_critic(self, folder: str, state_dict: dict[str, Tensor] | None) -> None:
        os.makedirs(folder, exist_ok=True)
        weights = dict(self.critic.named_parameters()) if state_dict is None else state_dict
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(tensors, Path(folder, HEAD), metadata={"bias": repr(self.critic.bias)})

    def _load_critic(self, folder: str) -> None:
        load_into(self.critic.state_dict(), load_file(Path(folder, HEAD)))


class AdapterCritic(SharedCritic):
    """The critic is an adapter of its own on the policy's base, and a head.

    Args:
        policy: wrapped by PEFT, with the adapters `default` and `critic`.
        critic: a `ScalarHead`.
        settings: further arguments of `ActorCritic`.
    """

    def score_tokens(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, outputs of the critic's head and entropy (see `ActorCritic`)."""
        logprobs, entropy = completion_logprobs(
            self.policy, inputs, self.temperature, self.entropy_requires_grad
        )
        with using_adapter(self.policy, CRITIC):
            hidden = completion_hidden(self.policy, inputs)
        return logprobs, self.critic(hidden), entropy

    def trained_parameters(self) -> dict[Role, dict[str, nn.Parameter]]:
        """For each role, the parameters that are trained with its learning rate, by their names in this module."""
        adapter = adapter_parameters(self.policy, CRITIC, "policy")
        policy = {name: p for name, p in trained(self.policy, "policy").items() if name not in adapter}
        return {
            "policy": policy,
            "critic": {name: p for name, p in adapter.items() if p.requires_grad}
            | trained(self.critic, "critic"),
        }

    def save(self, folder: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the policy's adapter into `folder`, and the critic, an adapter with a head, into `folder/value_model`."""
        super().save(folder, state_dict)
        part = None
        if state_dict is not None:
            part = {
                name.removeprefix("policy."): tensor
                for name, tensor in state_dict.items()
                if name.startswith("policy.")
            }
        weights = get_peft_model_state_dict(self.policy, state_dict=part, adapter_name=CRITIC)
        head = self.critic.score.weight if state_dict is None else state_dict["critic.score.weight"]
        write_scalar_adapter(
            Path(folder, "value_model"),
            self.policy.peft_config[CRITIC],
            weights,
            head,
            self.config,
            self.critic_bias,
            self.value_range,
        )

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute activations in the backward pass, each with the adapter that it was computed with.

        Raises:
            UsageError: PyTorch's reentrant kind is asked for, which cannot.
        """
        settings = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if settings["use_reentrant"]:
            raise UsageError(
                "use_reentrant in gradient_checkpointing_kwargs does not go with critic: adapter. Leave it out."
            )
        super().gradient_checkpointing_enable(
            {**settings, "context_fn": recomputation(self.policy)}, **kwargs
        )

    def _save_critic(self, folder: str, state_dict: dict[str, Tensor] | None) -> None:
        """Nothing: `save` has the adapter's weights, which are the policy's part of the gathered ones."""

    def _load_critic(self, folder: str) -> None:
        saved = read_scalar_adapter(folder, as_critic=True)
        load_into(get_peft_model_state_dict(self.policy, adapter_name=CRITIC), saved.weights)
        load_into(self.critic.state_dict(), {"score.weight": saved.head})


class RewardRole:
    """The reward model that is an adapter of the policy's base, as `RewardScorer` calls a model.

    Args:
        actor_critic: that has the adapter and its head.
        name: of the adapter.
    """

    def __init__(self, actor_critic: ActorCritic, name: str) -> None:
        # Not wrapped: no gradient is synchronised, and hooks that gather weights are in the module itself.
        self.actor_critic = actor_critic
        self.name = name
        self.config = actor_critic.config

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.actor_critic.policy.device

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """input_ids and attention_mask [B, T], padded on the right → logits [B, 1], fp32."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        (scores,) = self.actor_critic(inputs, task=self.name)
        return SequenceClassifierOutput(logits=scores.unsqueeze(-1))
