"""Scores of sampled tokens: what is masked, and that padding changes nothing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor
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

from tieback.pipeline.rollout.token_scores import completion_logprobs, completion_values, pack_sequences

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


class Scripted:
    """Stands for a policy: `generate` continues each prompt with what it was told to."""

    def __init__(self, continuations: list[list[int]]):
        self.continuations = torch.tensor(continuations)

    def generate(self, input_ids: Tensor, **_: Any) -> Tensor:
        return torch.cat([input_ids, self.continuations[: len(input_ids)]], dim=1)


def test_masks_come_from_lengths() -> None:
    for pad in (PAD, END, 22):
        packed = pack_sequences(PROMPTS, COMPLETIONS, pad, CPU)
        assert packed["mask"].tolist() == [[column < len(ids) for column in range(5)] for ids in COMPLETIONS]
        assert packed["prompt_lengths"].tolist() == [3, 1, 7, 2, 4]
        for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            width = len(prompt + completion)
            assert packed["input_ids"][row].tolist() == [*prompt, *completion, *[pad] * (9 - width)]


def test_training_is_the_same_whether_pad_is_the_end_token_or_another(tmp_path: Path) -> None:
    results = []
    for pad in ("<|pad|>", "<|end|>"):
        tok = copy.deepcopy(toy.tokenizer())
        tok.pad_token = pad
        trainer = toy.ppo_trainer(tmp_path, tok=tok, model=toy.brief_policy(toy.tokenizer()))
        trainer.train()
        assert 0 < sum(trainer._last_rollout.rollout.truncated) < 8
        results.append((toy.weights(trainer.model), trainer._last_rollout.rollout.completion_ids))
    assert results[0][1] == results[1][1]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padded_rows_score_as_the_bare_rows_do(architecture: str) -> None:
    policy, critic = causal(architecture), classifier(architecture)
    packed = pack_sequences(PROMPTS, COMPLETIONS, PAD, CPU)
    with torch.no_grad():
        logprobs, entropy = completion_logprobs(policy, packed, temperature=0.7)
        values = completion_values(critic, packed)
        for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            ids = torch.tensor([prompt + completion])
            log_softmax = (policy(ids).logits[0] / 0.7).log_softmax(-1)[len(prompt) - 1 : -1]
            expected = log_softmax[range(len(completion)), completion]
            torch.testing.assert_close(logprobs[row, : len(completion)], expected, rtol=0, atol=1e-5)
            expected = -(log_softmax.exp() * log_softmax).sum(-1)
            torch.testing.assert_close(entropy[row, : len(completion)], expected, rtol=0, atol=1e-5)
            expected = critic.score(critic.base_model(ids).last_hidden_state)[0, len(prompt) - 1 :, 0]
            torch.testing.assert_close(values[row, : len(completion) + 1], expected, rtol=0, atol=1e-5)
