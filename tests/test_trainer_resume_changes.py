"""Resuming with something changed: refused by name before any compute, or free, or named and then real."""

import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainingArguments

from tieback.cli.errors import UsageError
from tieback.pipeline.resume import FIXED, FREE
from tieback.pipeline.trainer import PPOConfig, PPOTrainer
from tieback.pipeline.trainer.run_identity import input_digests, seed_of_process

BEFORE: dict[str, Any] = {
    **{"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "weight_decay": 0.01},
    **{"max_prompt_length": 45, "critic_warmup_iterations": 1},
    **{"ptx_dataset": toy.demonstrations(), "ptx_coef": 0.1, "positive_nll_coef": 0.1, "positive_score": 0.5},
    **{"ref_model_sync_steps": 2, "num_generations": 2, "value_clip_range": None},
}

# Another value for each setting that what is learnt depends on.
MATTERS: dict[str, Any] = {
    "learning_rate": 2e-2,
    "critic_learning_rate": 5e-3,
    "critic": "shared",
    "critic_warmup_iterations": 3,
    "critic_warmup_patience": 2,
    "extra_critic_epochs": 1,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"last_epoch": -1},
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 0.5,
    "seed": 1,
    "data_seed": 1,
    "sampler": "vllm",
    "temperature": 0.7,
    "max_completion_length": 5,
    "max_prompt_length": 40,
    "stop_tokens": ["<|end|>"],
    "chat_template_kwargs": {"enable_thinking": False},
    "clip_range": 0.1,
    "clip_range_high": 0.3,
    "dual_clip": 3.0,
    "value_clip_range": 0.1,
    "huber_delta": 0.5,
    "value_bins": 41,
    "value_range": 5.0,
    "vf_coef": 0.2,
    "ent_coef": 0.01,
    "gamma": 0.9,
    "gae_lambda": 0.9,
    "critic_gae_lambda": 1.0,
    "gae_lambda_alpha": 0.5,
    "importance_sampling": "token",
    "normalize_each_reward": True,
    "ptx_coef": 0.2,
    "ptx_batch_size": 3,
    "ptx_max_length": 20,
    "positive_nll_coef": 0.2,
    "positive_score": 0.6,
    "importance_sampling_cap": 3.0,
    "num_ppo_epochs": 1,
    "num_minibatches": 1,
    "target_kl": 0.1,
    "whiten_advantages": False,
    "generation_batch_size": 4,
    "generation_kwargs": {"use_cache": True},
    "kl_coef": 0.1,
    "kl_estimator": "k3",
    "kl_loss_coef": 0.1,
    "kl_loss_estimator": "k1",
    "kl_target": 0.3,
    "kl_horizon": 100,
    "ref_model_sync_steps": 3,
    "ref_model_mixup_alpha": 0.5,
    "missing_eos_penalty": 0.5,
    "num_generations": 4,
    "dynamic_sampling_batches": 3,
    "truncation": "bootstrap",
    "overlong_buffer_length": 2,
    "reward_weights": [2.0],
    "reward_clip": 1.0,
    "normalize_rewards": True,
    "disable_dropout": False,
    "ignore_data_skip": True,
    "optim": "sgd",
}
# Of Trainer, and either refused by PPOConfig, without effect in PPOTrainer, or the same question as another.
OF_TRAINER = {
    *("optim_args", "optim_target_modules", "average_tokens_across_devices", "label_smoothing_factor"),
    *("tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel"),
    *("liger_kernel_config", "use_cache", "neftune_noise_alpha", "auto_find_batch_size"),
    *("full_determinism", "accelerator_config", "dataloader_drop_last", "remove_unused_columns"),
    *("label_names", "train_sampling_strategy", "length_column_name"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which two of four iterations are kept, against a function, and one of a reward model as critic."""
    folder = tmp_path_factory.mktemp("home")
    toy.ppo_trainer(folder / "function", **BEFORE).train()
    with_models(folder / "models").train()
    for run in ("function", "models"):
        for step in (1, 3, 4):
            shutil.rmtree(folder / run / f"checkpoint-{step}")
    return folder


def resume(trainer: PPOTrainer, home: Path, run: str = "function") -> None:
    """Resume on a checkpoint that stands in another folder than the one that is written to."""
    trainer.train(resume_from_checkpoint=str(home / run / "checkpoint-2"))


def without_compute(trainer: PPOTrainer) -> PPOTrainer:
    """A trainer that fails the test as soon as a model computes or weights are loaded."""

    def computed(*_: Any, **__: Any) -> None:
        raise AssertionError("computed")

    trainer.model.register_forward_pre_hook(computed)
    trainer.generate = trainer._load_from_checkpoint = computed  # type: ignore[assignment]
    return trainer


# Settings.


def test_every_setting_is_one_that_matters_or_is_free() -> None:
    """A new version of Transformers may bring settings: say of each what it is."""
    names = {field.name for field in fields(PPOConfig)}
    mattering = MATTERS.keys() | OF_TRAINER | {"per_token_reward_model"}
    assert names <= FREE | mattering
    assert mattering <= names
    assert not FREE & mattering


def test_no_setting_is_written_as_a_secret() -> None:
    """Transformers writes fields whose name ends in `_token` as their name in capitals, so that no change of them would show."""
    own = {field.name for field in fields(PPOConfig)} - {field.name for field in fields(TrainingArguments)}
    assert not [name for name in own if name.endswith("_token")]


def test_scores_by_token_are_another_run(home: Path, tmp_path: Path) -> None:
    trainer = without_compute(with_models(tmp_path, per_token_reward_model=True))
    with pytest.raises(UsageError, match=r"\Wper_token_reward_model was .+, is .+\."):
        resume(trainer, home, "models")


@pytest.mark.parametrize("setting", MATTERS)
def test_a_changed_setting_is_refused_by_name_before_anything_is_computed(
    home: Path, tmp_path: Path, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        sys.modules, "vllm", SimpleNamespace(LLM=None, SamplingParams=None)
    )  # no engine is made
    trainer = without_compute(toy.ppo_trainer(tmp_path, **(BEFORE | {setting: MATTERS[setting]})))
    with pytest.raises(UsageError, match=rf"\W{setting} was .+, is .+\)?\.") as refused:
        resume(trainer, home)
    # No other one is accused.
    assert str(refused.value).count(" was ") == 2 - (setting in FIXED)


def test_a_batch_of_another_size_is_refused(home: Path, tmp_path: Path) -> None:
    trainer = without_compute(toy.ppo_trainer(tmp_path, **BEFORE, per_device_train_batch_size=4))
    with pytest.raises(UsageError, match=r"\(global_batch_size was 8, is 4\)"):
        resume(trainer, home)


@pytest.mark.slow
def test_intervals_and_memory_are_free_and_take_effect(home: Path, tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(
        tmp_path,
        **(BEFORE | {"save_steps": 2, "logging_steps": 2, "max_steps": 7}),
        micro_batch_size=2,
        gradient_checkpointing=True,
        per_device_eval_batch_size=2,
        eval_dataset=toy.prompts(3),
        eval_strategy="steps",
        eval_steps=3,
        save_total_limit=5,
    )
    resume(trainer, home)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in (4, 6, 7)
    ]
    log = [entry for entry in trainer.state.log_history if entry["step"] > 2]
    assert [entry["step"] for entry in log if "policy/loss" in entry] == [4, 6]
    assert [entry["step"] for entry in log if "eval_reward/mean" in entry] == [3, 6, 7]


def new_logs(trainer: PPOTrainer) -> list[dict[str, float]]:
    return [entry for entry in toy.iteration_logs(trainer) if entry["step"] > 2]


def test_more_iterations_stretch_the_schedule_from_the_first_new_one(home: Path, tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, **(BEFORE | {"max_steps": 8}))
    resume(trainer, home)
    assert [entry["learning_rate"] for entry in new_logs(trainer)] == pytest.approx(
        [1e-2 * (8 - step) / 8 for step in range(2, 8)]
    )


def test_named_learning_rates_decay_and_betas_are_those_of_the_rest_of_the_run(
    home: Path, tmp_path: Path
) -> None:
    changes = {
        "learning_rate": 3e-3,
        "critic_learning_rate": 5e-3,
        "weight_decay": 0.2,
        "adam_beta1": 0.8,
        "adam_epsilon": 1e-7,
    }
    trainer = toy.ppo_trainer(tmp_path, **(BEFORE | changes), resume_with_changes=list(changes))
    seen = []
    own_step = trainer.training_step

    def training_step(*args: Any) -> torch.Tensor:
        seen.append([dict(group, params=None) for group in trainer.optimizer.param_groups])
        return own_step(*args)

    trainer.training_step = training_step  # type: ignore[method-assign]
    resume(trainer, home)
    assert [entry["learning_rate"] for entry in new_logs(trainer)] == pytest.approx([1.5e-3, 0.75e-3])
    assert len(seen) == 2
    rates = [group["lr"] for group in seen[0]]
    assert rates == pytest.approx([1.5e-3, 1.5e-3, 2.5e-3, 2.5e-3])
    for groups in seen:
        assert [group["weight_decay"] for group in groups] == [0.2, 0.0, 0.2, 0.0]
        assert {(group["betas"], group["eps"]) for group in groups} == {((0.8, 0.999), 1e-7)}
    # The next checkpoint is one of the changed run: nothing needs to be named again.
    again = toy.ppo_trainer(tmp_path, **(BEFORE | changes | {"max_steps": 5}))
    again.train(resume_from_checkpoint=True)
    assert new_logs(again)[-1]["learning_rate"] == pytest.approx(3e-3 / 5)


def test_a_fixed_coefficient_comes_from_the_arguments(home: Path, tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, **BEFORE, kl_coef=0.3, resume_with_changes=["kl_coef"])
    resume(trainer, home)
    assert [entry["kl_coef"] for entry in new_logs(trainer)] == [0.3, 0.3]


@pytest.mark.slow
def test_an_adaptive_coefficient_comes_from_the_checkpoint_unless_it_is_named(tmp_path: Path) -> None:
    adaptive = {**BEFORE, "kl_target": 0.4, "kl_horizon": 40}
    toy.ppo_trainer(tmp_path, **adaptive).train()
    state = json.loads((tmp_path / "checkpoint-2" / "ppo_state.json").read_text())
    assert state["kl"]["value"] != 0.05
    for options, first in (
        ({"kl_target": 0.5, "resume_with_changes": ["kl_target"]}, state["kl"]["value"]),
        ({"kl_coef": 0.3, "resume_with_changes": ["kl_coef"]}, 0.3),
        # No longer adaptive, and so a setting.
        ({"kl_target": None, "resume_with_changes": ["kl_target"]}, 0.05),
    ):
        trainer = toy.ppo_trainer(tmp_path / "resumed", **(adaptive | options))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert new_logs(trainer)[0]["kl_coef"] == pytest.approx(first)
        assert (trainer.kl_controller.value != first) == (trainer.args.kl_target is not None)


@pytest.mark.slow
def test_a_named_seed_samples_anew(home: Path, tmp_path: Path) -> None:
    ends = []
    for seed in (0, 1, 1):
        trainer = toy.ppo_trainer(
            tmp_path, **BEFORE, seed=seed, data_seed=0, resume_with_changes=["seed", "data_seed"]
        )
        resume(trainer, home)
        ends.append(toy.weights(trainer.model))
        assert torch.initial_seed() == (seed_of_process(1, 2, 0) if seed else 0)
    torch.testing.assert_close(ends[1], ends[2], rtol=0, atol=0)
    assert not torch.equal(ends[0]["critic.score.weight"], ends[1]["critic.score.weight"])


# Inputs.


def with_models(folder: Path, change: str | None = None, **options: Any) -> PPOTrainer:
    """A run with a reward model, another model as critic, a function and an adapter; and what differs in it."""
    tok = toy.tokenizer()
    model, critic, judge = toy.brief_policy(tok), toy.reward_model(tok, 2), toy.reward_model(tok)
    judge_tok, dataset, alpha, reward = toy.tokenizer(), toy.prompts(), 8, toy.id_reward
    moved = {"model": model, "value_model": critic, "reward model": judge}
    if change in moved:
        with torch.no_grad():
            list(moved[change].parameters())[3].flatten()[-1] += 1e-3
    elif change == "a prompt":
        rows = dataset.to_list()
        rows[-1]["prompt"][0]["content"] += "?"
        dataset = Dataset.from_list(rows)
    elif change == "another column":
        dataset = Dataset.from_list([*dataset.to_list()[:-1], {**dataset[-1], "target": "blue"}])
    elif change == "the order of prompts":
        dataset = dataset.select([1, 0, *range(2, len(dataset))])
    elif change == "tokenizer":
        tok.chat_template = tok.chat_template.replace("'system', ", "")
    elif change == "reward tokenizer":
        judge_tok.chat_template = judge_tok.chat_template.replace("'system', ", "")
    elif change == "adapter":
        alpha = 16
    elif change == "function":

        def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
            return toy.id_reward(completion_ids)

    return toy.ppo_trainer(
        folder,
        [reward, judge],
        model=model,
        tok=tok,
        train_dataset=dataset,
        value_model=critic,
        reward_processing_classes=[None, judge_tok],
        peft_config=LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "v_proj"]),
        **(BEFORE | options),
    )


INPUTS = {
    "model": "model",
    "value_model": "value_model",
    "reward model": "reward_funcs",
    "function": "reward_funcs",
    "reward tokenizer": "reward_funcs",
    "a prompt": "train_dataset",
    "another column": "train_dataset",
    "the order of prompts": "train_dataset",
    "tokenizer": "processing_class",
    "adapter": "peft_config",
}


@pytest.mark.parametrize("change", INPUTS)
def test_a_changed_input_is_refused_by_name_unless_it_is_named(
    home: Path, tmp_path: Path, change: str
) -> None:
    argument = INPUTS[change]
    with pytest.raises(UsageError, match=rf"other settings \({argument} was .+, is .+\)") as refused:
        resume(without_compute(with_models(tmp_path, change)), home, "models")
    assert str(refused.value).count(" was ") == 2
    trainer = with_models(tmp_path, change, resume_with_changes=[argument])
    resume(trainer, home, "models")
    assert trainer.state.global_step == 4


def test_the_same_inputs_from_another_place_and_a_new_random_head_of_the_critic_are_accepted(
    home: Path, tmp_path: Path
) -> None:
    trainer = with_models(tmp_path)
    critic = trainer.model.critic
    with torch.no_grad():
        critic.score.weight += 1.0
    tok = toy.tokenizer()
    for name, model in (("sft", toy.brief_policy(tok)), ("judge", toy.reward_model(tok))):
        model.save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
    rows = tmp_path / "rows.jsonl"
    toy.prompts().to_json(rows)
    resumed = toy.ppo_trainer(
        tmp_path / "run",
        [toy.id_reward, str(tmp_path / "judge")],
        model=str(tmp_path / "sft"),
        train_dataset=Dataset.from_json(str(rows), cache_dir=str(tmp_path / "cache")),
        value_model=critic,
        peft_config=LoraConfig(r=2, lora_alpha=8, target_modules=["v_proj", "q_proj"]),
        **BEFORE,
    )
    resume(resumed, home, "models")
    assert resumed.state.global_step == 4


def test_the_order_in_which_an_adapter_names_its_modules_does_not_matter() -> None:
    tok = toy.tokenizer()
    adapter = LoraConfig(target_modules=["v_proj", "q_proj", "o_proj"])
    digests = input_digests(toy.policy(tok), None, [toy.id_reward], tok, None, adapter)
    assert digests["peft_config"]["target_modules"] == ["o_proj", "q_proj", "v_proj"]


def test_a_checkpoint_of_an_earlier_version_is_taken_with_a_word(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(home / "function" / "checkpoint-2", checkpoint)
    state = json.loads((checkpoint / "ppo_state.json").read_text())
    del state["identity"]
    (checkpoint / "ppo_state.json").write_text(json.dumps(state))
    trainer = toy.ppo_trainer(tmp_path, **(BEFORE | {"learning_rate": 5e-3}))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert "checkpoint-2: an earlier version wrote it without its settings" in capsys.readouterr().err


def test_what_changed_is_said_in_one_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = toy.ppo_trainer(
        tmp_path, **BEFORE, kl_coef=0.3, resume_with_changes=["kl_coef", "learning_rate"]
    )
    resume(trainer, home)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "checkpoint-2" in line)
    assert line.endswith("checkpoint-2: from here on with another kl_coef.")
