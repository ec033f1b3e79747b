"""A PPO iteration: its steps, learning rates and KL, what it moves, the self-checks, and what must not change it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor

from tieback.pipeline.rollout.sampler import TransformersSampler
from tieback.pipeline.rollout.token_scores import completion_logprobs
from tieback.pipeline.trainer import PPOTrainer
from tieback.pipeline.trainer import trainer as trainer_module
from tieback.pipeline.trainer.ratio_checks import SelfCheckError


def watch_steps(trainer: PPOTrainer) -> list[list[float]]:
    """Record the learning rates (one a parameter group) of each optimiser step that has gradients."""
    steps: list[list[float]] = []

    def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups
        if any(parameter.grad is not None for group in groups for parameter in group["params"]):
            steps.append([group["lr"] for group in groups])

    trainer.create_optimizer().register_step_pre_hook(record)
    return steps


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((first[name] - second[name]).square().sum()) for name in first))


# Steps and learning rates.


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_an_iteration_takes_epochs_times_minibatches_steps_also_where_it_is_the_whole_data_set(
    tmp_path: Path, micro_batch_size: int | None
) -> None:
    trainer = toy.ppo_trainer(
        tmp_path,
        train_dataset=toy.prompts(8),
        micro_batch_size=micro_batch_size,
        num_ppo_epochs=3,
        num_minibatches=4,
    )
    steps = watch_steps(trainer)
    trainer.train()
    assert len(steps) == 2 * 3 * 4
    assert [entry["optimizer_steps"] for entry in toy.iteration_logs(trainer)] == [12, 12]
    # Trainer's own call of step() after each iteration did nothing.
    states = trainer.optimizer.state_dict()["state"].values()
    assert {int(state["step"]) for state in states} == {24}


def test_learning_rates_follow_the_schedule_once_an_iteration_in_both_groups(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, max_steps=4, learning_rate=1e-3, critic_learning_rate=4e-3)
    steps = watch_steps(trainer)
    trainer.train()
    shares = [share for share in (1.0, 0.75, 0.5, 0.25) for _ in range(2 * 2)]
    policy_groups = sum(group["initial_lr"] == 1e-3 for group in trainer.optimizer.param_groups)
    critic_groups = len(trainer.optimizer.param_groups) - policy_groups
    assert policy_groups >= 1
    assert critic_groups >= 1
    for rates, share in zip(steps, shares, strict=True):
        assert rates == pytest.approx([1e-3 * share] * policy_groups + [4e-3 * share] * critic_groups)
    assert [entry["learning_rate"] for entry in toy.iteration_logs(trainer)] == pytest.approx(
        [1e-3, 7.5e-4, 5e-4, 2.5e-4]
    )


def test_every_trained_parameter_is_in_one_group_with_the_learning_rate_and_decay_that_it_should_have(
    tmp_path: Path,
) -> None:
    trainer = toy.ppo_trainer(tmp_path, learning_rate=1e-3, critic_learning_rate=4e-3, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    parameters = dict(trainer.model.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(parameters)
    for name, parameter in parameters.items():
        expected = (1e-3 if name.startswith("policy.") else 4e-3, 0.0 if "norm" in name else 0.1)
        assert settings[id(parameter)] == expected


@pytest.mark.parametrize(
    ("learning_rate", "critic_learning_rate", "moving"), [(0.0, 1e-2, "critic"), (1e-2, 1e-30, "policy")]
)
def test_policy_and_critic_move_by_their_own_learning_rates(
    tmp_path: Path, learning_rate: float, critic_learning_rate: float, moving: str
) -> None:
    trainer = toy.ppo_trainer(
        tmp_path, learning_rate=learning_rate, critic_learning_rate=critic_learning_rate
    )
    before = toy.weights(trainer.model)
    trainer.train()
    after = toy.weights(trainer.model)
    for name in before:
        assert torch.equal(before[name], after[name]) == (not name.startswith(moving)), name


def test_the_gradient_norm_is_clipped(tmp_path: Path) -> None:
    settings = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    trainer = toy.ppo_trainer(tmp_path, max_grad_norm=1e-4, **settings)
    before = toy.weights(trainer.model)
    trainer.train()
    # Eight steps, none longer than learning rate x max_grad_norm.
    assert 1e-5 < distance(before, toy.weights(trainer.model)) < 8.01e-4
    assert toy.iteration_logs(trainer)[0]["grad_norm"] > 1e-2


# What moves.


def test_every_trained_parameter_moves_and_no_frozen_one_though_the_critic_is_given_the_reward_model(
    tmp_path: Path,
) -> None:
    tok = toy.tokenizer()
    reward_model = toy.reward_model(tok)
    trainer = toy.ppo_trainer(
        tmp_path, reward_model, reward_processing_classes=tok, value_model=reward_model, tok=tok
    )
    before, reward_before = toy.weights(trainer.model), toy.weights(reward_model)
    reference_before = toy.weights(trainer.reference)
    torch.testing.assert_close(toy.weights(trainer.model.critic), reward_before, rtol=0, atol=0)
    trainer.train()
    for name, parameter in toy.weights(trainer.model).items():
        assert not torch.equal(parameter, before[name]), name
    torch.testing.assert_close(toy.weights(trainer.reference), reference_before, rtol=0, atol=0)
    torch.testing.assert_close(toy.weights(reward_model), reward_before, rtol=0, atol=0)


def test_critic_warm_up_leaves_the_policy_bit_for_bit(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.append(toy.weights(trainer.model))
        return toy.id_reward(completion_ids)

    trainer = toy.ppo_trainer(tmp_path, reward, critic_warmup_iterations=2, max_steps=3, weight_decay=0.1)
    trainer.train()
    start, first, second = seen
    for name in start:
        assert torch.equal(start[name], second[name]) == name.startswith("policy."), name
        assert torch.equal(start[name], first[name]) == name.startswith("policy."), name
        assert not torch.equal(second[name], trainer.model.get_parameter(name)), name
    assert [entry["kl/ref"] for entry in toy.iteration_logs(trainer)] == [0.0, 0.0, 0.0]


# KL.


def test_the_kl_is_zero_before_the_policy_has_moved_and_not_after(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path)
    trainer.train()
    first, second = toy.iteration_logs(trainer)
    assert first["kl/ref"] == 0.0
    assert second["kl/ref"] > 0.1


def test_the_logged_kl_is_that_of_the_rollout(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, learning_rate=0.0, temperature=0.7, max_steps=1)
    torch.manual_seed(3)
    for parameter in trainer.reference.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    trainer.train()
    rollout = trainer._last_rollout.rollout
    sums = []
    for prompt, completion in zip(rollout.prompt_ids, rollout.completion_ids, strict=True):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            policy, reference = (
                (model(ids).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)[
                    range(len(completion)), completion
                ]
                for model in (trainer.model.policy, trainer.reference)
            )
        sums.append(float((policy - reference).sum()))
    assert toy.iteration_logs(trainer)[0]["kl/ref"] == pytest.approx(sum(sums) / len(sums), rel=1e-4)
    assert abs(sum(sums)) > 0.1


def test_the_adaptive_coefficient_follows_the_logged_kl_and_is_logged(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, kl_coef=0.5, kl_target=0.3, kl_horizon=40, max_steps=5)
    trainer.train()
    logs = toy.iteration_logs(trainer)
    coefficient = 0.5
    for entry in logs:
        assert entry["kl_coef"] == pytest.approx(coefficient, rel=1e-6)
        error = min(max(entry["kl/ref"] / 0.3 - 1, -0.2), 0.2)
        coefficient *= 1 + error * 8 / 40
    # It went down while the KL was 0, and up when it was past the target.
    coefficients = [entry["kl_coef"] for entry in logs]
    assert coefficients[1] < coefficients[0]
    assert coefficients[-1] > min(coefficients)
    assert trainer.kl_controller.value == pytest.approx(coefficient, rel=1e-6)


def test_a_fixed_coefficient_stays(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, kl_coef=0.5)
    trainer.train()
    assert [entry["kl_coef"] for entry in toy.iteration_logs(trainer)] == [0.5, 0.5]


# The ratio before the first step.


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
def test_the_ratio_is_one_throughout_where_nothing_is_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch_size: int | None
) -> None:
    first: list[float] = []
    monkeypatch.setattr(trainer_module, "check_ratio", lambda greatest, *_: first.append(greatest))
    trainer = toy.ppo_trainer(
        tmp_path, learning_rate=0.0, temperature=0.7, micro_batch_size=micro_batch_size, max_steps=1
    )
    trainer.train()
    assert first[0] < 1e-4
    (entry,) = toy.iteration_logs(trainer)
    assert entry["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert entry["policy/approx_kl"] == pytest.approx(0.0, abs=1e-8)
    assert entry["policy/clip_fraction"] == 0.0


def test_processes_meet_after_their_judges_and_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the process group that has ddp_timeout, and not in one of DeepSpeed, which has another limit."""
    seen: list[str] = []

    def judge(completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.append("judge")
        return toy.id_reward(completion_ids)

    trainer = toy.ppo_trainer(tmp_path, judge, max_steps=1)
    score_tokens, reduce = trainer._score_tokens, trainer.accelerator.reduce
    monkeypatch.setattr(
        trainer.accelerator,
        "reduce",
        lambda *given, **named: (seen.append("meet"), reduce(*given, **named))[1],
    )
    monkeypatch.setattr(
        trainer, "_score_tokens", lambda inputs: (seen.append("forward"), score_tokens(inputs))[1]
    )
    trainer.train()
    # The first time is after sampling.
    assert seen[:4] == ["meet", "judge", "meet", "forward"]


def test_dropout_that_stays_on_ends_the_run_with_an_error_that_names_it(tmp_path: Path) -> None:
    model = toy.brief_policy(toy.tokenizer(), attention_dropout=0.3)
    trainer = toy.ppo_trainer(tmp_path, model=model, disable_dropout=False)
    before = toy.weights(trainer.model)
    with pytest.raises(SelfCheckError, match=r"attention_dropout 0\.3 .*set disable_dropout=True"):
        trainer.train()
    torch.testing.assert_close(toy.weights(trainer.model), before, rtol=0, atol=0)


def test_dropout_modules_that_stay_on_are_named_too(tmp_path: Path) -> None:
    from peft import LoraConfig

    trainer = toy.ppo_trainer(
        tmp_path,
        peft_config=LoraConfig(r=2, lora_dropout=0.4, init_lora_weights=False),
        disable_dropout=False,
    )
    with pytest.raises(SelfCheckError, match=r"0\.4 .*lora_dropout.*set disable_dropout=True"):
        trainer.train()


def test_dropout_is_off_by_default_wherever_a_model_keeps_it(tmp_path: Path) -> None:
    model = toy.brief_policy(toy.tokenizer(), attention_dropout=0.3)
    toy.ppo_trainer(tmp_path, model=model).train()


@pytest.mark.parametrize(("setting", "value"), [("repetition_penalty", 5.0), ("top_k", 3), ("top_p", 0.5)])
def test_sampling_that_scoring_does_not_know_of_ends_the_run_with_an_error_that_names_it(
    tmp_path: Path, setting: str, value: float
) -> None:
    trainer = toy.ppo_trainer(tmp_path)
    setattr(trainer.sampler.config, setting, value)
    with pytest.raises(
        SelfCheckError, match=rf"generate\(\) and scoring disagree.*generation_kwargs sets {setting}={value}"
    ):
        trainer.train()


def test_a_temperature_that_scoring_does_not_know_of_ends_the_run(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, temperature=0.7)
    trainer.model.temperature = 1.0
    with pytest.raises(SelfCheckError, match="disagree"):
        trainer.train()


def test_the_check_draws_nothing_from_the_random_numbers_of_training(tmp_path: Path) -> None:
    results = []
    for checked in (False, True):
        trainer = toy.ppo_trainer(tmp_path)
        trainer._checked = checked
        trainer.train()
        results.append(toy.weights(trainer.model))
    torch.testing.assert_close(*results, rtol=0, atol=0)


# What must not change an iteration.


def test_micro_batches_change_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformersSampler, "sample", toy.fixed_sample)
    results = {}
    for size in (None, 1, 2, 4):
        trainer = toy.ppo_trainer(
            tmp_path,
            optim="sgd",
            learning_rate=0.05,
            micro_batch_size=size,
            ent_coef=0.01,
            kl_target=0.3,
            normalize_rewards=True,
        )
        trainer.train()
        results[size] = (toy.weights(trainer.model), toy.iteration_logs(trainer))
    weights, logs = results.pop(None)
    assert logs[0]["completions/mean_length"] not in (1.0, 6.0)
    for other_weights, other_logs in results.values():
        torch.testing.assert_close(other_weights, weights, rtol=0, atol=1e-6)
        for entry, other in zip(logs, other_logs, strict=True):
            assert other == pytest.approx(entry, rel=1e-4, abs=1e-5)


