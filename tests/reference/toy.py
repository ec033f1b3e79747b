"""A linear actor-critic and a random rollout of it, in torch, for tests of `update`."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from reference import ppo as reference
from tieback.ppo_core import Batch, PPOHyperparameters, PPOStats, entropy, update

NUM_FEATURES, NUM_ACTIONS = 3, 4
LENGTHS = [1, 3, 5, 2, 5, 4, 1]
PLAIN = PPOHyperparameters(num_ppo_epochs=1, whiten_advantages=False, max_grad_norm=0.0)
HARD = PPOHyperparameters(num_ppo_epochs=2, num_minibatches=2, ent_coef=0.1, dual_clip=2.0, max_grad_norm=0.3)


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


def make_batch(
    lengths: list[int], seed: int = 0, off_policy: float = 0.3, num_steps: int | None = None
) -> Batch:
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


def with_reference_and_weights(batch: Batch, seed: int = 5) -> Batch:
    """The same batch with a reference policy near that of the rollout, and with importance weights."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch.mask.shape
    return replace(
        batch,
        ref_logprobs=batch.old_logprobs + torch.randn(shape, generator=generator),
        importance_weights=2 * torch.rand(shape, generator=generator),
    )


def with_imitation(batch: Batch, seed: int = 6) -> Batch:
    """The same batch with weights of imitation at half of all steps, masked ones among them."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch.mask.shape
    imitated = torch.rand(shape, generator=generator) < 0.5
    return replace(batch, imitation_weights=imitated * torch.rand(shape, generator=generator))


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
        ref_logprobs=None if batch.ref_logprobs is None else poison(batch.ref_logprobs),
        importance_weights=None if batch.importance_weights is None else poison(batch.importance_weights),
        imitation_weights=batch.imitation_weights,
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


class CountingSGD(torch.optim.SGD):
    """Counts its steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps = 0

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        super().step(closure)


def run(
    batch: Batch,
    hyper: PPOHyperparameters,
    micro_batch_size: int = 2,
    learning_rate: float = 0.5,
    policy: Any = None,
    optimizer: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, PPOStats]:
    """Update the toy with SGD and rows permuted by seed 7; its parameters afterwards, and the figures."""
    policy = policy or ToyActorCritic()
    optimizer = optimizer or torch.optim.SGD(policy.parameters(), lr=learning_rate)
    accelerator = kwargs.pop("accelerator", None) or Accelerator(cpu=True)
    kwargs.setdefault("generator", torch.Generator().manual_seed(7))
    stats = update(policy, optimizer, batch, hyper, accelerator, micro_batch_size, **kwargs)
    return parameters(policy), stats


def assert_same(one: tuple[Tensor, PPOStats], other: tuple[Tensor, PPOStats]) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=2e-6, atol=2e-6)
    assert one[1].metrics() == pytest.approx(other[1].metrics(), rel=2e-5, abs=1e-6)
