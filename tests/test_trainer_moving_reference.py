"""A reference that moves: by the formula, with adapters, through checkpoints; and where PPO then goes, in closed form."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import test_optimum as language
import torch
import toy
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tieback.cli.errors import UsageError
from tieback.pipeline.rollout.adapters import adapter_parameters
from tieback.pipeline.trainer import PPOConfig, PPOTrainer
from tieback.pipeline.trainer.moving_reference import REFERENCE_FILE

ADAPTER = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "down_proj"])}


def recorded(trainer: PPOTrainer) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Policy and reference before training, and after each iteration (filled in as it trains)."""
    seen = [(toy.weights(trainer.model.policy), toy.weights(trainer.reference))]
    follow = trainer.moving_reference.follow

    def watched(iteration: int) -> None:
        follow(iteration)
        seen.append((toy.weights(trainer.model.policy), toy.weights(trainer.reference)))

    trainer.moving_reference.follow = watched  # type: ignore[method-assign]
    return seen


def test_it_follows_the_policy_by_the_formula(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, max_steps=3, ref_model_sync_steps=1, ref_model_mixup_alpha=0.25)
    seen = recorded(trainer)
    trainer.train()
    assert len(seen) == 4
    for (_, before), (policy, after) in itertools.pairwise(seen):
        for name, weight in after.items():
            expected = 0.75 * before[name] + 0.25 * policy[name]
            torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
    assert toy.iteration_logs(trainer)[0]["kl/ref"] == 0


def test_it_is_reset_every_so_many_iterations_and_the_kl_is_to_the_new_one(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, max_steps=5, ref_model_sync_steps=2)
    seen = recorded(trainer)
    trainer.train()
    for iteration, (policy, reference) in enumerate(seen):
        same = all(torch.equal(policy[name], reference[name]) for name in policy)
        assert same == (iteration in (0, 2, 4))
    kls = [log["kl/ref"] for log in toy.iteration_logs(trainer)]
    assert [kl == 0 for kl in kls] == [True, False, True, False, True]


@pytest.mark.parametrize("start", ["new", "of SFT"])
def test_a_reference_that_is_an_adapter_is_reset_too(tmp_path: Path, start: str) -> None:
    settings: dict[str, Any] = {**ADAPTER, "max_steps": 3, "ref_model_sync_steps": 2}
    if start == "of SFT":
        torch.manual_seed(3)
        base = toy.brief_policy(toy.tokenizer())
        settings |= {"model": get_peft_model(base, settings.pop("peft_config"))}
    trainer = toy.ppo_trainer(tmp_path, **settings)
    assert trainer.reference is None
    before = {name: p.clone() for name, p in adapter_parameters(trainer.model.policy, "reference").items()}
    trainer.train()
    kls = [log["kl/ref"] for log in toy.iteration_logs(trainer)]
    # Near 0 alone, as PEFT adds another adapter's part in another order.
    assert abs(kls[0]) < 1e-5
    assert abs(kls[1]) > 1e-3
    assert abs(kls[2]) < 1e-5
    after = adapter_parameters(trainer.model.policy, "reference")
    assert any(not torch.equal(before[name], weight) for name, weight in after.items())
    assert not any(weight.requires_grad for weight in after.values())


def resumable(folder: Path, **settings: Any) -> PPOTrainer:
    defaults = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "ref_model_sync_steps": 2}
    return toy.ppo_trainer(folder, **(defaults | settings))


CASES: dict[str, dict[str, Any]] = {
    "whole": {"ref_model_mixup_alpha": 0.5},
    "adapter": ADAPTER,
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_resumes_with_the_reference_that_it_had(tmp_path: Path, case: str) -> None:
    straight = resumable(tmp_path / "run", **CASES[case])
    straight.train()
    resumed = resumable(tmp_path / "resumed", **CASES[case])
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert toy.iteration_logs(resumed)[-1] == toy.iteration_logs(straight)[-1]
    for name, weight in toy.weights(straight.model).items():
        assert torch.equal(weight, resumed.model.get_parameter(name)), name


@pytest.mark.slow
def test_a_run_that_goes_on_with_a_reference_that_stays_keeps_where_it_was(tmp_path: Path) -> None:
    resumable(tmp_path).train()
    changed = resumable(
        tmp_path, ref_model_sync_steps=None, resume_with_changes=["ref_model_sync_steps"], max_steps=5
    )
    changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert toy.iteration_logs(changed)[-1]["kl/ref"] == 0  # it was reset after iteration 4
    assert (tmp_path / "checkpoint-5" / REFERENCE_FILE).is_file()


@pytest.mark.slow
def test_an_adapter_that_has_moved_is_not_lost_in_silence(tmp_path: Path) -> None:
    resumable(tmp_path, **ADAPTER, max_steps=2).train()
    checkpoint, changes = str(tmp_path / "checkpoint-2"), ["ref_model_sync_steps"]
    stays = resumable(tmp_path, **ADAPTER, ref_model_sync_steps=None, resume_with_changes=changes)
    with pytest.raises(UsageError, match="Set it to more iterations than max_steps"):
        stays.train(resume_from_checkpoint=checkpoint)
    kept = resumable(tmp_path, **ADAPTER, ref_model_sync_steps=100, resume_with_changes=changes)
    kept.train(resume_from_checkpoint=checkpoint)
    logs = toy.iteration_logs(kept)
    assert abs(logs[-2]["kl/ref"]) < 1e-5
    assert abs(logs[-1]["kl/ref"]) > 1e-3


def test_a_reference_that_stays_is_in_no_checkpoint(tmp_path: Path) -> None:
    resumable(tmp_path, ref_model_sync_steps=None, max_steps=1).train()
    assert not (tmp_path / "checkpoint-1" / REFERENCE_FILE).exists()


def test_in_bf16_the_reference_keeps_weights_in_which_small_steps_do_not_vanish(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, bf16=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.01)
    assert {p.dtype for p in trainer.reference.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ref_model_mixup_alpha": 0.5}, "ref_model_sync_steps is not set"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps must be above 0"),
        (
            {"ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.0},
            "ref_model_mixup_alpha must be above 0 and at most 1",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)


def test_a_mean_of_two_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a mean of the matrices of two adapters"):
        toy.ppo_trainer(tmp_path, **ADAPTER, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5)


@pytest.mark.slow
def test_each_reset_tilts_the_optimum_once_more(tmp_path: Path) -> None:
    """From π_0 the best policy is ∝ π_0 exp(r/β); from there, reset as reference, ∝ π_0 exp(2r/β): the optimum of β/2."""
    trainer = language.language_trainer(
        tmp_path, max_steps=80, ref_model_sync_steps=40, lr_scheduler_type="constant", learning_rate=2e-3
    )
    policy, prompt = trainer.model.policy, language.six_words()("q")["input_ids"]
    log_start = language.log_distribution(policy, prompt)
    responses = language.all_responses()
    rewards = torch.tensor(
        [language.reward_of(ids) - language.PENALTY * (ids[-1] != language.END) for ids in responses]
    ).double()
    half = language.BETA / 2
    best = half * torch.logsumexp(log_start + rewards / half, dim=0)
    trainer.train()
    log_policy = language.log_distribution(policy, prompt)
    reached = (log_policy.exp() * (rewards - half * (log_policy - log_start))).sum()
    assert 0.98 * best <= reached <= best + 1e-6
    # With the reference that stays, PPO would stop at the optimum of β, which lacks that much of it.
    log_first = (log_start + rewards / language.BETA).log_softmax(0)
    without = (log_first.exp() * (rewards - half * (log_first - log_start))).sum()
    assert without < 0.97 * best
