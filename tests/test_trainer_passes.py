"""Passes of the models over a rollout of unlike lengths: hardly any padding, and the same results."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import nn

from tieback.pipeline.rollout.sampler import Completion
from tieback.pipeline.rollout.texts import Rollout, make_rollout
from tieback.pipeline.trainer import PPOTrainer, passes
from tieback.ppo_core.batch import like_length_groups

ROWS = 64


def skewed_rollout(trainer: PPOTrainer, longest: int) -> Rollout:
    """Prompts and completions of 10 to 60 tokens, but for one prompt of `longest` and one completion of somewhat more than half."""
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, 60) for _ in range(count)]

    prompts = [tokens(draw.randint(10, 60)) for _ in range(ROWS)]
    completions = [tokens(draw.randint(10, 60)) for _ in range(ROWS)]
    prompts[20], completions[40] = tokens(longest), tokens(512 * longest // 900)
    rows = [trainer.train_dataset[row] for row in range(ROWS)]
    return make_rollout(rows, prompts, [Completion(ids, False) for ids in completions], toy.tokenizer())


def make(
    folder: Path, monkeypatch: pytest.MonkeyPatch, longest: int = 900, **settings: Any
) -> tuple[PPOTrainer, Rollout]:
    tok = toy.tokenizer()
    trainer = toy.ppo_trainer(
        folder,
        model=toy.brief_policy(tok, max_position_embeddings=1024),
        tok=tok,
        optim="sgd",
        learning_rate=0.05,
        max_steps=1,
        check_sampling=False,
        max_completion_length=512,
        per_device_train_batch_size=ROWS,
        train_dataset=toy.prompts(ROWS),
        **settings,
    )
    rollout = skewed_rollout(trainer, longest)
    monkeypatch.setattr(trainer, "generate", lambda _: rollout)
    return trainer, rollout


def count_tokens(backbone: nn.Module) -> list[int]:
    seen: list[int] = []
    backbone.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("num_minibatches", [1, 4])
def test_a_skewed_batch_costs_little_more_than_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_minibatches: int
) -> None:
    trainer, rollout = make(tmp_path, monkeypatch, num_minibatches=num_minibatches)
    policy, critic = (
        count_tokens(model) for model in (trainer.model.policy.model, trainer.model.critic.model)
    )
    trainer.train()
    lengths = [len(p) + len(c) for p, c in zip(rollout.prompt_ids, rollout.completion_ids, strict=True)]
    # Once for the rollout's log-probabilities and values, and once in each of the two epochs.
    assert policy == critic
    assert 3 * sum(lengths) <= sum(policy) <= 1.3 * 3 * sum(lengths)
    assert 3 * max(lengths) * ROWS > 8 * sum(policy), (
        "the batch is not skewed: the comparison proves too little"
    )


def test_like_lengths_together_change_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every row in a pass of the full width."""
    trainer, _ = make(tmp_path, monkeypatch, longest=200)
    trainer.train()
    whole, _ = make(tmp_path, monkeypatch, longest=200)
    monkeypatch.setattr(passes, "trim", lambda inputs: inputs)
    monkeypatch.setattr(passes, "TOKENS_AT_A_TIME_ON_CPU", 10**6)
    monkeypatch.setattr(passes, "_PASS_COST_ON_CPU", 10**6)
    seen = count_tokens(whole.model.policy.model)
    whole.train()
    assert len(seen) == 1 + 2 * 2
    torch.testing.assert_close(toy.weights(trainer.model), toy.weights(whole.model), rtol=0, atol=1e-6)
    (entry,), (other,) = toy.iteration_logs(trainer), toy.iteration_logs(whole)
    timing = {"epoch", "step", "grad_norm"}
    assert {k: v for k, v in entry.items() if k not in timing} == pytest.approx(
        {k: v for k, v in other.items() if k not in timing}, rel=1e-4, abs=1e-5
    )


# The split itself.


def cheapest(lengths: list[int], max_rows: int, max_positions: int | None) -> float:
    """Cost of the best split of `lengths`, sorted, found by trying every one."""
    if not lengths:
        return 0.0
    best = float("inf")
    for rows in range(1, min(max_rows, len(lengths)) + 1):
        if rows > 1 and max_positions is not None and rows * lengths[0] > max_positions:
            continue
        best = min(best, 100 + rows * lengths[0] + cheapest(lengths[rows:], max_rows, max_positions))
    return best


@pytest.mark.parametrize(("max_rows", "max_positions"), [(3, None), (9, 700), (4, 350), (1, None), (9, 1)])
def test_the_split_is_the_cheapest_of_all(max_rows: int, max_positions: int | None) -> None:
    draw = random.Random(max_rows)
    for _ in range(20):
        lengths = [draw.choice([draw.randint(1, 60), draw.randint(1, 900)]) for _ in range(9)]
        groups = [group.tolist() for group in like_length_groups(lengths, max_rows, max_positions, 100)]
        assert sorted(row for group in groups for row in group) == list(range(9))
        assert all(len(group) <= max_rows for group in groups)
        costs = [len(group) * lengths[group[0]] for group in groups]
        assert all(lengths[group[0]] == max(lengths[row] for row in group) for group in groups)
        assert max_positions is None or all(
            cost <= max_positions or len(group) == 1 for cost, group in zip(costs, groups, strict=True)
        )
        assert sum(costs) + 100 * len(groups) == cheapest(
            sorted(lengths, reverse=True), max_rows, max_positions
        )
    assert like_length_groups([], max_rows, max_positions, 100) == []
