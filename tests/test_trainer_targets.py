"""What is learnt from a rollout: the critic's own λ, λ by length, and what becomes of long and of cut completions."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from reference.toy import PLAIN, make_batch, poisoned, run
from torch import Tensor

from tieback.cli.errors import UsageError
from tieback.pipeline.rollout.texts import Rollout
from tieback.pipeline.trainer import PPOTrainer
from tieback.pipeline.trainer.rewards import ScoredRollout, overlong_shares, token_rewards
from tieback.pipeline.trainer.targets import without_truncated
from tieback.ppo_core import Batch, gae


def scored_batch(folder: Path, **settings: Any) -> tuple[PPOTrainer, ScoredRollout, Batch]:
    trainer = toy.ppo_trainer(folder, **settings)
    scored = trainer.score(trainer.generate([toy.prompts()[row] for row in range(8)]))
    return trainer, scored, trainer.to_batch(scored)


def advantages_of(
    trainer: PPOTrainer, scored: ScoredRollout, batch: Batch, gae_lambda: float | Tensor
) -> Tensor:
    assert batch.ref_logprobs is not None
    kl = batch.old_logprobs - batch.ref_logprobs
    rewards, discounts = token_rewards(
        scored.token_scores, kl, trainer.args.kl_coef, batch.mask, trainer.args.gamma
    )
    values = torch.cat([batch.old_values, torch.zeros(len(batch), 1)], dim=1)
    return gae(rewards, discounts, values, gae_lambda, batch.mask)


def test_the_critic_has_a_lambda_of_its_own(tmp_path: Path) -> None:
    settings = {"gae_lambda": 0.5, "kl_coef": 0.1, "critic_gae_lambda": 1.0}
    trainer, scored, batch = scored_batch(tmp_path, **settings)
    policys, critics = (advantages_of(trainer, scored, batch, gae_lambda) for gae_lambda in (0.5, 1.0))
    torch.testing.assert_close(batch.advantages[batch.mask], policys[batch.mask], rtol=0, atol=1e-6)
    returns = (critics + batch.old_values)[batch.mask]
    torch.testing.assert_close(batch.returns[batch.mask], returns, rtol=0, atol=1e-6)
    assert (policys - critics).abs().max() > 0.1


def test_lambda_follows_the_length_of_each_completion_and_leaves_the_critics_alone(tmp_path: Path) -> None:
    trainer, scored, batch = scored_batch(tmp_path, gae_lambda_alpha=0.5, critic_gae_lambda=0.9)
    lengths = [len(ids) for ids in scored.rollout.completion_ids]
    assert len(set(lengths)) > 2
    lambdas = torch.tensor([max(0.0, 1 - 1 / (0.5 * length)) for length in lengths])
    expected = advantages_of(trainer, scored, batch, lambdas)
    torch.testing.assert_close(batch.advantages[batch.mask], expected[batch.mask], rtol=0, atol=1e-6)
    returns = advantages_of(trainer, scored, batch, 0.9) + batch.old_values
    torch.testing.assert_close(batch.returns[batch.mask], returns[batch.mask], rtol=0, atol=1e-6)


def rollout_of_lengths(lengths: list[int], truncated: list[bool]) -> Rollout:
    ids = [[7] * length for length in lengths]
    return Rollout([""] * len(ids), {}, ids, ids, truncated, [""] * len(ids))


def test_the_penalty_rises_over_the_last_tokens_before_the_limit() -> None:
    rollout = rollout_of_lengths([5, 6, 7, 9, 10, 10], [False, False, False, False, False, True])
    assert overlong_shares(rollout, 10, None).tolist() == [0, 0, 0, 0, 0, 1]
    assert overlong_shares(rollout, 10, 4).tolist() == pytest.approx([0, 0, 0.25, 0.75, 1, 1])


def test_long_completions_are_charged_their_share_of_the_missing_eos_penalty(tmp_path: Path) -> None:
    _, scored, _ = scored_batch(tmp_path, missing_eos_penalty=2.0, overlong_buffer_length=4)
    lengths = torch.tensor([float(len(ids)) for ids in scored.rollout.completion_ids])
    shares = torch.where(torch.tensor(scored.rollout.truncated), 1.0, ((lengths - 2) / 4).clamp(0, 1))
    torch.testing.assert_close(scored.scores, scored.raw_scores - 2.0 * shares, rtol=0, atol=1e-6)
    assert len(set(shares.tolist())) > 2


def test_from_masked_completions_nothing_is_learnt() -> None:
    lengths, cut = [1, 3, 5, 2, 5, 4, 1], [False, True, False, False, True, False, False]
    batch = make_batch(lengths)
    rows = torch.tensor([row for row, truncated in enumerate(cut) if not truncated])
    after, stats = run(without_truncated(batch, cut), PLAIN)
    expected, expected_stats = run(batch[rows], PLAIN)
    torch.testing.assert_close(after, expected, rtol=2e-6, atol=2e-6)
    assert stats.metrics() == pytest.approx(expected_stats.metrics(), rel=2e-5, abs=1e-6)


def test_with_mask_a_cut_completion_has_no_penalty_and_its_figures_are_logged(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path / "mask", truncation="mask", missing_eos_penalty=5.0, max_steps=1)
    trainer.train()
    (mask,) = toy.iteration_logs(trainer)
    trainer = toy.ppo_trainer(
        tmp_path / "penalty", truncation="penalty", missing_eos_penalty=5.0, max_steps=1
    )
    trainer.train()
    (penalty,) = toy.iteration_logs(trainer)
    # The same completions were sampled, all of them count in the figures of the rollout ...
    for name in ("completions/mean_length", "completions/truncated_fraction", "kl/ref", "reward/mean"):
        assert mask[name] == penalty[name]
    assert 0 < mask["completions/truncated_fraction"] < 1
    # ... and none is charged.
    assert mask["reward/normalized_mean"] == pytest.approx(mask["reward/mean"], abs=1e-6)
    assert mask["policy/loss"] != penalty["policy/loss"]


def test_masking_every_completion_is_an_error_that_names_the_settings(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, truncation="mask", max_completion_length=1)
    trainer.sampler.end_ids.clear()  # nothing ends
    trainer.sampler.config.eos_token_id = None
    with pytest.raises(
        UsageError, match="cut at max_completion_length, and truncation=mask leaves those out"
    ):
        trainer.train()


def test_the_mask_of_what_is_learnt_hides_garbage() -> None:
    batch = make_batch([2, 3, 1])
    cut = [False, True, False]
    dirty = replace(batch, old_logprobs=batch.old_logprobs.clone())
    dirty.old_logprobs[1] = math.nan
    clean_result, dirty_result = (
        run(poisoned(without_truncated(one, cut), math.nan), PLAIN)[0] for one in (batch, dirty)
    )
    assert torch.equal(clean_result, dirty_result)