def test_gradient_checkpointing_changes_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformersSampler, "sample", toy.fixed_sample)
    results = []
    for settings in ({}, {"gradient_checkpointing": True}):
        trainer = toy.ppo_trainer(tmp_path, optim="sgd", learning_rate=0.05, **settings)
        recomputed = count_layer_passes(trainer)
        trainer.train()
        results.append((toy.weights(trainer.model), toy.iteration_logs(trainer), recomputed[0]))
    (weights, logs, passes), (other_weights, other_logs, more_passes) = results
    # Two models of two layers, run once more in each of the two iterations' four backward passes.
    assert more_passes - passes == 2 * 2 * 2 * 4
    torch.testing.assert_close(other_weights, weights, rtol=0, atol=1e-6)
    for entry, other in zip(logs, other_logs, strict=True):
        assert other == pytest.approx(entry, rel=1e-4, abs=1e-5)


def count_layer_passes(trainer: PPOTrainer) -> list[int]:
    count = [0]

    def add(*_: Any) -> None:
        count[0] += 1

    for model in (trainer.model.policy.model, trainer.model.critic.model):
        for layer in model.layers:
            layer.self_attn.register_forward_hook(add)
    return count


def test_bf16_autocast_keeps_weights_values_and_log_probabilities_in_fp32(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, bf16=True, learning_rate=1e-3)
    trainer.train()
    assert trainer.accelerator.mixed_precision == "bf16"
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    inputs, mask = trainer._pack(trainer._last_rollout.rollout)
    for tensor in trainer._score_tokens(inputs):
        assert tensor.dtype == torch.float32
        # More than bf16's eight bits: the head and the log-softmax were computed in fp32.
        assert not torch.equal(tensor, tensor.bfloat16().float())
    # Below Accelerate's wrapper no autocast is on.
    with torch.no_grad():
        exact = completion_logprobs(trainer.model.policy, inputs, 1.0)[0]
    difference = (trainer._score_tokens(inputs)[0] - exact)[mask].abs().max()
    assert 1e-4 < difference < 0.5
