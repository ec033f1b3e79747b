"""Scorers of completions: reward functions and reward models, found by name, called, and mixed."""

import importlib
import inspect
import math
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tieback.cli.errors import UsageError
from tieback.pipeline.async_calls import run_together
from tieback.pipeline.model_loading import load_tokenizer, named_tokenizer, reason_not_loaded
from tieback.pipeline.remote_scorer import SCHEMES, RemoteScorer
from tieback.pipeline.rollout.texts import Rollout
from tieback.pipeline.trl_internals import is_async_callable
from tieback.reward_model.adapter import ScalarAdapter, base_of, read_scalar_adapter, same_model
from tieback.reward_model.encoding import check_template
from tieback.reward_model.head import load_reward_model
from tieback.reward_model.scoring import RewardScorer

Rewards: TypeAlias = Sequence[float | Sequence[float] | None] | Tensor
# f(prompts=…, completions=…, completion_ids=…, **columns) gives for each completion one number, or one for each of its
# tokens, or None where it does not judge that one. It may be asynchronous.
RewardFunction: TypeAlias = Callable[..., Rewards | Awaitable[Rewards]]
Scorer: TypeAlias = RewardFunction | RewardScorer
# What a scorer may be given as: one, a sequence-classification model (with an adapter of PEFT, perhaps), or the name that
# `load_scorer` takes.
RewardSource: TypeAlias = RewardFunction | RewardScorer | PreTrainedModel | PeftModel | str
# What a reward function is called with besides the columns of the data.
REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids")
# Rewards are kept in fp32, where a greater number is infinite.
LARGEST_REWARD = torch.finfo(torch.float32).max


class FunctionRewards(NamedTuple):
    """What one scorer gave for B completions.

    Args:
        totals: of each completion, the sum where it was given by token; NaN where the scorer does not judge it.
        by_token: a number for each of its tokens; None where there is one number for all of it, or none.
    """

    totals: list[float]
    by_token: list[list[float] | None]


class RewardError(UsageError):
    """A reward function returned something that cannot be learnt from."""


def load_scorer(
    name: str,
    batch_size: int,
    setting: str = "reward_funcs",
    device: torch.device | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base: str | None = None,
) -> Scorer:
    """Import the reward function `module:function`, load the reward model in a folder or on the hub, or name a server's URL.

    Args:
        name: of the function or the model.
        batch_size: texts in a forward pass of the model.
        setting: that named it, for messages.
        device: to put the model on; it stays where it was loaded where None.
        tokenizer: the model's; loaded from its name where None.
        base: of the policy's adapter: of a reward model that is an adapter of the same base, the adapter alone is
            loaded, for `PPOTrainer` to put into the policy.

    Raises:
        UsageError: it cannot be found, or is no reward model.
    """
    if name.startswith(SCHEMES):
        return RemoteScorer(name, batch_size)
    if ":" in name and not Path(name).exists():
        return import_function(setting, name)
    try:
        model = read_scalar_adapter(name) if same_model(base, base_of(name)) else load_reward_model(name)
        scorer = RewardScorer(
            model, tokenizer or load_tokenizer(name), batch_size, name=folder_reward_name(name)
        )
    except OSError as error:
        raise UsageError(
            f"{setting}: no reward model can be loaded from {name}: {reason_not_loaded(name, error)}"
        ) from error
    except UsageError as error:
        raise UsageError(f"{setting}: {error}") from error
    if device is not None and not isinstance(model, ScalarAdapter):
        model.to(device)
    return scorer


