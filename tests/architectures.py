"""Small untrained models of several architectures, and token ids of prompts and completions for them."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

CPU = torch.device("cpu")
VOCABULARY, END, PAD = 60, 1, 0
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "num_labels": 1,
}
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "Llama": LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=2),
    "GPT-2": GPT2Config(**SIZES),
    "GPT-NeoX": GPTNeoXConfig(**SIZES, intermediate_size=64),
    "Qwen2": Qwen2Config(**SIZES, intermediate_size=64, num_key_value_heads=2),
}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [18, 19, 20, 21]]
COMPLETIONS = [[22, 23, 24, 25, END], [26, END], [27, 28], [END], [29, 30, 31, 32, 33]]


def causal(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]).eval()


def classifier(architecture: str) -> PreTrainedModel:
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_config(ARCHITECTURES[architecture]).eval()
