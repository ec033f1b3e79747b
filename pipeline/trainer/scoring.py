"""A rollout to a scored one: reward functions and models, normalised and clipped, less the missing-EOS penalty."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from tieback.pipeline.rollout.texts import Rollout
from tieback.pipeline.scorers import Scorer, call_scorers, combine_rewards
from tieback.pipeline.trainer.config import PPOConfig
from tieback.pipeline.trainer.failures import failing_together
from tieback.pipeline.trainer.rewards import (
    MomentsOfEach,
    RunningMoments,
    ScoredRollout,
    overlong_shares,
    place_rewards,
)
from tieback.pipeline.trainer.time_limit import time_limit
from tieback.pipeline.trainer.token_gains import with_gains


def score_rollout(
    rollout: Rollout,
    scorers: Sequence[Scorer],
    weights: Sequence[float],
    moments: RunningMoments,
    moments_of_each: MomentsOfEach,
    accelerator: Accelerator,
    args: PPOConfig,
    training: bool,
) -> ScoredRollout:
    """Judge each completion; all processes must call.

    Args:
        rollout: B completions.
        scorers: F of them.
        weights: F weights.
        moments: of the weighted sums so far.
        moments_of_each: of the rewards of each scorer so far.
        accelerator: of the training.
        args: settings.
        training: whether the moments take these scores in.

    Raises:
        UsageError: a scorer failed, or did not answer in time.
        PeerFailure: one did on another process.
    """
    device = accelerator.device
    # The slowest judge is waited for here, up to ddp_timeout: DeepSpeed has process groups with a limit of their own.
    with (
        failing_together(accelerator),
        time_limit(args.rollout_timeout, "Reward functions", "rollout_timeout"),
    ):
        judged = call_scorers(scorers, rollout)
        rewards = torch.tensor([function.totals for function in judged], device=device).T
        raw_scores = combine_rewards(rewards, list(weights), rollout)
        if args.per_token_reward_model:
            judged = with_gains(judged, scorers, rollout)
    if args.normalize_each_reward:
        if training:
            moments_of_each.update(accelerator.gather(rewards))
        weights = [weight / std for weight, std in zip(weights, moments_of_each.stds, strict=True)]
    token_scores = place_rewards(judged, weights, rollout, device)
    if args.normalize_rewards:
        if training:
            moments.update(accelerator.gather(combine_rewards(rewards, list(weights), rollout)))
        token_scores = token_scores / moments.std
    if args.reward_clip is not None:
        token_scores = token_scores.clamp(-args.reward_clip, args.reward_clip)
    if args.truncation == "penalty":
        shares = overlong_shares(rollout, args.max_completion_length, args.overlong_buffer_length)
        last = torch.tensor([[rollout.written(row)[-1]] for row in range(len(rollout))], device=device)
        penalties = -args.missing_eos_penalty * shares.to(device).unsqueeze(1)
        token_scores = token_scores.scatter_add(1, last, penalties)
    return ScoredRollout(rollout, rewards, raw_scores, token_scores)
