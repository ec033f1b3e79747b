"""A rollout of the training, as `rollout_files` writes it."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tieback.data.conversations import last_text
from tieback.pipeline.rollout_files import RolloutFacts, write_rollout
from tieback.pipeline.trainer.config import PPOConfig
from tieback.pipeline.trainer.rewards import ScoredRollout
from tieback.ppo_core import Batch


def save_rollout(
    scored: ScoredRollout,
    batch: Batch,
    iteration: int,
    process: int,
    kl_coef: float,
    reward_names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
) -> None:
    """Write what an iteration learns from into `args.rollout_dir`.

    Args:
        scored: B completions of this process.
        batch: made of them, its mask True on the policy's tokens.
        iteration: counted from 1.
        process: number of this process.
        kl_coef: coefficient that the rewards were made with.
        reward_names: of the columns of `scored.rewards`.
        tokenizer: of the policy.
        args: settings; `rollout_dir` is set.
    """
    assert args.rollout_dir is not None
    assert batch.ref_logprobs is not None
    rollout, width = scored.rollout, batch.mask.shape[1]

    def padded(rows: list[list[Any]]) -> torch.Tensor:
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])

    tensors = {
        "completion_ids": padded(rollout.completion_ids),
        "mask": batch.mask,
        "logprobs": batch.old_logprobs,
        "ref_logprobs": batch.ref_logprobs,
        "values": batch.old_values,
        "advantages": batch.advantages,
        "returns": batch.returns,
        "raw_scores": scored.raw_scores,
        "token_scores": scored.token_scores,
        "truncated": torch.tensor(rollout.truncated),
        "function_rewards": scored.rewards,
    }
    if rollout.logprobs is not None:
        tensors["sampler_logprobs"] = padded(rollout.logprobs)
    rows = [
        {
            "prompt": prompt,
            "completion": last_text(completion),
            "tokens": tokenizer.batch_decode([[i] for i in ids]),
        }
        for prompt, completion, ids in zip(
            rollout.prompts, rollout.completions, rollout.completion_ids, strict=True
        )
    ]
    facts = RolloutFacts(
        iteration=iteration,
        kl_coef=kl_coef,
        kl_estimator=args.kl_estimator,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        gae_lambda_alpha=args.gae_lambda_alpha,
        critic_gae_lambda=args.critic_gae_lambda,
        truncation=args.truncation,
        num_generations=args.num_generations,
        importance_sampling=args.importance_sampling,
        importance_sampling_cap=args.importance_sampling_cap,
        reward_names=list(reward_names),
    )
    write_rollout(args.rollout_dir, process, facts, tensors, rows)
