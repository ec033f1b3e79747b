"""Preference pairs as tokens."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tieback.data.errors import DataError


def encode_pairs(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, int]:
    """Tokenize preference rows, cut both sides to `max_length` tokens, and drop pairs that then are identical.

    A pair whose sides differ beyond the cut alone teaches nothing and adds log 2 to the loss (OpenRLHF #1311).

    Args:
        dataset: rows with `prompt`, `chosen`, `rejected`, plain or conversational.
        tokenizer: the reward model's.
        max_length: longest sequence, prompt included, in tokens.

    Returns:
        The rows with the columns `chosen_ids` and `rejected_ids` beside their own, which TRL's `RewardTrainer` takes as
        tokenized; and how many were dropped.

    Raises:
        DataError: all pairs are identical after the cut.
    """

    def encode(prompt: Any, completion: Any) -> list[int]:
        if isinstance(prompt, list):
            return tokenizer.apply_chat_template(prompt + completion, tokenize=True, return_dict=True)[
                "input_ids"
            ]
        end = (
            ""
            if tokenizer.eos_token is None or completion.endswith(tokenizer.eos_token)
            else tokenizer.eos_token
        )
        return tokenizer(prompt + completion + end)["input_ids"]

    def encode_row(row: dict) -> dict[str, list[int]]:
        return {
            f"{side}_ids": encode(row["prompt"], row[side])[:max_length] for side in ("chosen", "rejected")
        }

    encoded = dataset.map(encode_row, desc="Tokenizing pairs")
    kept = [
        number
        for number, (chosen, rejected) in enumerate(
            zip(encoded["chosen_ids"], encoded["rejected_ids"], strict=True)
        )
        if chosen != rejected
    ]
    if not kept:
        raise DataError(
            f"All {len(encoded)} pairs are identical in their first {max_length} tokens: the prompts alone fill them. "
            "Raise max_length."
        )
    return encoded.select(kept), len(encoded) - len(kept)
