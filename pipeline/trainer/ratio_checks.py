"""Checks of the ratio before the first step, which must be 1: sampling and scoring use the same probabilities."""

import torch
from accelerate import Accelerator
from torch import nn

from tieback.cli.errors import UsageError
from tieback.pipeline.rollout.sampler import Sampler
from tieback.pipeline.rollout.token_scores import completion_logprobs, pack_sequences
from tieback.pipeline.trainer.actor_critic import ActorCritic
from tieback.pipeline.trainer.models import active_dropouts

# Largest |log ratio| that rounding explains, in fp32 and in bf16.
FP32_TOLERANCE, BF16_TOLERANCE = 1e-3, 0.5


class SelfCheckError(UsageError):
    """Sampling and scoring disagree, so that PPO's ratio would be wrong."""


@torch.no_grad()
def check_sampling(
    model: ActorCritic, sampler: Sampler, prompt_ids: list[list[int]], accelerator: Accelerator
) -> None:
    """Sample for a few prompts, and compare the probabilities that were drawn from with those of scoring.

    Old log-probabilities come from scoring, so the ratio is 1 at first even where sampling differs; only this
    comparison shows left padding, a temperature or a logits processor that scoring does not know of.

    Args:
        model: what is trained; the sampler has its weights.
        sampler: of the rollouts.
        prompt_ids: token ids of the prompts.
        accelerator: of the training.

    Raises:
        SelfCheckError: they differ by more than rounding.
    """
    device = accelerator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        completions = sampler.sample(prompt_ids, with_logprobs=True)
    # Any id pads: masks come from lengths.
    inputs = pack_sequences(prompt_ids, [completion.ids for completion in completions], 0, device)
    scored, _ = completion_logprobs(model.policy, inputs, model.temperature)
    drawn = torch.tensor([value for completion in completions for value in completion.logprobs or []])
    difference = float((drawn.to(device) - scored[inputs["mask"]]).abs().max())
    if not difference <= _tolerance(model, accelerator.mixed_precision):
        raise SelfCheckError(
            f"generate() and scoring disagree by {difference:.3g} nats about the probability of a sampled token. "
            f"{_suspects(model, sampler)}"
        )


def check_ratio(max_abs_log_ratio: float, model: nn.Module, mixed_precision: str) -> None:
    """Check that the first minibatch, before any step, gave back the rollout's log-probabilities.

    Raises:
        SelfCheckError: its ratio is not 1.
    """
    if not max_abs_log_ratio <= _tolerance(model, mixed_precision):
        raise SelfCheckError(
            f"Before the first step the probability ratio must be 1, but the largest |log ratio| is "
            f"{max_abs_log_ratio:.3g}. {_suspects(model)}"
        )


def _tolerance(model: nn.Module, mixed_precision: str) -> float:
    """That of bf16 under autocast, and where weights themselves are kept in less than fp32 (a quantised base, say)."""
    exact = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    return FP32_TOLERANCE if exact and mixed_precision == "no" else BF16_TOLERANCE


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
        "(a state that training mode changes, padding that it attends to, or an attention kernel that is not exact)."
    )
