"""The module that PPO trains: a policy and a separate critic, scored on sequences without left padding."""

from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from tieback.pipeline.rollout.token_scores import base_model, completion_logprobs, completion_values
from tieback.pipeline.trl_internals import use_adapter
from tieback.ppo_core import Batch


class ActorCritic(nn.Module):
    """Policy and critic in one module, so that one engine, one optimiser and one checkpoint hold both.

    Args:
        policy: causal language model, or one wrapped by PEFT.
        critic: sequence-classification model with one label and a `score` head.
        temperature: sampling temperature.
        entropy_requires_grad: whether the objective has an entropy bonus.
        reference_adapter: for a PEFT policy, the adapter of the frozen reference (None: the base model without
            an adapter).
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        critic: PreTrainedModel,
        temperature: float,
        entropy_requires_grad: bool,
        reference_adapter: str | None = None,
    ):
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.temperature = temperature
        self.entropy_requires_grad = entropy_requires_grad
        self.reference_adapter = reference_adapter
        # What Trainer, DeepSpeed, FSDP and TRL ask of a model.
        self.is_gradient_checkpointing = False
        self._checkpointing: dict[str, Any] = {}
        self.config = policy.config
        self.generation_config = policy.generation_config
        layers = [getattr(model, "_no_split_modules", None) or [] for model in (base_model(policy), critic)]
        self._no_split_modules = sorted({name for names in layers for name in names})

    def forward(self, batch: Batch | dict[str, Tensor], task: str = "score") -> tuple[Tensor, ...]:
        """Everything goes through here, which is what DDP, DeepSpeed, FSDP and autocast wrap.

        Args:
            batch: a minibatch, or its `inputs` alone (see `completion_logprobs`).
            task: for inputs alone: "score" (log-probabilities [b, T] and values
                [b, T + 1]) or "reference" (log-probabilities [b, T] of the frozen reference adapter).
        """
        if isinstance(batch, Batch):
            return self.evaluate(batch)
        if task == "reference":
            with use_adapter(self.policy, self.reference_adapter):
                return (completion_logprobs(self.policy, batch, self.temperature)[0],)
        return completion_logprobs(self.policy, batch, self.temperature)[0], completion_values(
            self.critic, batch
        )

    def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, values and entropy, each [b, T]: all that `ppo_core.update` asks of an actor-critic."""
        inputs = minibatch.inputs
        logprobs, entropy = completion_logprobs(
            self.policy, inputs, self.temperature, self.entropy_requires_grad
        )
        return logprobs, completion_values(self.critic, inputs)[:, :-1], entropy

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
        """Recompute activations in the backward pass of policy and critic.

        The first settings stay: TRL switches this off to generate and on again after, with fewer than Trainer gave.
        """
        if not self._checkpointing:
            self._checkpointing = {"gradient_checkpointing_kwargs": gradient_checkpointing_kwargs, **kwargs}
        self.is_gradient_checkpointing = True
        for model in (self.policy, self.critic):
            model.gradient_checkpointing_enable(**self._checkpointing)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The same, by the name that newer versions of Trainer call it."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass."""
        self.is_gradient_checkpointing = False
        for model in (self.policy, self.critic):
            model.gradient_checkpointing_disable()
