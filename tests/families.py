"""Untrained models of families that differ in kind, as small as their configs allow."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
# What each has that the others do not: see the comments.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},  # norms of queries and keys
    "gemma3_text": {  # local and global layers, logits from tied embeddings
        "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},  # learned positions, dropout, Conv1D
    "gpt_neox": {},  # parallel blocks, `embed_out`
    "phi3": {},  # projections joined in one layer, no LoRA targets of PEFT's
    "mistral": {"sliding_window": 8},  # a window shorter than the sequences
    "olmoe": EXPERTS,  # experts; no classifier class
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},  # hybrid
    "mamba": {"state_size": 8, "time_step_rank": 4, "expand": 2},  # states in the place of attention
    "gpt_oss": {**EXPERTS, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},  # attention sinks
}  # fmt: skip


def family(name: str, tok: PreTrainedTokenizerFast, **changes: Any) -> PreTrainedModel:
    """An untrained causal model."""
    settings = {**SIZES, **FAMILIES.get(name, {}), **changes}
    config = AutoConfig.for_model(
        name, vocab_size=len(tok), eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
        bos_token_id=None, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()
