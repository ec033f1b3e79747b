"""PPO-ptx and the likelihood of good completions: what is imitated, how strongly, and that the policy learns it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor

from tieback.pipeline.trainer import PPOConfig, PPOTrainer
from tieback.pipeline.trainer.imitation import Text, encode_text

PTX = {"ptx_dataset": toy.demonstrations(), "ptx_coef": 0.5}


def token_nll(model: torch.nn.Module, texts: list[Text]) -> Tensor:
    """Mean −log π over all imitated tokens, each text by itself."""
    parts = []
    for prompt, completion in texts:
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        parts.append(-logits.log_softmax(-1)[range(len(completion)), completion])
    return torch.cat(parts).mean()


# Demonstrations as tokens.


def args(folder: Path, **settings: Any) -> PPOConfig:
    return PPOConfig(output_dir=str(folder), use_cpu=True, report_to="none", **settings)


def test_the_answer_stands_behind_what_is_sampled_from_and_ends_as_a_turn_does(tmp_path: Path) -> None:
    tok, (row, *_) = toy.tokenizer(), toy.demonstrations()
    text = encode_text(row, tok, args(tmp_path))
    assert text is not None
    prompt = tok.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert text.prompt_ids == prompt
    assert tok.decode(text.completion_ids).startswith(row["completion"][0]["content"])
    assert tok.eos_token_id in text.completion_ids
    same = encode_text({"messages": row["prompt"] + row["completion"]}, tok, args(tmp_path))
    assert same == text


def test_plain_texts_end_with_eos_once(tmp_path: Path) -> None:
    tok = toy.tokenizer()
    words, end = tok("cat up")["input_ids"], tok.eos_token_id
    assert encode_text({"text": "cat up"}, tok, args(tmp_path)) == Text(words[:1], [*words[1:], end])
    answered = encode_text({"prompt": "cat", "completion": " up"}, tok, args(tmp_path))
    assert answered == Text(tok("cat")["input_ids"], [*tok(" up")["input_ids"], end])
    closed = encode_text({"text": f"cat up{tok.eos_token}"}, tok, args(tmp_path))
    assert closed == Text(words[:1], [*words[1:], end])


def test_what_is_longer_is_cut_and_left_out_where_nothing_remains(tmp_path: Path) -> None:
    tok, (row, *_) = toy.tokenizer(), toy.demonstrations()
    whole = encode_text(row, tok, args(tmp_path))
    assert whole is not None
    room = len(whole.prompt_ids)
    cut = encode_text(row, tok, args(tmp_path, ptx_max_length=room + 1))
    assert cut == Text(whole.prompt_ids, whole.completion_ids[:1])
    assert encode_text(row, tok, args(tmp_path, ptx_max_length=room)) is None


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no coefficient": ({"ptx_dataset": toy.demonstrations()}, r"ptx_coef is 0\.0, .* has no effect then: give both"),
    "no texts": ({"ptx_coef": 0.5}, r"ptx_coef is 0\.5, .* is missing: give both"),
    "no completion": (
        {"ptx_coef": 0.5, "ptx_dataset": [{"prompt": "a"}]},
        r"ptx_dataset, row 0.*completion",
    ),
    "too long": (PTX | {"ptx_max_length": 2}, r"ptx_dataset: no text has anything to imitate in its first ptx_max_length=2"),
    "one of two": ({"positive_nll_coef": 0.1}, "positive_nll_coef imitates .*set both, or neither"),
    "the other": ({"positive_score": 0.1}, "positive_nll_coef imitates .*set both, or neither"),
    "negative": ({"ptx_coef": -1.0}, r"ptx_coef must be a finite number of at least 0, got -1\.0"),
    "no batch": (PTX | {"ptx_batch_size": 0}, "ptx_batch_size must be at least 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, fault: str) -> None:
    settings, message = FAULTS[fault]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        toy.ppo_trainer(tmp_path, **settings)


# What the policy learns.

ONE_STEP = {
    "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "num_ppo_epochs": 1, "num_minibatches": 1,
    "max_steps": 1, "lr_scheduler_type": "constant",
}  # fmt: skip


def stepped(folder: Path, **settings: Any) -> PPOTrainer:
    trainer = toy.ppo_trainer(folder, **(ONE_STEP | settings))
    trainer.train()
    return trainer


def assert_moved_by(one: PPOTrainer, other: PPOTrainer, loss: Tensor, start: torch.nn.Module) -> None:
    """`one` has stepped farther than `other` by the gradient of `loss`, which was computed on `start`."""
    loss.backward()
    moved = 0.0
    for (name, before), after, without in zip(
        start.named_parameters(),
        one.model.policy.parameters(),
        other.model.policy.parameters(),
        strict=True,
    ):
        assert before.grad is not None, name
        expected = without - 0.1 * before.grad
        torch.testing.assert_close(after, expected, rtol=0, atol=2e-6, msg=name)
        moved = max(moved, float(before.grad.abs().max()))
    assert moved > 1e-3


def test_the_texts_pull_by_the_gradient_of_their_mean_loss_a_token(tmp_path: Path) -> None:
    with_it = stepped(tmp_path / "with", **PTX, ptx_batch_size=3)
    without = stepped(tmp_path / "without")
    texts = with_it.ptx.draw(0, with_it.accelerator)
    assert len(texts) == 3
    start = toy.brief_policy(toy.tokenizer())
    loss = 0.5 * token_nll(start, texts)
    logged = toy.iteration_logs(with_it)[0]["imitation/loss"]
    assert logged == pytest.approx(loss.item(), rel=1e-5)
    assert_moved_by(with_it, without, loss, start)


def test_good_completions_pull_by_the_gradient_of_theirs(tmp_path: Path) -> None:
    with_it = stepped(tmp_path / "with", positive_nll_coef=0.3, positive_score=0.5)
    without = stepped(tmp_path / "without")
    scored = with_it._last_rollout
    good = [row for row, score in enumerate(scored.raw_scores.tolist()) if score >= 0.5]
    assert 0 < len(good) < 8
    rollout = scored.rollout
    start = toy.brief_policy(toy.tokenizer())
    texts = [Text(rollout.prompt_ids[row], rollout.completion_ids[row]) for row in good]
    assert_moved_by(with_it, without, 0.3 * token_nll(start, texts), start)


def test_a_truncated_completion_that_is_masked_is_not_imitated_either(tmp_path: Path) -> None:
    settings = {"truncation": "mask", "positive_nll_coef": 0.3, "positive_score": -1.0}
    with_it = stepped(tmp_path / "with", **settings)
    without = stepped(tmp_path / "without", truncation="mask")
    rollout = with_it._last_rollout.rollout
    ended = [row for row in range(8) if not rollout.truncated[row]]
    assert 0 < len(ended) < 8
    start = toy.brief_policy(toy.tokenizer())
    texts = [Text(rollout.prompt_ids[row], rollout.completion_ids[row]) for row in ended]
    assert_moved_by(with_it, without, 0.3 * token_nll(start, texts), start)


@pytest.mark.slow
def test_with_a_reward_of_nothing_the_policy_comes_to_speak_as_the_texts_do(tmp_path: Path) -> None:
    def nothing(completions: list[Any], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    trainer = toy.ppo_trainer(
        tmp_path, nothing, ptx_dataset=toy.demonstrations(), ptx_coef=1.0, max_steps=25, kl_coef=0.0,
        missing_eos_penalty=0.0, vf_coef=0.0, whiten_advantages=False, gae_lambda=1.0,
    )  # fmt: skip
    before = token_nll(trainer.model.policy, trainer.ptx.texts).item()
    trainer.train()
    after = token_nll(trainer.model.policy, trainer.ptx.texts).item()
    assert before > 3
    assert after < 0.5


@pytest.mark.slow
def test_a_run_resumes_to_the_same_weights_with_the_texts_that_it_would_have_drawn(tmp_path: Path) -> None:
    settings = PTX | {
        "positive_nll_coef": 0.1,
        "positive_score": 0.3,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = toy.ppo_trainer(tmp_path / "whole", max_steps=4, **settings)
    whole.train()
    toy.ppo_trainer(tmp_path / "parts", max_steps=4, **settings).train()
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    again = toy.ppo_trainer(tmp_path / "parts", max_steps=4, **settings)
    again.train(resume_from_checkpoint=True)
    torch.testing.assert_close(toy.weights(again.model), toy.weights(whole.model), rtol=0, atol=0)
