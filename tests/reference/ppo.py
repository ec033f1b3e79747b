"""PPO once more, written to be obvious: loops over single steps, gradients by formula, no masks in the arithmetic."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def gae_row(
    rewards: Array, discounts: Array, values: Array, gae_lambda: float, mask: NDArray[np.bool_]
) -> Array:
    """GAE as the λ-weighted mixture of n-step advantages, after deleting the masked steps."""
    kept = np.flatnonzero(mask)
    r, d = rewards[kept], discounts[kept]
    v = np.append(values[kept], values[-1])
    num = len(kept)
    advantages = np.zeros(len(mask))
    for t in range(num):
        n_step = []
        for n in range(1, num - t + 1):
            total, discount = 0.0, 1.0
            for k in range(t, t + n):
                total += discount * r[k]
                discount *= d[k]
            n_step.append(total + (discount * v[t + n] if discount else 0.0) - v[t])
        weights = [(1 - gae_lambda) * gae_lambda**i for i in range(len(n_step) - 1)]
        weights.append(gae_lambda ** (len(n_step) - 1))
        advantages[kept[t]] = np.dot(weights, n_step)
    return advantages


def whiten(x: Array, mask: NDArray[np.bool_], shift_mean: bool = True) -> Array:
    """Mean 0 (or as it was), population variance 1, over `x[mask]`."""
    kept = x[mask]
    result = np.zeros_like(x)
    result[mask] = (kept - kept.mean()) / np.sqrt(kept.var() + 1e-8) + (0.0 if shift_mean else kept.mean())
    return result


def policy_loss(
    ratio: float,
    advantage: float,
    low: float,
    high: float,
    dual_clip: float | None,
) -> tuple[float, float, bool]:
    """Loss, its slope in log π, and whether ratio clipping bound it, case by case."""
    if advantage >= 0:
        if ratio > 1 + high:
            return -(1 + high) * advantage, 0.0, advantage > 0
        return -ratio * advantage, -ratio * advantage, False
    if ratio < 1 - low:
        return -(1 - low) * advantage, 0.0, True
    if dual_clip is not None and ratio > dual_clip:
        return -dual_clip * advantage, 0.0, False
    return -ratio * advantage, -ratio * advantage, False


def value_loss(
    value: float, old: float, target: float, clip_range: float | None
) -> tuple[float, float, bool]:
    """Loss, its slope in the value, and whether clipping made it greater, case by case."""
    plain = 0.5 * (value - target) ** 2
    if clip_range is not None and abs(value - old) > clip_range:
        edge = old + clip_range * np.sign(value - old)
        if 0.5 * (edge - target) ** 2 > plain:
            return 0.5 * (edge - target) ** 2, 0.0, True
    return plain, value - target, False


@dataclass
class Linear:
    """Actor-critic with logits `actor @ x` and value `critic @ x`."""

    actor: Array  # [A, D]
    critic: Array  # [D]


@dataclass
class Data:
    """A rollout of `B` rows; every array but `x` ([B, T, D]) is [B, T]."""

    x: Array
    actions: NDArray[np.int64]
    old_logprobs: Array
    old_values: Array
    advantages: Array
    returns: Array
    mask: NDArray[np.bool_]


@dataclass
class Settings:
    """The settings that the reference reads."""

    low: float = 0.2
    high: float = 0.2
    dual_clip: float | None = None
    value_clip_range: float | None = None
    vf_coef: float = 0.1
    ent_coef: float = 0.0
    max_grad_norm: float = 0.0


FIGURES = (
    "policy/loss",
    "value/loss",
    "policy/entropy",
    "policy/approx_kl",
    "policy/ratio",
    "policy/clip_fraction",
    "value/clip_fraction",
)


def minibatch(
    model: Linear, data: Data, rows: Sequence[int], settings: Settings
) -> tuple[Linear, dict[str, float], int]:
    """Gradient of the mean loss over the unmasked steps of `rows`, mean figures, and the number of steps."""
    steps = [(b, t) for b in rows for t in range(data.mask.shape[1]) if data.mask[b, t]]
    gradient = Linear(np.zeros_like(model.actor), np.zeros_like(model.critic))
    figures = dict.fromkeys(FIGURES, 0.0)
    for b, t in steps:
        x, action = data.x[b, t], data.actions[b, t]
        logits = model.actor @ x
        log_probs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        probs = np.exp(log_probs)
        entropy = -np.dot(probs, log_probs)
        log_ratio = log_probs[action] - data.old_logprobs[b, t]
        ratio = np.exp(log_ratio)
        p_loss, p_slope, p_clipped = policy_loss(
            ratio, data.advantages[b, t], settings.low, settings.high, settings.dual_clip
        )
        v_loss, v_slope, v_clipped = value_loss(
            model.critic @ x, data.old_values[b, t], data.returns[b, t], settings.value_clip_range
        )
        one_hot = np.eye(len(logits))[action]
        entropy_slope = -probs * (log_probs + entropy)
        gradient.actor += np.outer(p_slope * (one_hot - probs) - settings.ent_coef * entropy_slope, x)
        gradient.critic += settings.vf_coef * v_slope * x
        terms = (p_loss, v_loss, entropy, ratio - 1 - log_ratio, ratio, p_clipped, v_clipped)
        for name, term in zip(FIGURES, terms, strict=True):
            figures[name] += float(term)
    num = len(steps)
    mean_gradient = Linear(gradient.actor / num, gradient.critic / num)
    return mean_gradient, {name: total / num for name, total in figures.items()}, num


def update(
    model: Linear,
    data: Data,
    epochs: Sequence[Sequence[Sequence[int]]],
    settings: Settings,
    learning_rate: float,
) -> tuple[Linear, dict[str, float]]:
    """Plain gradient descent over given minibatches (epochs × minibatches × rows)."""
    model = Linear(model.actor.copy(), model.critic.copy())
    weighted, norms = [], []
    for rows in (rows for epoch in epochs for rows in epoch):
        gradient, figures, num = minibatch(model, data, rows, settings)
        norm = np.sqrt((gradient.actor**2).sum() + (gradient.critic**2).sum())
        scale = min(1.0, settings.max_grad_norm / norm) if settings.max_grad_norm else 1.0
        model.actor -= learning_rate * scale * gradient.actor
        model.critic -= learning_rate * scale * gradient.critic
        weighted.append((figures, num))
        norms.append(norm)
    total = sum(num for _, num in weighted)
    result = {name: sum(figures[name] * num for figures, num in weighted) / total for name in FIGURES}
    return model, {**result, "grad_norm": float(np.mean(norms))}


def numerical_gradient(function: Callable[[Array], float], point: Array, step: float = 1e-6) -> Array:
    """Central differences of a scalar function."""
    gradient = np.zeros_like(point)
    for index in np.ndindex(*point.shape):
        shift = np.zeros_like(point)
        shift[index] = step
        gradient[index] = (function(point + shift) - function(point - shift)) / (2 * step)
    return gradient
