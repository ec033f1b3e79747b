"""The objective of PPO: its losses, per element, and the terms that `update` sums.

Tensors are float32 `[B, T]` and so are the results: the caller takes the mean over its mask. A non-finite input
gives a non-finite element, but no non-finite gradient (0 · NaN) to what the mask then leaves out.
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from tieback.ppo_core.batch import Batch
from tieback.ppo_core.hyperparameters import PPOHyperparameters
from tieback.ppo_core.value_bins import expected_values, two_hot_loss

# exp of more overflows in float32, and 0 · inf would be a NaN gradient on the branch that min or the mask drops.
_MAX_EXPONENT = 80.0


class PolicyOutputs(NamedTuple):
    """What an actor-critic's `evaluate` returns of a minibatch, each `[B, T]`.

    Args:
        logprobs: log-probabilities of the minibatch's actions.
        values: the critic's values.
        entropies: of the distributions over actions, in nats.
        value_logits: `[B, T, K]`, over the bins of the values; None for a critic of one number.
    """

    logprobs: Tensor
    values: Tensor
    entropies: Tensor
    value_logits: Tensor | None = None


def policy_outputs(
    logprobs: Tensor, values: Tensor, entropies: Tensor, hyper: PPOHyperparameters
) -> PolicyOutputs:
    """What an actor-critic's `evaluate` has returned, with the values of a critic that gives logits over bins.

    Args:
        logprobs: `[B, T]`.
        values: `[B, T]`; with `hyper.value_bins` K, logits `[B, T, K]`.
        entropies: `[B, T]`.
        hyper: that says which.
    """
    if hyper.value_bins is None:
        return PolicyOutputs(logprobs, values, entropies)
    return PolicyOutputs(logprobs, expected_values(values, hyper.value_range), entropies, values)


class Term(NamedTuple):
    """One term of the loss: coefficient · mean over unmasked elements.

    Args:
        coefficient: weight of the term, negative where the mean is to grow; 0 leaves the term out of the loss, and
            then its elements need not be finite.
        elements: `[B, T]`, before the coefficient; the gradient flows through it.
        trains_critic: whether the term fits the critic. Terms that do are all of the loss while the critic alone
            is trained (`update` with `value_only`).
        mask: bool `[B, T]`, where the term counts; the batch's mask when None. It is divided by the number of the batch's
            unmasked elements in any case.
    """

    coefficient: float
    elements: Tensor
    trains_critic: bool = False
    mask: Tensor | None = None


def ppo_terms(batch: Batch, outputs: PolicyOutputs, hyper: PPOHyperparameters) -> dict[str, Term]:
    """Terms of the loss that `update` minimises, in the order in which they are added.

    A further term is one more entry here. Its name is the name under which its mean, before the coefficient, is
    logged.

    Args:
        batch: B rows of T steps.
        outputs: of the policy on `batch`.
        hyper: coefficients and clip ranges.

    Raises:
        ValueError: the KL is to be in the loss, but the batch has no reference.
    """
    if outputs.value_logits is None:
        critic_loss = value_loss(
            outputs.values, batch.old_values, batch.returns, hyper.value_clip_range, hyper.huber_delta
        )
    else:
        critic_loss = two_hot_loss(outputs.value_logits, batch.returns, hyper.value_range)
    weights = batch.importance_weights
    surrogate = policy_loss(
        outputs.logprobs,
        batch.old_logprobs,
        batch.advantages,
        hyper.clip_range,
        hyper.clip_range_high,
        hyper.dual_clip,
    )
    terms = {
        "value/loss": Term(hyper.vf_coef, critic_loss, trains_critic=True),
        "policy/loss": Term(1.0, _weighted(surrogate, weights)),
        "policy/entropy": Term(-hyper.ent_coef, outputs.entropies),
    }
    if hyper.kl_loss_coef:
        if batch.ref_logprobs is None:
            raise ValueError("kl_loss_coef needs a reference policy, but the batch has no ref_logprobs.")
        kl = kl_loss(outputs.logprobs, batch.old_logprobs, batch.ref_logprobs, hyper.kl_loss_estimator)
        terms["kl/loss"] = Term(hyper.kl_loss_coef, _weighted(kl, weights))
    if batch.imitation_weights is not None:
        likelihood = _weighted(-outputs.logprobs, batch.imitation_weights)
        terms["imitation/loss"] = Term(1.0, likelihood, mask=batch.imitation_weights != 0)
    return terms


def clip_bounds(clip_range: float, clip_range_high: float | None) -> tuple[float, float]:
    """Bounds of the ratio: 1 − ε and 1 + ε_high, where ε_high is ε when None."""
    return 1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high)


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
    lower, upper = clip_bounds(clip_range, clip_range_high)
    objective = torch.minimum(ratio * advantages, ratio.clamp(lower, upper) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return torch.where(finite, -objective, torch.nan)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    value_clip_range: float | None = None,
    huber_delta: float | None = None,
) -> Tensor:
    """Squared error of the critic, clipped like the policy's ratio.

        L_t = ½ max((V_t − R_t)², (clip(V_t, V_old,t − ε, V_old,t + ε) − R_t)²)

    From the code of Schulman et al. 2017 (OpenAI Baselines `ppo2`); the plain ½ (V_t − R_t)² without a range. With
    `huber_delta` δ, ½ e² is δ (|e| − ½ δ) where |e| > δ (Huber 1964, "Robust Estimation of a Location Parameter"), so that no
    return has a gradient of more than δ.

    Args:
        values: `[B, T]`, the critic's values; the gradient flows into it.
        old_values: `[B, T]`, its values at the time of the rollout.
        returns: `[B, T]`, targets.
        value_clip_range: ε; no clipping when None.
        huber_delta: δ; squared errors when None.

    Returns:
        `[B, T]`, loss of each element; not yet multiplied by a coefficient.
    """
    if value_clip_range is None:
        finite, (values, returns) = _finite(values, returns)
        losses = _error_loss(values, returns, huber_delta)
    else:
        finite, (values, old_values, returns) = _finite(values, old_values, returns)
        clipped = torch.clamp(values, old_values - value_clip_range, old_values + value_clip_range)
        losses = torch.maximum(
            _error_loss(values, returns, huber_delta), _error_loss(clipped, returns, huber_delta)
        )
    return torch.where(finite, losses, torch.nan)


def _error_loss(values: Tensor, returns: Tensor, huber_delta: float | None) -> Tensor:
    if huber_delta is None:
        return 0.5 * (values - returns).square()
    return huber_loss(values, returns, reduction="none", delta=huber_delta)


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


def kl_loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """KL(policy ‖ ref) as a loss, per element, from actions of the rollout's policy.

    With ρ = π(a) / π_old(a) and d = log π(a) − log π_ref(a):

        k1 = ρ · d
        k3 = ρ · (exp(−d) − 1 + d)
        k2 = sg(ρ) · d² / 2            sg: no gradient flows through it

    The mean of k1 and k3 over actions of π_old is the KL of π, and the gradient of that mean its gradient: k1's is
    ρ · (d + 1) · ∇log π, k3's ρ · d · ∇log π, whose variance is smaller. k2 has k3's gradient, but is itself biased.
    An estimator of `kl_estimate` as it stands has neither, once π has moved from π_old (Tang and Munos 2025, "On a few
    pitfalls in KL divergence gradient estimation for RL").

    It is the KL in the states that the rollout has visited: that an action leads to states of more or less KL is
    seen by a penalty in the reward alone.

    Args:
        logprobs: `[B, T]`, log π of actions sampled from π_old; the gradient flows into it.
        old_logprobs: `[B, T]`, log π_old of the same actions.
        ref_logprobs: `[B, T]`, log π_ref of the same actions.
        estimator: "k1", "k2" or "k3".

    Returns:
        `[B, T]`, in nats.

    Raises:
        ValueError: there is no such estimator.
    """
    finite, (log_ratio, from_ref) = _finite(logprobs - old_logprobs, logprobs - ref_logprobs)
    ratio = torch.exp(log_ratio.clamp(max=_MAX_EXPONENT))
    if estimator == "k2":
        ratio = ratio.detach()
    estimate = kl_estimate(from_ref, torch.zeros_like(from_ref), estimator)
    return torch.where(finite, ratio * estimate, torch.nan)


def _weighted(elements: Tensor, weights: Tensor | None) -> Tensor:
    """The product, without a NaN gradient where a weight under the mask is not finite."""
    if weights is None:
        return elements
    finite, (safe,) = _finite(weights)
    return torch.where(finite, elements * safe, torch.nan)


def _finite(*tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Where all of `tensors` are finite, and the tensors with 0 where not all are."""
    finite = reduce(torch.logical_and, [torch.isfinite(tensor) for tensor in tensors])
    return finite, [torch.where(finite, tensor, 0.0) for tensor in tensors]
