"""Scorers of completions: reward functions and reward models, found by name, called, and mixed."""

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tieback.cli.errors import UsageError
from tieback.pipeline.model_loading import load_tokenizer
from tieback.pipeline.rollout.texts import Rollout
from tieback.reward_model.head import load_reward_model
from tieback.reward_model.scoring import RewardScorer

# f(prompts=…, completions=…, completion_ids=…, **columns) gives one number for each completion, or None where it does
# not judge that one.
RewardFunction: TypeAlias = Callable[..., Sequence[float | None] | Tensor]
Scorer: TypeAlias = RewardFunction | RewardScorer
# What a scorer may be given as: one, a sequence-classification model, or the folder or hub name of such a model.
RewardSource: TypeAlias = RewardFunction | RewardScorer | PreTrainedModel | str


class RewardError(UsageError):
    """A reward function returned something that cannot be learnt from."""


def load_scorer(
    name: str, batch_size: int, setting: str = "reward_funcs", device: torch.device | None = None
) -> Scorer:
    """Import the reward function `module:function`, or load the reward model in a folder or on the hub.

    Args:
        name: of the function or the model.
        batch_size: texts in a forward pass of the model.
        setting: that named it, for messages.
        device: to put the model on; it stays where it was loaded where None.

    Raises:
        UsageError: it cannot be found, or is no reward model.
    """
    if ":" in name and not Path(name).exists():
        module_name, _, attribute = name.partition(":")
        sys.path.insert(0, os.getcwd())
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise UsageError(
                f"{setting}: {name} cannot be imported ({error}). Write module:function."
            ) from error
        finally:
            sys.path.pop(0)
    try:
        model = load_reward_model(name)
        scorer = RewardScorer(model, load_tokenizer(name), batch_size, name=Path(name).name)
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"{setting}: no reward model can be loaded from {name}: {reason}") from error
    except UsageError as error:
        raise UsageError(f"{setting}: {error}") from error
    if device is not None:
        scorer.model.to(device)
    return scorer


def load_reward_scorer(
    name: str, batch_size: int, setting: str, device: torch.device | None = None
) -> RewardScorer:
    """Load a reward model (see `load_scorer`).

    Raises:
        UsageError: also where `name` is that of a function.
    """
    scorer = load_scorer(name, batch_size, setting, device)
    if not isinstance(scorer, RewardScorer):
        raise UsageError(f"{setting}: {name} is a function; name reward models here.")
    return scorer


def make_scorers(
    reward_funcs: RewardSource | Sequence[RewardSource],
    tokenizers: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None,
    batch_size: int,
) -> list[Scorer]:
    """Reward functions as they are, and reward models (given or named) as scorers with tokenizers of their own.

    Raises:
        UsageError: no reward function, a tokenizer too many or too few, or a model that gives no single score.
    """
    sources = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not sources:
        raise UsageError("reward_funcs is empty: name at least one reward function or reward model.")
    given = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(sources)
    if len(given) != len(sources):
        raise UsageError(
            f"reward_processing_classes has {len(given)} entries for {len(sources)} reward_funcs."
        )
    return [_scorer(source, tokenizer, batch_size) for source, tokenizer in zip(sources, given, strict=True)]


def _scorer(source: RewardSource, tokenizer: PreTrainedTokenizerBase | None, batch_size: int) -> Scorer:
    model = load_reward_model(source) if isinstance(source, str) else source
    if not isinstance(model, PreTrainedModel):
        return model
    if model.config.num_labels != 1:
        raise UsageError(
            f"A reward model has one label, its score; {type(model).__name__} has {model.config.num_labels}."
        )
    path = model.config._name_or_path
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(path)
    return RewardScorer(model, tokenizer, batch_size, name=Path(path).name or "reward_model")


def reward_name(scorer: Scorer) -> str:
    """Name under which a scorer's mean is logged."""
    if isinstance(scorer, RewardScorer):
        return scorer.name
    return str(getattr(scorer, "__name__", type(scorer).__name__))


def unique_reward_names(scorers: Sequence[Scorer]) -> list[str]:
    """Each scorer's name, numbered (`score_2`) where another one, or a statistic of all rewards, has it already."""
    names: list[str] = []
    for scorer in scorers:
        name, number = reward_name(scorer), 1
        unique = name
        while unique in ("mean", "std", "normalized_mean", *names):
            number += 1
            unique = f"{name}_{number}"
        names.append(unique)
    return names


def call_scorer(scorer: Scorer, rollout: Rollout) -> list[float]:
    """One scorer's rewards for a rollout: B floats, NaN where it returned None (it does not judge that row).

    Raises:
        RewardError: it raised, returned the wrong number of rewards, or something that is not a finite number.
    """
    name = reward_name(scorer)
    try:
        if isinstance(scorer, RewardScorer):
            rewards: Any = scorer.score(rollout.prompts, rollout.completions)
        else:
            rewards = scorer(
                prompts=rollout.prompts,
                completions=rollout.completions,
                completion_ids=rollout.completion_ids,
                **rollout.columns,
            )
    except Exception as error:
        raise RewardError(
            f"The reward function `{name}` raised {type(error).__name__}: {error}. It was called with prompts, "
            f"completions, completion_ids and the columns {sorted(rollout.columns)}."
        ) from error
    if isinstance(rewards, Tensor):
        rewards = rewards.tolist()
    if not isinstance(rewards, list | tuple):
        raise RewardError(
            f"The reward function `{name}` returned {type(rewards).__name__}, not a list of numbers."
        )
    if len(rewards) != len(rollout):
        raise RewardError(
            f"The reward function `{name}` returned {len(rewards)} rewards for {len(rollout)} completions. "
            "It must return exactly one for each."
        )
    return [_checked(reward, name, row, rollout) for row, reward in enumerate(rewards)]


def _checked(reward: Any, name: str, row: int, rollout: Rollout) -> float:
    if reward is None:
        return math.nan
    try:
        # float() would read the number in a string, which a function returns by mistake.
        value = math.nan if isinstance(reward, str) else float(reward)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise RewardError(
            f"The reward function `{name}` returned {reward!r} for row {row} of the batch (prompt "
            f"{rollout.prompts[row]!r}, completion {rollout.completions[row]!r}). Return a finite number, or None "
            "where the function does not judge a row."
        )
    return value


def combine_rewards(per_function: Tensor, weights: list[float], rollout: Rollout) -> Tensor:
    """Weighted sum of the functions' rewards over those that judged a row.

    Args:
        per_function: [B, F], NaN where a function does not judge a row.
        weights: F weights.
        rollout: named in the error.

    Returns:
        Scores [B].

    Raises:
        RewardError: no function judged some row.
    """
    unjudged = torch.isnan(per_function).all(dim=1)
    if unjudged.any():
        row = int(unjudged.nonzero()[0])
        raise RewardError(
            f"Every reward function returned None for row {row} of the batch (prompt {rollout.prompts[row]!r}): "
            "at least one must return a number."
        )
    weighted = per_function * torch.tensor(weights, dtype=per_function.dtype, device=per_function.device)
    return weighted.nansum(dim=1)
