"""Scores of sampled tokens: what is masked, and that padding changes nothing."""

import copy
from pathlib import Path

import pytest
import torch
import toy
from architectures import ARCHITECTURES, COMPLETIONS, CPU, END, PAD, PROMPTS, causal, classifier

from tieback.pipeline.rollout.token_scores import completion_logprobs, completion_values, pack_sequences


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
