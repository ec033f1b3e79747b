"""What the policy and the critic learn from: a scored rollout as a batch of advantages and returns."""

from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from tieback.cli.errors import UsageError
from tieback.pipeline.trainer.config import PPOConfig
from tieback.pipeline.trainer.rewards import ScoredRollout, last_written, token_rewards
from tieback.ppo_core import Batch, gae, kl_estimate, length_adaptive_lambda


def make_batch(
    scored: ScoredRollout,
    inputs: dict[str, Tensor],
    mask: Tensor,
    logprobs: Tensor,
    values: Tensor,
    ref_logprobs: Tensor,
    kl_coef: float,
    args: PPOConfig,
) -> Batch:
    """Advantages for the policy and returns for the critic, each by its own λ.

    Args:
        scored: B completions.
        inputs: of the actor-critic.
        mask: bool [B, T], True on the policy's tokens.
        logprobs: [B, T], of the tokens under the policy.
        values: [B, T + 1], of the critic.
        ref_logprobs: [B, T], under the reference.
        kl_coef: coefficient of the KL penalty in the reward.
        args: settings.
    """
    truncated = torch.tensor(scored.rollout.truncated, device=mask.device)
    kl = kl_estimate(logprobs, ref_logprobs, args.kl_estimator)
    bootstrap = None
    if args.truncation == "bootstrap":
        end_values = values.gather(1, last_written(mask) + 1).squeeze(1)
        bootstrap = torch.where(truncated, end_values, 0.0)
    rewards, discounts = token_rewards(scored.token_scores, kl, kl_coef, mask, args.gamma, bootstrap)

    gae_lambda: float | Tensor = args.gae_lambda
    if args.gae_lambda_alpha is not None:
        gae_lambda = length_adaptive_lambda(mask.sum(1), args.gae_lambda_alpha)
    advantages = gae(rewards, discounts, values, gae_lambda, mask)
    critic_advantages = advantages
    if args.critic_gae_lambda is not None:
        critic_advantages = gae(rewards, discounts, values, args.critic_gae_lambda, mask)
    return Batch(
        inputs=inputs,
        old_logprobs=logprobs,
        old_values=values[:, :-1],
        advantages=advantages,
        returns=critic_advantages + values[:, :-1],
        mask=mask,
        ref_logprobs=ref_logprobs,
    )


def check_some_ended(truncated: list[bool], accelerator: Accelerator) -> None:
    """Check that `without_truncated` leaves something to learn from; all processes must call.

    Raises:
        UsageError: every completion of every process was cut.
    """
    ended = torch.tensor(truncated.count(False), device=accelerator.device)
    if accelerator.reduce(ended, "sum") == 0:
        raise UsageError(
            "Every completion of this iteration was cut at max_completion_length, and truncation=mask leaves those out: there is "
            "nothing to learn from. Raise max_completion_length, or set truncation=penalty."
        )


def without_truncated(batch: Batch, truncated: list[bool]) -> Batch:
    """The batch with truncated completions under its mask."""
    cut = torch.tensor(truncated, device=batch.mask.device)
    return replace(batch, mask=batch.mask & ~cut.unsqueeze(1))
