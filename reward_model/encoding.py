"""Prompt and completion as the reward model's tokens: one way, for training on pairs and for scoring."""

import json
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from tieback.cli.errors import UsageError
from tieback.data.conversations import Message, TextOrMessages
from tieback.data.errors import DataError

# Of `model_max_length`: a tokenizer without a limit names one of 10^30.
_NO_LIMIT = 10**9


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: TextOrMessages, completion: TextOrMessages
) -> list[int]:
    """Token ids of prompt and completion as TRL's `RewardTrainer` makes them: plain text ends with EOS, once.

    A tokenizer that closes its texts itself (RoBERTa with EOS, BERT with [SEP], XLNet with <sep><cls>) is left to do so;
    TRL would add a second EOS.

    Args:
        tokenizer: the reward model's.
        prompt: plain text or a conversation.
        completion: plain text, or messages that continue the conversation.

    Raises:
        UsageError: the text is a conversation and the tokenizer has no chat template.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        text, eos = prompt + completion, tokenizer.eos_token
        if eos is None or text.endswith(eos) or _closes_texts(tokenizer):
            eos = ""
        return tokenizer(text + eos)["input_ids"]
    check_template(tokenizer)
    messages = _messages(prompt, "user") + _messages(completion, "assistant")
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that a reward model can read conversations.

    Raises:
        UsageError: its tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise UsageError(
            f"The texts are conversations, but the reward model's tokenizer ({tokenizer.name_or_path}) has no chat "
            "template. Set one on it, or use plain prompts."
        )


def _closes_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    return bool(bare) and tokenizer("a")["input_ids"][-len(bare) :] != bare


def cut(ids: list[int], max_length: int | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """At most `max_length` tokens of a text: its end, which holds the response, behind the token that opens it, if any.

    What a tokenizer does that truncates on the left: [CLS] and [SEP] of an encoder stay.
    """
    if max_length is None or len(ids) <= max_length:
        return ids
    opens = ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id)
    return [*ids[:opens], *ids[len(ids) - max_length + opens :]]


def longest_text(model: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Longest text that a reward model can read, in tokens, as its positions and its tokenizer say; None for no limit.

    Args:
        model: with a `config`; a module, or what stands for one.
        tokenizer: the model's.
    """
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0]
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            # RoBERTa and its kin count positions from the pad id on.
            limits.append(module.num_embeddings - module.padding_idx - 1)
    limits.append(tokenizer.model_max_length)
    return min((limit for limit in limits if 0 < limit < _NO_LIMIT), default=None)  # XLNet's config says -1


def _messages(text: TextOrMessages, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def encode_pairs(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[Dataset, int]:
    """Tokenize preference rows, cut both sides to `max_length` tokens (see `cut`), and drop pairs that then are identical.

    A pair whose sides differ beyond the cut alone teaches nothing and adds log 2 to the loss (OpenRLHF #1311).

    Args:
        dataset: rows with `prompt`, `chosen`, `rejected`, plain or conversational.
        tokenizer: the reward model's.
        max_length: longest sequence, prompt included, in tokens; None for no limit.

    Returns:
        The rows with the columns `chosen_ids` and `rejected_ids` beside their own, which TRL's `RewardTrainer` takes as
        tokenized; and how many were dropped.

    Raises:
        DataError: all pairs are identical after the cut.
    """

    known: dict[str, list[int]] = {}

    def ids(prompt: TextOrMessages, completion: TextOrMessages) -> list[int]:
        # Four ranked responses stand in three pairs each.
        key = json.dumps([prompt, completion])
        if key not in known:
            known[key] = cut(encode(tokenizer, prompt, completion), max_length, tokenizer)
        return known[key]

    def encode_rows(rows: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        return {
            f"{side}_ids": [ids(*text) for text in zip(rows["prompt"], rows[side], strict=True)]
            for side in ("chosen", "rejected")
        }

    encoded = dataset.map(encode_rows, batched=True, desc="Tokenizing pairs")
    kept = [
        number
        for number, (chosen, rejected) in enumerate(
            zip(encoded["chosen_ids"][:], encoded["rejected_ids"][:], strict=True)
        )
        if chosen != rejected
    ]
    if not kept:
        raise DataError(
            f"All {len(encoded)} pairs are identical in their last {max_length} tokens: the sides differ before them alone. "
            "Raise max_length."
        )
    return encoded.select(kept), len(encoded) - len(kept)
