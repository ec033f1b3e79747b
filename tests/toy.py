"""Tiny models, tokenizers and prompts that the tests of trainer and stages share."""

from typing import Any

import torch
from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from data.tokenizer import train_tokenizer

WORDS = [
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "bird",
    "one",
    "two",
    "three",
    "yes",
    "no",
    "maybe",
    "up",
    "down",
    "left",
    "right",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens with the project's chat template."""
    return train_tokenizer([" ".join(WORDS)] * 4, 300)


def config(vocab_size: int, **changes: Any) -> LlamaConfig:
    """A Llama of two layers and width 32."""
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        **changes,
    }
    return LlamaConfig(vocab_size=vocab_size, **settings)


def policy(tok: PreTrainedTokenizerFast, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """An untrained policy."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        config(len(tok), eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, **changes)
    )
    return model.eval()


def reward_model(
    tok: PreTrainedTokenizerFast, seed: int = 1, **changes: Any
) -> LlamaForSequenceClassification:
    """An untrained reward model with one label."""
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(
        config(
            len(tok), num_labels=1, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, **changes
        )
    )
    return model.eval()


def prompts(count: int = 16) -> Dataset:
    """Conversational prompts of different lengths, with a column `target`."""
    rows = [
        " ".join(WORDS[i % len(WORDS)] for i in range(start, start + 1 + start % 4)) for start in range(count)
    ]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in rows],
            "target": [WORDS[i % len(WORDS)] for i in range(count)],
        }
    )
