"""Dynamic sampling: prompts whose completions are all scored alike make room for others.

Yu et al. 2025, "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", section 3.2.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.nn.functional import pad

from tieback.pipeline.rollout.texts import Rollout
from tieback.pipeline.trainer.config import PPOConfig
from tieback.pipeline.trainer.rewards import ScoredRollout
from tieback.pipeline.trainer.run_identity import seed_of_process


def fill_with_unlike(
    scored: ScoredRollout,
    sample: Callable[[list[dict[str, Any]]], ScoredRollout],
    dataset: Dataset,
    iteration: int,
    accelerator: Accelerator,
    args: PPOConfig,
) -> tuple[ScoredRollout, dict[str, float]]:
    """As many prompts as in `scored`, those first whose completions are scored unlike; all processes must call.

    Further batches of prompts are sampled until there are enough of them on every process, or `dynamic_sampling_batches` have been.
    Prompts whose completions are scored alike then take what places are left.

    Args:
        scored: the first batch, the `num_generations` completions of a prompt next to each other.
        sample: completes and scores as many prompt rows.
        dataset: to draw further prompts from, at random.
        iteration: that the draws depend on, beside the seed and the process.
        accelerator: of the training.
        args: settings.

    Returns:
        The batch, and `rollout/alike_fraction` and `rollout/batches`.
    """
    prompts = len(scored.rollout) // args.num_generations
    unlike = _unlike(scored, args)
    alike_fraction = accelerator.reduce((~unlike).float().mean(), "mean")
    parts, alike = [_of_prompts(scored, unlike, args)], _of_prompts(scored, ~unlike, args)
    seed = seed_of_process(args.seed, iteration, accelerator.process_index)
    generator = torch.Generator().manual_seed(seed)
    batches, missing = 1, prompts - _count(parts, args)
    while batches < args.dynamic_sampling_batches and _any_process(missing > 0, accelerator):
        drawn = torch.randint(len(dataset), (prompts,), generator=generator).tolist()
        further = sample([dataset[place] for place in drawn])
        unlike = _unlike(further, args)
        parts.append(_of_prompts(further, unlike & (unlike.cumsum(0) <= missing), args))
        batches, missing = batches + 1, prompts - _count(parts, args)
    rest = torch.arange(len(alike.rollout) // args.num_generations, device=scored.raw_scores.device) < missing
    whole = join([*parts, _of_prompts(alike, rest, args)])
    return whole, {"rollout/alike_fraction": float(alike_fraction), "rollout/batches": float(batches)}


def _unlike(scored: ScoredRollout, args: PPOConfig) -> torch.Tensor:
    by_prompt = scored.raw_scores.view(-1, args.num_generations)
    return by_prompt.amax(1) > by_prompt.amin(1)


def _of_prompts(scored: ScoredRollout, chosen: torch.Tensor, args: PPOConfig) -> ScoredRollout:
    """Completions of the prompts that a mask [P] names."""
    return select(scored, chosen.repeat_interleave(args.num_generations).nonzero().flatten().tolist())


def _count(parts: Iterable[ScoredRollout], args: PPOConfig) -> int:
    return sum(len(part.rollout) for part in parts) // args.num_generations


def _any_process(value: bool, accelerator: Accelerator) -> bool:
    return bool(accelerator.reduce(torch.tensor(int(value), device=accelerator.device), "sum"))


def select(scored: ScoredRollout, rows: list[int]) -> ScoredRollout:
    """Some completions of a scored rollout."""

    def chosen(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: chosen(column) for name, column in value.items()}
        return value if value is None else [value[row] for row in rows]

    rollout = Rollout(**{item.name: chosen(getattr(scored.rollout, item.name)) for item in fields(Rollout)})
    return ScoredRollout(rollout, scored.rewards[rows], scored.raw_scores[rows], scored.token_scores[rows])


def join(parts: list[ScoredRollout]) -> ScoredRollout:
    """Scored rollouts of the same functions, one below the other; parts without completions may be among them."""
    parts = [part for part in parts if len(part.rollout)]
    rollouts = [part.rollout for part in parts]
    if any(rollout.env_mask is not None for rollout in rollouts):
        for rollout in rollouts:
            rollout.env_mask = rollout.env_mask or [[True] * len(ids) for ids in rollout.completion_ids]

    def joined(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: joined([value[name] for value in values]) for name in values[0]}
        # Where one batch has none (log-probabilities of a rollout function, say), there are none of all.
        return None if any(value is None for value in values) else [row for value in values for row in value]

    rollout = Rollout(
        **{item.name: joined([getattr(each, item.name) for each in rollouts]) for item in fields(Rollout)}
    )
    width = max(part.token_scores.shape[1] for part in parts)
    token_scores = [pad(part.token_scores, (0, width - part.token_scores.shape[1])) for part in parts]
    longest = max(map(len, rollout.completion_ids))
    return ScoredRollout(
        rollout,
        torch.cat([part.rewards for part in parts]),
        torch.cat([part.raw_scores for part in parts]),
        torch.cat(token_scores)[:, :longest],
    )
