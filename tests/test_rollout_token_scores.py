"""Scores of sampled tokens: what is masked, and that padding changes nothing."""

import copy
from pathlib import Path

import pytest
import torch
import toy
from architectures import ARCHITECTURES, COMPLETIONS, CPU, END, PAD, PROMPTS, causal, classifier

from tieback.pipeline.rollout import token_scores
from tieback.pipeline.rollout.token_scores import (
    completion_logprobs,
    completion_values,
    pack_sequences,
    trim,
)


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


@pytest.mark.parametrize("rows", [range(5), range(1, 2)], ids=["unlike lengths", "one length"])
def test_the_head_computes_the_tokens_of_completions_alone_with_the_same_results(
    rows: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = causal("Llama")
    packed = pack_sequences(PROMPTS, COMPLETIONS, PAD, CPU)
    packed = {name: tensor[list(rows)] for name, tensor in packed.items()}
    computed = []
    head = token_scores.token_logprobs

    def counted(model, hidden, ids, *args):
        computed.append(ids.numel())
        return head(model, hidden, ids, *args)

    monkeypatch.setattr(token_scores, "token_logprobs", counted)
    results = []
    for inputs in (packed, trim(packed)):
        mask = inputs["mask"][:, : inputs["completion_ids"].shape[1]]
        logprobs, entropy = completion_logprobs(policy, inputs, 0.7, entropy_requires_grad=True)
        policy.zero_grad()
        (logprobs + 0.3 * entropy)[mask].sum().backward()
        gradients = [parameter.grad for parameter in policy.parameters()]
        results.append((logprobs[mask], entropy[mask], *gradients))
        past = (logprobs[~mask], entropy[~mask])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert computed[0] == packed["completion_ids"].numel()
    assert 0 <= computed[1] - packed["mask"].sum() < len(rows)
    assert not any(x.any() for x in past)
