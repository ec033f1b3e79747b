"""Prompt and completion as the reward model's tokens: one way, for training on pairs and for scoring."""

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tieback.cli.errors import UsageError
from tieback.data.conversations import Message, TextOrMessages
from tieback.data.errors import DataError


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: TextOrMessages, completion: TextOrMessages
) -> list[int]:
    """Token ids of prompt and completion as TRL's `RewardTrainer` makes them: plain text ends with EOS, once.

    Args:
        tokenizer: the reward model's.
        prompt: plain text or a conversation.
        completion: plain text, or messages that continue the conversation.

    Raises:
        UsageError: the text is a conversation and the tokenizer has no chat template.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        text, eos = prompt + completion, tokenizer.eos_token
        return tokenizer(text if eos is None or text.endswith(eos) else text + eos)["input_ids"]
    if tokenizer.chat_template is None:
        raise UsageError(
            f"The texts are conversations, but the reward model's tokenizer ({tokenizer.name_or_path}) has no chat "
            "template. Set one on it, or use plain prompts."
        )
    messages = _messages(prompt, "user") + _messages(completion, "assistant")
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]


def _messages(text: TextOrMessages, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


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

    def encode_row(row: dict) -> dict[str, list[int]]:
        return {
            f"{side}_ids": encode(tokenizer, row["prompt"], row[side])[:max_length]
            for side in ("chosen", "rejected")
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
