"""The losses of PPO, per element, and the settings that they and `update` read.

Tensors are float32 `[B, T]` and so are the results: the caller takes the mean over its mask. A non-finite input
gives a non-finite element, but no non-finite gradient (0 · NaN) to what the mask then leaves out.
"""

import math
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

# exp of more overflows in float32, and 0 · inf would be a NaN gradient on the branch that min or the mask drops.
_MAX_EXPONENT = 80.0


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate, negated to be minimised.

        ρ_t = π(a_t | s_t) / π_old(a_t | s_t)
        L_t = −min(ρ_t A_t, clip(ρ_t, 1 − ε, 1 + ε_high) A_t)

    Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7. A higher upper bound ε_high is the
    "clip-higher" of Yu et al. 2025 (DAPO, eq. 10). With `dual_clip` c, the objective −L_t is at least c·A_t where
    A_t < 0 (Ye et al. 2020, "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning", eq. 3).

    Args:
        logprobs: `[B, T]`, log π of the actions taken; the gradient flows into it.
        old_logprobs: `[B, T]`, log π_old of the same actions.
        advantages: `[B, T]`.
        clip_range: ε.
        clip_range_high: ε_high; ε when None.
        dual_clip: c > 1; no such bound when None.

    Returns:
        `[B, T]`, loss of each element.
    """
    finite, (log_ratio, advantages) = _finite(logprobs - old_logprobs, advantages)
    ratio = torch.exp(log_ratio.clamp(max=_MAX_EXPONENT))
    upper = 1 + (clip_range if clip_range_high is None else clip_range_high)
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, upper) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return torch.where(finite, -objective, torch.nan)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, value_clip_range: float | None = None
) -> Tensor:
    """Squared error of the critic, clipped like the policy's ratio.

        L_t = ½ max((V_t − R_t)², (clip(V_t, V_old,t − ε, V_old,t + ε) − R_t)²)

    From the code of Schulman et al. 2017 (OpenAI Baselines `ppo2`); the plain ½ (V_t − R_t)² without a range.

    Args:
        values: `[B, T]`, the critic's values; the gradient flows into it.
        old_values: `[B, T]`, its values at the time of the rollout.
        returns: `[B, T]`, targets.
        value_clip_range: ε; no clipping when None.

    Returns:
        `[B, T]`, loss of each element; not yet multiplied by a coefficient.
    """
    if value_clip_range is None:
        finite, (values, returns) = _finite(values, returns)
        squares = (values - returns).square()
    else:
        finite, (values, old_values, returns) = _finite(values, old_values, returns)
        clipped = torch.clamp(values, old_values - value_clip_range, old_values + value_clip_range)
        squares = torch.maximum((values - returns).square(), (clipped - returns).square())
    return torch.where(finite, 0.5 * squares, torch.nan)


def entropy(logits: Tensor) -> Tensor:
    """Entropy −Σ_a π(a) log π(a) of categorical distributions, in nats.

    Args:
        logits: `[..., A]`, unnormalised log-probabilities; −inf for an action that cannot be taken.

    Returns:
        `[...]`, between 0 and log A.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(dim=-1)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate KL(policy ‖ ref) from samples of the policy, per element.

    With d = log π(a) − log π_ref(a):

        k1 = d                   unbiased; may be negative; right for a penalty inside the reward
        k2 = d² / 2              biased; as a loss, its gradient is that of the KL
        k3 = exp(−d) − 1 + d     unbiased and never negative; as a loss, its gradient is that of KL(ref ‖ policy)

    Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html).

    Args:
        logprobs: `[B, T]`, log π of actions sampled from π.
        ref_logprobs: `[B, T]`, log π_ref of the same actions.
        estimator: "k1", "k2" or "k3".

    Returns:
        `[B, T]`, in nats.

    Raises:
        ValueError: there is no such estimator.
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    finite, (safe,) = _finite(log_ratio)
    if estimator == "k2":
        estimate = safe.square() / 2
    elif estimator == "k3":
        # expm1, because exp(−d) − 1 loses all digits where the two policies are close.
        estimate = torch.expm1((-safe).clamp(max=_MAX_EXPONENT)) + safe
    else:
        raise ValueError(f'Unknown KL estimator {estimator!r}: use "k1", "k2" or "k3".')
    return torch.where(finite, estimate, log_ratio.detach().abs())


def _finite(*tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Where all of `tensors` are finite, and the tensors with 0 where not all are."""
    finite = reduce(torch.logical_and, [torch.isfinite(tensor) for tensor in tensors])
    return finite, [torch.where(finite, tensor, 0.0) for tensor in tensors]


@dataclass
class PPOHyperparameters:
    """Settings of the objective and of `update`.

    A configuration may inherit from it together with other dataclasses, such as Transformers' `TrainingArguments`.

    Args:
        clip_range: ε of the policy's ratio.
        clip_range_high: upper ε, where it differs from the lower one.
        dual_clip: bound c > 1 on the loss of bad actions that became likelier.
        value_clip_range: ε of the values around those of the rollout; no clipping when None.
        vf_coef: weight of the value loss.
        ent_coef: weight of the entropy bonus.
        gamma: discount a step.
        gae_lambda: λ of GAE.
        num_ppo_epochs: passes over a rollout.
        num_minibatches: optimiser steps a pass.
        max_grad_norm: bound on the norm of all gradients together; 0 for none.
        target_kl: end an update early, before the step at which the approximate KL to the rollout's policy is
            more than 1.5 times this.
        whiten_advantages: scale the advantages of a rollout to mean 0 and variance 1.

    Raises:
        ValueError: a setting is out of its range.
    """

    clip_range: float = field(
        default=0.2, metadata={"help": "Range of the policy ratio: it is clipped below 1 - clip_range."}
    )
    clip_range_high: float | None = field(
        default=None,
        metadata={"help": "The ratio is clipped above 1 + clip_range_high; clip_range when not given."},
    )
    dual_clip: float | None = field(
        default=None,
        metadata={"help": "Where the advantage A is negative, the objective is at least dual_clip * A; > 1."},
    )
    value_clip_range: float | None = field(
        default=0.2,
        metadata={"help": "Range of the values around those of the rollout; null for no clipping."},
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    ent_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of the reward, a step."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    num_minibatches: int = field(
        default=1, metadata={"help": "Parts of a rollout; one optimiser step each, in every pass."}
    )
    max_grad_norm: float = field(
        default=1.0,
        metadata={"help": "The norm of all gradients together is clipped to this; 0 for no clipping."},
    )
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "End an update before the step at which the approximate KL to the rollout's policy exceeds "
            "1.5 * target_kl; never when not given."
        },
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Scale the advantages of each rollout to mean 0 and variance 1."}
    )

    def __post_init__(self) -> None:
        self.validate()
        # A class that inherits from this one and from another dataclass gets the other's checks, too.
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    def validate(self) -> None:
        """Check each setting.

        Raises:
            ValueError: a setting is out of its range.
        """
        for name in ("clip_range", "clip_range_high", "value_clip_range", "target_kl"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be greater than 0, but is {value}.")
        for name in ("vf_coef", "ent_coef", "max_grad_norm"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a finite number of at least 0, but is {value}.")
        for name in ("gamma", "gae_lambda"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, but is {value}.")
        for name in ("num_ppo_epochs", "num_minibatches"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be a whole number of at least 1, but is {value}.")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be greater than 1, but is {self.dual_clip}.")