def import_function(setting: str, name: str) -> Any:
    """Import `module:function`, from the current folder, too.

    Raises:
        UsageError: names the setting; it cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{setting}: {name} cannot be imported ({error}). Write module:function.") from error
    finally:
        sys.path.pop(0)


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
    base: str | None = None,
    setting: str = "reward_funcs",
) -> list[Scorer]:
    """Reward functions as they are, and reward models (given or named) as scorers with tokenizers of their own.

    Args:
        reward_funcs: one, or several.
        tokenizers: of the reward models, in that order.
        batch_size: texts in a forward pass.
        base: see `load_scorer`.
        setting: that named them, for messages.

    Raises:
        UsageError: no reward function, a tokenizer too many or too few, or a model that gives no single score.
    """
    sources = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not sources:
        raise UsageError(f"{setting} is empty: name at least one reward function or reward model.")
    given = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(sources)
    if len(given) != len(sources):
        raise UsageError(f"reward_processing_classes has {len(given)} entries for {len(sources)} {setting}.")
    return [
        _scorer(source, tokenizer, batch_size, base, setting)
        for source, tokenizer in zip(sources, given, strict=True)
    ]


def _scorer(
    source: RewardSource,
    tokenizer: PreTrainedTokenizerBase | None,
    batch_size: int,
    base: str | None,
    setting: str,
) -> Scorer:
    if isinstance(source, str):
        return load_scorer(source, batch_size, setting, tokenizer=tokenizer, base=base)
    if isinstance(source, PreTrainedModel | PeftModel):
        tokenizer = tokenizer or named_tokenizer("reward_processing_classes", source)
        name = folder_reward_name(source.config._name_or_path)
        return RewardScorer(source, tokenizer, batch_size, name=name)
    if not isinstance(source, RewardScorer) and not callable(source):
        raise UsageError(
            f"{setting}: {source!r} is of type {type(source).__name__}. Give a function, a reward model, the name of either, "
            "or a list of them."
        )
    return source


def folder_reward_name(name: str | Path) -> str:
    """Name under which the scores of the reward model in a folder or on the hub are logged: the last part of its name.

    That of the pipeline's own folder, `reward`, says nothing beside `reward/mean`: it is `reward_model`, as is one without a name.
    """
    last = Path(name).name
    return "reward_model" if last in ("", "reward") else last


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


def read_weights(weights: Sequence[float] | None, scorers: Sequence[Scorer]) -> list[float]:
    """The weight of each scorer; 1 each where none are set.

    Raises:
        UsageError: there are more or fewer than scorers.
    """
    if weights is None:
        return [1.0] * len(scorers)
    if len(weights) != len(scorers):
        raise UsageError(f"reward_weights has {len(weights)} entries for {len(scorers)} reward functions.")
    return list(weights)


def check_call(scorers: Sequence[Scorer], name: str, dataset: Dataset, more_columns: bool = False) -> None:
    """Check, before there is anything to judge, that each scorer takes what it will be called with.

    Args:
        scorers: functions and models; these take prompts and completions alone.
        name: of the data set, for messages.
        dataset: with a `prompt`.
        more_columns: whether a rollout function may give them further columns.

    Raises:
        UsageError: names the function, and the parameter that is missing or not wanted; or the model, whose tokenizer has
            no chat template for conversations.
    """
    given = [*REWARD_ARGUMENTS, *(column for column in dataset.column_names if column != "prompt")]
    conversational = len(dataset) > 0 and isinstance(dataset[0]["prompt"], list)
    for scorer in scorers:
        if isinstance(scorer, RewardScorer):
            if conversational:
                check_template(scorer.tokenizer)
            continue
        try:
            signature = inspect.signature(scorer)
        except (TypeError, ValueError):  # some written in C do not say
            continue
        bind = signature.bind_partial if more_columns else signature.bind
        try:
            bind(**dict.fromkeys(given))
        except TypeError as error:
            raise UsageError(
                f"The reward function `{reward_name(scorer)}` cannot judge {name}: {error}. It is called with "
                f"{', '.join(given)}; let **columns take those that it does not use."
            ) from error


def call_scorers(scorers: Sequence[Scorer], rollout: Rollout) -> list[FunctionRewards]:
    """Rewards of F scorers for a rollout of B completions.

    Asynchronous functions run at the same time as each other, after the rest.

    Raises:
        RewardError: one raised, returned the wrong number of rewards (of completions, or of tokens), or something that is not a
            finite number.
    """
    asynchronous = [
        place
        for place, scorer in enumerate(scorers)
        if not isinstance(scorer, RewardScorer) and is_async_callable(scorer)
    ]
    returned = {
        place: _call(scorer, rollout) for place, scorer in enumerate(scorers) if place not in asynchronous
    }
    if asynchronous:
        awaited = run_together([_await(scorers[place], rollout) for place in asynchronous])
        returned |= zip(asynchronous, awaited, strict=True)
    return [_numbers(returned[place], reward_name(scorer), rollout) for place, scorer in enumerate(scorers)]


def _call(scorer: Scorer, rollout: Rollout) -> Any:
    with _named_errors(scorer, rollout):
        if isinstance(scorer, RewardScorer):
            return scorer.score(rollout.prompts, rollout.completions)
        return scorer(**_arguments(rollout))


async def _await(scorer: Any, rollout: Rollout) -> Any:
    with _named_errors(scorer, rollout):
        return await scorer(**_arguments(rollout))


def _arguments(rollout: Rollout) -> dict[str, Any]:
    return {name: getattr(rollout, name) for name in REWARD_ARGUMENTS} | rollout.columns


@contextmanager
def _named_errors(scorer: Scorer, rollout: Rollout) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RewardError(
            f"The reward function `{reward_name(scorer)}` raised {type(error).__name__}: {error}. It was called with "
            f"prompts, completions, completion_ids and the columns {sorted(rollout.columns)}."
        ) from error


def _numbers(rewards: Any, name: str, rollout: Rollout) -> FunctionRewards:
    if hasattr(rewards, "tolist"):  # a tensor or an array
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
    by_token = [_by_token(reward, name, row, rollout) for row, reward in enumerate(rewards)]
    totals = [
        _number(reward if tokens is None else math.fsum(tokens), name, row, rollout)
        for row, (reward, tokens) in enumerate(zip(rewards, by_token, strict=True))
    ]
    return FunctionRewards(totals, by_token)


def _by_token(reward: Any, name: str, row: int, rollout: Rollout) -> list[float] | None:
    """The numbers of a completion's tokens; None where it was not judged by token."""
    if hasattr(reward, "tolist"):
        reward = reward.tolist()
    if not isinstance(reward, list | tuple):
        return None
    length = len(rollout.completion_ids[row])
    if len(reward) != length:
        raise RewardError(
            f"The reward function `{name}` returned {len(reward)} rewards by token for row {row} of the batch, whose completion "
            f"has {length} tokens (completion_ids[{row}]). Return one for each, or one number for all of it."
        )
    return [_number(number, name, row, rollout, f", token {at}") for at, number in enumerate(reward)]


def _number(reward: Any, name: str, row: int, rollout: Rollout, place: str = "") -> float:
    if reward is None and not place:
        return math.nan
    try:
        # float() would read the number in a string, which a function returns by mistake.
        value = math.nan if isinstance(reward, str | bytes) else float(reward)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not abs(value) <= LARGEST_REWARD:
        raise RewardError(
            f"The reward function `{name}` returned {reward!r} for row {row}{place} of the batch (prompt "
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
