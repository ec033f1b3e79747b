"""Rewards: where scores land, and the statistics that scores are divided by."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from torch import Tensor

from tieback.pipeline.trainer.figures import sequence_kl
from tieback.pipeline.trainer.rewards import MomentsOfEach, RunningMoments, token_rewards
from tieback.ppo_core import gae

LENGTHS = [3, 1, 5, 4]
MASK = torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1)


def at_last(scores: Tensor) -> Tensor:
    """Scores [B] where they are paid: at the last of `LENGTHS` tokens, [B, 5]."""
    return torch.zeros(len(scores), 5).scatter(1, torch.tensor(LENGTHS).unsqueeze(1) - 1, scores.unsqueeze(1))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The score and the KL penalty, per token.


def test_the_score_is_paid_at_the_last_real_token_and_nothing_follows_it() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rewards, discounts = token_rewards(at_last(scores), torch.zeros(4, 5), 0.1, MASK, 0.9)
    for row, length in enumerate(LENGTHS):
        expected = [0.0] * 5
        expected[length - 1] = scores[row].item()
        assert rewards[row].tolist() == expected
        assert discounts[row, :length].tolist() == pytest.approx([0.9] * (length - 1) + [0.0])


def test_right_padding_changes_no_advantage() -> None:
    scores, kl, values = random(4), random(4, 5, seed=1), random(4, 6, seed=2)
    paid = at_last(scores)
    rewards, discounts = token_rewards(paid, kl, 0.1, MASK, 0.9)
    advantages = gae(rewards, discounts, values, 0.8, MASK)
    for row, length in enumerate(LENGTHS):
        alone = token_rewards(
            paid[row : row + 1, :length], kl[row : row + 1, :length], 0.1, MASK[row : row + 1, :length], 0.9
        )
        expected = gae(*alone, values[row : row + 1, : length + 1], 0.8)
        torch.testing.assert_close(advantages[row, :length], expected[0], rtol=0, atol=1e-6)
        # The last token's own: score − kl_coef·KL − V, full rows and padded rows alike.
        last = scores[row] - 0.1 * kl[row, length - 1] - values[row, length - 1]
        torch.testing.assert_close(advantages[row, length - 1], last, rtol=0, atol=1e-6)


def test_garbage_under_the_mask_reaches_no_reward() -> None:
    kl = random(4, 5)
    expected = token_rewards(at_last(torch.ones(4)), kl, 0.1, MASK, 0.9)[0]
    rewards = token_rewards(at_last(torch.ones(4)), torch.where(MASK, kl, torch.nan), 0.1, MASK, 0.9)[0]
    torch.testing.assert_close(rewards, expected, rtol=0, atol=0)


def test_each_token_pays_its_own_kl(tmp_path: Path) -> None:
    for estimator in ("k1", "k2", "k3"):
        trainer = toy.ppo_trainer(
            tmp_path, kl_coef=0.3, gamma=1.0, gae_lambda=1.0, kl_estimator=estimator, max_steps=1
        )
        trainer.train()
        scored = trainer.score(trainer.generate([toy.prompts()[row] for row in range(8)]))
        batch = trainer.to_batch(scored)
        assert batch.ref_logprobs is not None
        kl_of_rows = sequence_kl(batch.old_logprobs, batch.ref_logprobs, batch.mask)
        ids, prompt_ids = scored.rollout.completion_ids, scored.rollout.prompt_ids
        for row, (prompt, completion) in enumerate(zip(prompt_ids, ids, strict=True)):
            d = logprobs(trainer.model.policy, prompt, completion) - logprobs(
                trainer.reference, prompt, completion
            )
            kl = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[estimator]
            # With gamma = lambda = 1 a return is the sum of the rewards from its token on.
            expected = scored.scores[row] - 0.3 * kl.flip(0).cumsum(0).flip(0)
            torch.testing.assert_close(batch.returns[row, : len(completion)], expected, rtol=0, atol=2e-5)
            assert kl_of_rows[row].item() == pytest.approx(d.sum().item(), abs=1e-5)
            assert d.abs().max() > 1e-3


def logprobs(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(completion)), completion]


# Rewards by token.


def halves(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
    """Half a point for each token of an even number, less one for each of an odd one."""
    return [[0.5 - 1.5 * (i % 2) for i in ids] for ids in completion_ids]


def test_a_reward_given_by_token_is_paid_at_its_token_and_beside_one_of_the_whole(tmp_path: Path) -> None:
    def some(completion_ids: list[list[int]], **_: Any) -> list[list[float] | float | None]:
        by_token = halves(completion_ids)
        return [by_token[row] if row < 3 else None if row < 5 else 4.0 for row in range(8)]

    trainer = toy.ppo_trainer(
        tmp_path, [some, toy.id_reward], reward_weights=[2.0, 0.5], missing_eos_penalty=0.25,
        gamma=1.0, gae_lambda=1.0, kl_coef=0.0,
    )  # fmt: skip
    scored = trainer.score(trainer.generate([toy.prompts()[row] for row in range(8)]))
    batch = trainer.to_batch(scored)
    ids = scored.rollout.completion_ids
    whole, tokens = toy.id_reward(ids), halves(ids)
    assert len({len(row) for row in ids}) > 1
    for row, completion in enumerate(ids):
        expected = np.zeros(scored.token_scores.shape[1])
        last = len(completion) - 1
        if row < 3:
            expected[: last + 1] += 2.0 * np.array(tokens[row])
        elif row >= 5:
            expected[last] += 8.0
        expected[last] += 0.5 * whole[row] - 0.25 * scored.rollout.truncated[row]
        assert scored.token_scores[row].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
        assert scored.scores[row].item() == pytest.approx(expected.sum(), abs=1e-5)
        # With gamma = lambda = 1 and no KL a return is the sum of what is paid from its token on.
        to_come = expected[: last + 1][::-1].cumsum()[::-1]
        assert batch.returns[row, : last + 1].tolist() == pytest.approx(to_come.tolist(), abs=1e-5)
    assert scored.rewards[:3, 0].tolist() == pytest.approx([sum(row) for row in tokens[:3]])
    assert scored.rewards[3:5, 0].isnan().all()


def test_rewards_by_token_are_normalised_by_the_deviation_of_their_sums_and_clipped_each(
    tmp_path: Path,
) -> None:
    trainer = toy.ppo_trainer(
        tmp_path, halves, normalize_rewards=True, reward_clip=0.3, missing_eos_penalty=0
    )
    scored = trainer.score(trainer.generate([toy.prompts()[row] for row in range(8)]))
    tokens = halves(scored.rollout.completion_ids)
    deviation = np.std([sum(row) for row in tokens], ddof=1)
    for row, rewards in enumerate(tokens):
        expected = np.clip(np.array(rewards) / deviation, -0.3, 0.3)
        assert scored.token_scores[row, : len(rewards)].tolist() == pytest.approx(expected.tolist(), abs=1e-6)


# Cut completions.


def test_only_a_cut_completion_pays_the_missing_eos_penalty(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(
        tmp_path, lambda completions, **_: [2.0] * len(completions), missing_eos_penalty=0.7
    )
    scored = trainer.score(trainer.generate([toy.prompts()[row] for row in range(8)]))
    assert 0 < sum(scored.rollout.truncated) < 8
    expected = [2.0 - 0.7 * cut for cut in scored.rollout.truncated]
    assert scored.scores.tolist() == pytest.approx(expected)
    assert scored.rewards.tolist() == [[2.0]] * 8


def test_bootstrapping_adds_the_discounted_value_of_the_end_and_follows_nothing() -> None:
    scores, kl, ends = random(4), random(4, 5, seed=1), torch.tensor([0.0, 5.0, 0.0, -3.0])
    rewards, discounts = token_rewards(at_last(scores), kl, 0.1, MASK, 0.9, bootstrap_values=ends)
    plain, plain_discounts = token_rewards(at_last(scores), kl, 0.1, MASK, 0.9)
    added = torch.zeros(4, 5)
    added[1, 0], added[3, 3] = 0.9 * 5.0, 0.9 * -3.0
    torch.testing.assert_close(rewards - plain, added, rtol=0, atol=1e-6)
    assert torch.equal(discounts, plain_discounts)


def test_with_bootstrap_a_cut_completion_counts_the_critics_value_of_its_end(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, truncation="bootstrap", gamma=0.9, kl_coef=0.0)
    scored = trainer.score(trainer.generate([toy.prompts()[row] for row in range(8)]))
    batch = trainer.to_batch(scored)
    truncated = scored.rollout.truncated
    assert 0 < sum(truncated) < 8
    # No penalty in this mode: the scores are the function's own.
    torch.testing.assert_close(scored.scores, scored.rewards[:, 0], rtol=0, atol=0)
    critic = trainer.model.critic
    for row, (prompt, completion) in enumerate(
        zip(scored.rollout.prompt_ids, scored.rollout.completion_ids, strict=True)
    ):
        with torch.no_grad():
            hidden = critic.base_model(torch.tensor([prompt + completion])).last_hidden_state
        values = critic.score(hidden)[0, :, 0]
        expected = scored.scores[row] + (0.9 * values[-1] if truncated[row] else 0.0)
        last = len(completion) - 1
        assert batch.returns[row, last].item() == pytest.approx(expected.item(), abs=1e-5)


# Normalising and clipping.


def test_running_moments_are_those_of_all_scores_together_also_after_a_resume() -> None:
    generator = np.random.default_rng(0)
    # A mean far from zero, where naive sums of squares lose their digits.
    pieces = [1e4 + generator.normal(size=size) for size in (1, 7, 2, 64, 5)]
    moments = RunningMoments()
    for index, piece in enumerate(pieces):
        if index == 3:
            state = json.loads(json.dumps(moments.state_dict()))
            moments = RunningMoments()
            moments.load_state_dict(state)
        moments.update(torch.tensor(piece))
    together = np.concatenate(pieces)
    assert moments.count == len(together)
    assert moments.mean == pytest.approx(together.mean(), rel=1e-12)
    assert moments.std == pytest.approx(together.std(ddof=1), rel=1e-9)


def test_before_there_is_a_spread_scores_are_divided_by_one() -> None:
    moments = RunningMoments()
    assert moments.std == 1.0
    moments.update(torch.tensor([3.0]))
    assert moments.std == 1.0
    moments.update(torch.tensor([3.0, 3.0]))
    assert moments.std == 1.0


def test_normalised_scores_are_divided_by_the_deviation_so_far_and_evaluation_leaves_it(
    tmp_path: Path,
) -> None:
    trainer = toy.ppo_trainer(tmp_path, normalize_rewards=True, missing_eos_penalty=0)
    rows = [toy.prompts()[row] for row in range(8)]
    seen: list[float] = []
    for _ in range(3):
        scored = trainer.score(trainer.generate(rows))
        seen += scored.rewards[:, 0].tolist()
        torch.testing.assert_close(scored.scores, scored.rewards[:, 0] / np.std(seen, ddof=1))
    before = trainer.reward_moments.state_dict()
    trainer.score(trainer.generate(rows), training=False)
    assert trainer.reward_moments.state_dict() == before


def test_each_reward_is_divided_by_its_own_deviation_and_what_is_not_judged_is_left_out(
    tmp_path: Path,
) -> None:
    def large(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None if row == 2 else 1000.0 * (ids[0] % 7) for row, ids in enumerate(completion_ids)]

    settings = {"normalize_each_reward": True, "reward_weights": [1.0, 0.5], "missing_eos_penalty": 0}
    trainer = toy.ppo_trainer(tmp_path, [toy.id_reward, large], **settings)
    rows = [toy.prompts()[row] for row in range(8)]
    seen: list[Tensor] = []
    for _ in range(3):
        scored = trainer.score(trainer.generate(rows))
        seen.append(scored.rewards)
        small, of_large = torch.cat(seen).T
        deviations = (np.std(small.tolist(), ddof=1), np.std(of_large[~of_large.isnan()].tolist(), ddof=1))
        expected = (
            scored.rewards[:, 0] / deviations[0] + 0.5 * scored.rewards[:, 1].nan_to_num() / deviations[1]
        )
        torch.testing.assert_close(scored.scores, expected.float(), rtol=1e-5, atol=1e-6)
    raw = scored.rewards[:, 0] + 0.5 * scored.rewards[:, 1].nan_to_num()
    torch.testing.assert_close(scored.raw_scores, raw)
    before = trainer.moments_of_each.state_dict()
    trainer.score(trainer.generate(rows), training=False)
    assert trainer.moments_of_each.state_dict() == before
    restored = MomentsOfEach(2)
    restored.load_state_dict(json.loads(json.dumps(before)))
    assert restored.stds == trainer.moments_of_each.stds


def test_clipping_comes_after_normalising_and_before_the_penalty(tmp_path: Path) -> None:
    values = [-9.0, -1.0, 0.0, 0.1, 0.5, 1.0, 4.0, 100.0]
    trainer = toy.ppo_trainer(
        tmp_path, lambda **_: values, normalize_rewards=True, reward_clip=0.02, missing_eos_penalty=1.0
    )
    scored = trainer.score(trainer.generate([toy.prompts()[row] for row in range(8)]))
    clipped = np.clip(np.array(values) / np.std(values, ddof=1), -0.02, 0.02)
    assert len(set(clipped)) > 3
    expected = clipped - np.array(scored.rollout.truncated)
    assert scored.scores.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
