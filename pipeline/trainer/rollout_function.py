"""Rollouts of one's own: a function that samples in several turns, between which an environment (a tool, a game, a user) writes.

The contract is that of `rollout_func` of TRL's GRPOTrainer: it is called with prompts and trainer, and returns a dictionary of lists.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tieback.cli.errors import UsageError
from tieback.data.conversations import TextOrMessages
from tieback.pipeline.rollout.texts import Rollout, decode_completions
from tieback.pipeline.scorers import REWARD_ARGUMENTS

if TYPE_CHECKING:
    from tieback.pipeline.trainer.trainer import PPOTrainer

# f(prompts, trainer: PPOTrainer), with a prompt for each completion, gives lists as long as `prompts`:
#   prompt_ids, completion_ids   token ids of each; a completion goes on where its prompt stops, and is all that came after
#   env_mask       of each token of a completion 1 where the policy wrote it and 0 where the environment did; the policy wrote all where left out
#   logprobs       of each token of a completion, by what sampled it; anything where the environment wrote
#   truncated      whether the policy was cut off; where left out, whether the last token that it wrote is no end token
#   completions    text or messages for reward functions; decoded from the tokens where left out
# and anything else, which goes to reward functions: a list with one item for each completion, or one thing for all.
RolloutFunction: TypeAlias = Callable[[list[Any], Any], Mapping[str, Any]]

_OWN = ("prompt_ids", "completion_ids", "env_mask", "logprobs", "truncated", "completions")


def call_rollout_function(
    function: RolloutFunction, rows: Sequence[dict[str, Any]], trainer: "PPOTrainer"
) -> Rollout:
    """What the function made of B rows of a data set, which have a `prompt`.

    Raises:
        UsageError: it raised, or what it returned cannot be learnt from.
    """
    prompts = [row["prompt"] for row in rows]
    name = getattr(function, "__name__", type(function).__name__)
    try:
        returned = function(list(prompts), trainer)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"The rollout function `{name}` raised {type(error).__name__}: {error}.") from error
    try:
        rollout = read_rollout(
            returned,
            rows,
            trainer.processing_class,
            trainer.sampler.end_ids,
            trainer.args.max_completion_length,
            trainer.model.config.get_text_config(),
        )
        if trainer.args.importance_sampling is not None and rollout.logprobs is None:
            raise ValueError(
                "no logprobs, which importance_sampling corrects by: hand on those of trainer.sample, or leave it out."
            )
        return rollout
    except ValueError as error:
        raise UsageError(f"The rollout function `{name}` returned {error}") from error


def read_rollout(
    returned: Any,
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int],
    max_completion_length: int,
    config: PreTrainedConfig,
) -> Rollout:
    """Check what a rollout function returned for B rows, and fill in what it left out.

    Args:
        returned: see `RolloutFunction`.
        rows: that it was called for.
        tokenizer: the policy's.
        end_ids: of the sampler.
        max_completion_length: most tokens in a completion, those of the environment counted.
        config: of the policy's text model.

    Raises:
        ValueError: says what is wrong, to follow "… returned".
    """
    if not isinstance(returned, Mapping):
        raise ValueError(f"{type(returned).__name__}, not a dictionary with prompt_ids and completion_ids.")
    columns = {
        name: _column(name, returned[name], len(rows)) for name in _OWN if returned.get(name) is not None
    }
    for name in ("prompt_ids", "completion_ids"):
        if name not in columns:
            raise ValueError(f"no {name}: the keys are {sorted(returned)}.")
        for row, ids in enumerate(columns[name]):
            _check_ids(ids, f"{name}[{row}]", config.vocab_size)
    prompt_ids, completion_ids = (
        [list(ids) for ids in columns[name]] for name in ("prompt_ids", "completion_ids")
    )
    context = getattr(config, "max_position_embeddings", None)
    for row, (before, ids) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        for name in ("env_mask", "logprobs"):
            if name in columns and len(columns[name][row]) != len(ids):
                raise ValueError(
                    f"{len(columns[name][row])} entries in {name}[{row}] for the {len(ids)} tokens of completion_ids[{row}]."
                )
        if "env_mask" in columns and not any(columns["env_mask"][row]):
            raise ValueError(
                f"env_mask[{row}] with no token that the policy wrote: there is nothing to learn from."
            )
        if len(ids) > max_completion_length:
            raise ValueError(
                f"{len(ids)} tokens in completion_ids[{row}], more than max_completion_length={max_completion_length}, which those "
                "of the environment count towards. Stop earlier, or raise it."
            )
        if context is not None and len(before) + len(ids) > context:
            raise ValueError(
                f"{len(before)} + {len(ids)} tokens in prompt and completion {row}, more than the model's context of {context}."
            )
    env_mask = (
        [[bool(own) for own in mask] for mask in columns["env_mask"]] if "env_mask" in columns else None
    )
    last = (
        [ids[-1] for ids in completion_ids]
        if env_mask is None
        else [
            list(itertools.compress(ids, own))[-1] for ids, own in zip(completion_ids, env_mask, strict=True)
        ]
    )
    prompts = [row["prompt"] for row in rows]
    return Rollout(
        prompts=prompts,
        columns={name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        | _further_columns(returned, len(rows)),
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        truncated=[bool(cut) for cut in columns["truncated"]]
        if "truncated" in columns
        else [token not in end_ids for token in last],
        completions=_completions(columns, prompts, tokenizer),
        logprobs=[[float(value) for value in row] for row in columns["logprobs"]]
        if "logprobs" in columns
        else None,
        env_mask=env_mask,
    )


def _column(name: str, value: Any, count: int) -> list[Any]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"{type(value).__name__} as {name}, not a list with an item for each of {count} prompts."
        )
    if len(value) != count:
        raise ValueError(
            f"{len(value)} items in {name} for {count} prompts. It is called with a prompt for each completion, so that one with "
            "num_generations completions stands there as often."
        )
    return list(value)


def _check_ids(ids: Any, where: str, vocabulary: int) -> None:
    if not isinstance(ids, list | tuple) or not ids:
        raise ValueError(f"{ids!r} as {where}, which must be a list of token ids, and not empty.")
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocabulary:
            raise ValueError(
                f"{token!r} in {where}, which is no token of the policy's vocabulary of {vocabulary}."
            )


def _completions(
    columns: Mapping[str, list[Any]], prompts: Sequence[TextOrMessages], tokenizer: PreTrainedTokenizerBase
) -> list[TextOrMessages]:
    if "completions" not in columns:
        return decode_completions(prompts, columns["prompt_ids"], columns["completion_ids"], tokenizer)
    for row, (completion, prompt) in enumerate(zip(columns["completions"], prompts, strict=True)):
        messages = isinstance(completion, list) and all(
            isinstance(message, dict) and {"role", "content"} <= message.keys() for message in completion
        )
        if not (messages and completion if isinstance(prompt, list) else isinstance(completion, str)):
            wanted = "a list of messages with role and content" if isinstance(prompt, list) else "text"
            raise ValueError(f"{completion!r} as completions[{row}]; as its prompt is, it must be {wanted}.")
    return columns["completions"]


def _further_columns(returned: Mapping[str, Any], count: int) -> dict[str, list[Any]]:
    further = {name: value for name, value in returned.items() if name not in _OWN}
    for name in further:
        if name in REWARD_ARGUMENTS or name == "prompt":
            raise ValueError(f"`{name}`, a name that reward functions receive from the trainer. Rename it.")
    return {
        name: _column(name, value, count)
        if hasattr(value, "tolist") or isinstance(value, list)
        else list(itertools.repeat(value, count))
        for name, value in further.items()
    }
