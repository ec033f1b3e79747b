"""Checks of the ratio before the first step, which must be 1: sampling and scoring use the same probabilities."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tieback.cli.errors import UsageError
from tieback.pipeline.rollout.sampler import Sampler
from tieback.pipeline.rollout.token_scores import completion_logprobs, pack_sequences
from tieback.pipeline.trainer.actor_critic import ActorCritic
from tieback.pipeline.trainer.models import active_dropouts

# |log ratio| that rounding explains, in fp32 and in bf16: the largest one, and that which QUANTILE of all tokens stay below.
# In bf16 SmolLM2-135M comes to 0.17 and 0.05; with a temperature of 0.9 in one of two, or a token of padding that is
# attended to, to more than 1 and 0.34.
FP32_TOLERANCE, BF16_TOLERANCE = 1e-3, 1.0
QUANTILE = 0.75
FP32_QUANTILE, BF16_QUANTILE = 1e-4, 0.15
# Tokens that are compared, of a completion.
_LENGTH = 32


class SelfCheckError(UsageError):
    """Sampling and scoring disagree, so that PPO's ratio would be wrong."""


@torch.no_grad()
def check_sampling(
    model: ActorCritic,
    sampler: Sampler,
    prompt_ids: list[list[int]],
    accelerator: Accelerator,
    corrected: bool = False,
) -> None:
    """Sample for a few prompts, and compare the probabilities that were drawn from with those of scoring.

    Old log-probabilities come from scoring, so the ratio is 1 at first even where sampling differs; only this
    comparison shows left padding, a temperature or a logits processor that scoring does not know of.

    Args:
        model: what is trained; the sampler has its weights.
        sampler: of the rollouts.
        prompt_ids: token ids of the prompts.
        accelerator: of the training.
        corrected: whether importance sampling makes up for a difference; it may then be as large as in bf16.

    Raises:
        SelfCheckError: they differ by more than rounding.
    """
    device = accelerator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        completions = sampler.sample(prompt_ids, with_logprobs=True, max_length=_LENGTH)
    # Any id pads: masks come from lengths.
    inputs = pack_sequences(prompt_ids, [completion.ids for completion in completions], 0, device)
    scored, _ = completion_logprobs(model.policy, inputs, model.temperature)
    drawn = torch.tensor([value for completion in completions for value in completion.logprobs or []])
    differences = (drawn.to(device) - scored[inputs["mask"]]).abs()
    largest, most = float(differences.max()), float(differences.quantile(QUANTILE))
    exact = _is_exact(model, accelerator.mixed_precision) and not corrected
    tolerances = (FP32_TOLERANCE, FP32_QUANTILE) if exact else (BF16_TOLERANCE, BF16_QUANTILE)
    if not (largest <= tolerances[0] and most <= tolerances[1]):
        raise SelfCheckError(
            f"generate() and scoring disagree by up to {largest:.3g} nats about the probability of a sampled token, and by "
            f"more than {most:.3g} for every fourth. {_suspects(model, sampler)}"
        )


def check_ratio(max_abs_log_ratio: float, model: nn.Module, mixed_precision: str) -> None:
    """Check that the first minibatch, before any step, gave back the rollout's log-probabilities.

    Raises:
        SelfCheckError: its ratio is not 1.
    """
    if not max_abs_log_ratio <= (FP32_TOLERANCE if _is_exact(model, mixed_precision) else BF16_TOLERANCE):
        raise SelfCheckError(
            f"Before the first step the probability ratio must be 1, but the largest |log ratio| is "
            f"{max_abs_log_ratio:.3g}. {_suspects(model)}"
        )


# Mean gap of a rollout, in nats, that another engine's rounding explains.
FP32_GAP, BF16_GAP = 1e-3, 0.15


def sampling_gap(
    drawn: list[list[float]],
    scored: Tensor,
    mask: Tensor,
    model: nn.Module,
    accelerator: Accelerator,
    corrected: bool = False,
) -> dict[str, float]:
    """How far the engine that sampled is from scoring, over the rollout of all processes, all of which must call.

    Args:
        drawn: log-probabilities of each of B completions' tokens by the engine.
        scored: [B, T], the same by scoring.
        mask: bool [B, T], True on the policy's tokens.
        model: what is trained.
        accelerator: of the training.
        corrected: whether importance sampling makes up for the difference; it may then be as large as in bf16.

    Returns:
        `rollout/logprob_gap_mean` and `rollout/logprob_gap_max`, in nats, and `rollout/ratio_max` of scoring over engine.

    Raises:
        SelfCheckError: they differ by more than rounding.
    """
    log_ratios = (scored - as_rows(drawn, scored))[mask]
    gaps = log_ratios.abs()
    own = torch.stack([gaps.sum(), torch.tensor(float(len(gaps))).to(gaps), gaps.max(), log_ratios.max()])
    total, count, largest, ratio = accelerator.gather(own[None]).unbind(1)
    mean = float(total.sum() / count.sum())
    exact = _is_exact(model, accelerator.mixed_precision) and not corrected
    if not mean <= (FP32_GAP if exact else BF16_GAP):
        raise SelfCheckError(
            f"The sampler and scoring disagree by {mean:.3g} nats a token in the mean, by {float(largest.max()):.3g} at most, about "
            "the probability of what was sampled: its weights or its temperature are not the policy's."
        )
    return {
        "rollout/logprob_gap_mean": mean,
        "rollout/logprob_gap_max": float(largest.max()),
        "rollout/ratio_max": math.exp(float(ratio.max())),
    }


def as_rows(drawn: list[list[float]], like: Tensor) -> Tensor:
    """Log-probabilities of B completions' tokens as a tensor like `like` [B, T], 0 behind a completion's end."""
    rows = [row + [0.0] * (like.shape[1] - len(row)) for row in drawn]
    return torch.tensor(rows).to(like)


def _is_exact(model: nn.Module, mixed_precision: str) -> bool:
    """Whether it computes in fp32: neither under autocast in bf16, nor with weights in less (a quantised base, say)."""
    return mixed_precision == "no" and all(p.dtype == torch.float32 for p in model.parameters())


def _suspects(model: nn.Module, sampler: Sampler | None = None) -> str:
    found = [
        f"{'dropout' if attribute == 'p' else attribute} {getattr(module, attribute)} is active in {name} "
        "(set disable_dropout=True)"
        for name, module, attribute in active_dropouts(model)
        if module.training
    ]
    if sampler is not None:
        found += sampler.unlike_scoring()
    if found:
        return "Likely cause: " + "; ".join(found[:3]) + "."
    return (
        "No dropout and no sampling setting explains it: the model itself computes differently in the two passes "
        "(a state that training mode changes, a router that draws experts at random as Phi-MoE's does, padding that it attends "
        "to, or an attention kernel that is not exact)."
    )
