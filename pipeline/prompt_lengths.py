"""Prompts against the model's context: those too long are left out where the recipe says so, and refused otherwise."""

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tieback.cli.errors import UsageError
from tieback.pipeline.trainer.rollout import encode_prompts


def fit_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    max_new_tokens: int,
    max_prompt_length: int | None,
) -> tuple[Dataset, int]:
    """Make sure, before any compute, that every prompt leaves room for its response.

    Args:
        dataset: rows with a `prompt`, plain or conversational.
        tokenizer: the policy's.
        context: longest sequence that the model takes; None where it has no limit.
        max_new_tokens: room to leave for the response.
        max_prompt_length: prompts with more tokens than this are left out; None to leave out none.

    Returns:
        The rows that fit, and how many were left out.

    Raises:
        UsageError: a remaining prompt is too long for the context, or none remains.
    """
    lengths = [len(ids) for ids in encode_prompts(dataset["prompt"], tokenizer)]
    kept = [
        row for row, length in enumerate(lengths) if max_prompt_length is None or length <= max_prompt_length
    ]
    if not kept:
        raise UsageError(
            f"All {len(dataset)} prompts are longer than max_prompt_length ({max_prompt_length} tokens)."
        )
    room = None if context is None else context - max_new_tokens
    too_long = [row for row in kept if room is not None and lengths[row] > room]
    if too_long:
        row = too_long[0]
        raise UsageError(
            f"{len(too_long)} of {len(kept)} prompts are too long: prompt {row + 1} has {lengths[row]} tokens and the "
            f"response needs {max_new_tokens}, but the model's context holds {context}. Set max_prompt_length to {room} "
            "or less to leave such prompts out, or lower the response length."
        )
    return (dataset if len(kept) == len(dataset) else dataset.select(kept)), len(dataset) - len(kept)
