"""Prompts of a stage: read from their source, and made sure to leave room for a completion."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tieback.cli.errors import UsageError
from tieback.data.sources import load_rows
from tieback.pipeline.model_loading import check_chat_template
from tieback.pipeline.rollout.settings import RolloutSettings
from tieback.pipeline.rollout.texts import encode_prompts


def load_prompts(
    stage: str,
    name: str | None,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    settings: RolloutSettings,
    **source: Any,
) -> tuple[Dataset, dict[str, int]]:
    """Read prompts that fit the policy.

    Args:
        stage: for messages.
        name: of the data set (see `tieback.data.sources.load_rows`).
        tokenizer: the policy's.
        context: longest sequence that the policy takes, in tokens; None where it has no limit.
        settings: of the rollout.
        source: `split`, `config`, `max_rows` and `seed` of `load_rows`.

    Returns:
        The prompts, and how many were not taken, by reason: `left_out` for their length, `dropped_<reason>` by
        `load_rows`.

    Raises:
        UsageError: no data set is named, the tokenizer has no chat template for conversations, or see `fit_prompts`.
    """
    if name is None:
        raise UsageError(
            f"Name the prompts with --dataset_name (or `make {stage} DATA=...`): a file, or a hub data set."
        )
    rows = load_rows(name, "prompts", **source)
    check_chat_template(tokenizer, rows.dataset[0], None)
    prompts, num_left_out = fit_prompts(
        rows.dataset,
        tokenizer,
        context,
        settings.max_completion_length,
        settings.max_prompt_length,
        settings.template_arguments,
    )
    dropped = {f"dropped_{reason}": count for reason, count in rows.dropped.items()}
    return prompts, {"left_out": num_left_out, **dropped}


def fit_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    max_completion_length: int,
    max_prompt_length: int | None,
    template_arguments: dict[str, Any],
) -> tuple[Dataset, int]:
    """Make sure, before any compute, that every prompt leaves room for its completion.

    Args:
        dataset: rows with a `prompt`, plain or conversational.
        tokenizer: the policy's.
        context: longest sequence that the model takes, in tokens; None where it has no limit.
        max_completion_length: tokens to leave for the completion.
        max_prompt_length: prompts with more tokens than this are left out; None to leave out none.
        template_arguments: of the chat template.

    Returns:
        The rows that fit, and how many were left out.

    Raises:
        UsageError: a remaining prompt is too long for the context, or none remains.
    """
    lengths = [len(ids) for ids in encode_prompts(dataset["prompt"], tokenizer, template_arguments)]
    kept = [
        row for row, length in enumerate(lengths) if max_prompt_length is None or length <= max_prompt_length
    ]
    if not kept:
        raise UsageError(
            f"All {len(dataset)} prompts are longer than max_prompt_length ({max_prompt_length} tokens)."
        )
    room = None if context is None else context - max_completion_length
    too_long = [row for row in kept if room is not None and lengths[row] > room]
    if too_long:
        row = too_long[0]
        shorter = f"Set max_prompt_length to {room} or less to leave such prompts out, or lower"
        raise UsageError(
            f"{len(too_long)} of {len(kept)} prompts are too long: prompt {row + 1} has {lengths[row]} tokens and the "
            f"completion needs {max_completion_length}, but the model's context holds {context}. "
            f"{shorter if room is not None and room > 0 else 'Lower'} max_completion_length."
        )
    return (dataset if len(kept) == len(dataset) else dataset.select(kept)), len(dataset) - len(kept)
