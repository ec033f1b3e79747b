"""A linear actor-critic and a random rollout of it, in torch, for tests of `update`."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from reference import ppo as reference
from torch import Tensor, nn

from ppo_core import Batch, entropy

NUM_FEATURES, NUM_ACTIONS = 3, 4


class ToyActorCritic(nn.Module):
    """Logits and values linear in the features. It has no `forward`: `evaluate` is all that `update` may ask for."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.actor = nn.Parameter(torch.randn(NUM_ACTIONS, NUM_FEATURES, generator=generator))
        self.critic = nn.Parameter(torch.randn(NUM_FEATURES, generator=generator))

    def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        x = minibatch.inputs["x"]
        logits = x @ self.actor.T
        logprobs = logits.log_softmax(-1).gather(-1, minibatch.inputs["actions"].unsqueeze(-1)).squeeze(-1)
        # What a real model may put out at padding: anything.
        poison = minibatch.inputs["poison"]
        return logprobs + poison, x @ self.critic + poison, entropy(logits) + poison


def make_batch(lengths: list[int], seed: int = 0, off_policy: float = 0.3, num_steps: int | None = None) -> Batch:
    """A random rollout with rows of `lengths`; `off_policy` is how far the old policy is from `ToyActorCritic(0)`."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_steps = len(lengths), num_steps or max(lengths)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = {
        "x": randn(num_rows, num_steps, NUM_FEATURES),
        "actions": torch.randint(NUM_ACTIONS, (num_rows, num_steps), generator=generator),
        "poison": torch.zeros(num_rows, num_steps),
    }
    mask = torch.arange(num_steps) < torch.tensor(lengths).unsqueeze(1)
    blank = torch.zeros(num_rows, num_steps)
    batch = Batch(inputs, blank, blank, blank, blank, mask)
    with torch.no_grad():
        logprobs, values, _ = ToyActorCritic(0).evaluate(batch)
    return replace(
        batch,
        old_logprobs=logprobs + off_policy * randn(num_rows, num_steps),
        old_values=values + off_policy * randn(num_rows, num_steps),
        advantages=randn(num_rows, num_steps),
        returns=values + randn(num_rows, num_steps),
    )


def poisoned(batch: Batch, garbage: float) -> Batch:
    """The same batch with `garbage` wherever it is masked, in what the policy puts out, too."""

    def poison(tensor: Tensor) -> Tensor:
        return torch.where(batch.mask, tensor, garbage)

    return Batch(
        inputs={**batch.inputs, "poison": poison(batch.inputs["poison"])},
        old_logprobs=poison(batch.old_logprobs),
        old_values=poison(batch.old_values),
        advantages=poison(batch.advantages),
        returns=poison(batch.returns),
        mask=batch.mask,
    )


def parameters(policy: Any) -> Tensor:
    """All parameters in one vector, detached."""
    return torch.cat([p.detach().flatten() for p in policy.parameters()]).clone()


def to_reference(batch: Batch) -> reference.Data:
    """The batch in float64 NumPy."""

    def array(tensor: Tensor) -> Any:
        return tensor.numpy().astype(np.float64)

    return reference.Data(
        x=array(batch.inputs["x"]),
        actions=batch.inputs["actions"].numpy(),
        old_logprobs=array(batch.old_logprobs),
        old_values=array(batch.old_values),
        advantages=array(batch.advantages),
        returns=array(batch.returns),
        mask=batch.mask.numpy(),
    )


def to_linear(policy: ToyActorCritic) -> reference.Linear:
    """The toy's parameters in float64 NumPy."""
    return reference.Linear(
        policy.actor.detach().numpy().astype(np.float64), policy.critic.detach().numpy().astype(np.float64)
    )
