"""Settings that are refused, each with its message, before any compute is spent."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import toy
from transformers import GenerationConfig, integrations

from tieback.pipeline.trainer import PPOConfig
from tieback.pipeline.trainer.config import HARMLESS_GENERATION_SETTINGS, SETTINGS_WITH_A_FIELD

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fp16": ({"fp16": True}, r"fp16=True is not supported.*Use bf16"),
    "gradient accumulation": (
        {"gradient_accumulation_steps": 2},
        r"gradient_accumulation_steps=2.*set micro_batch_size",
    ),
    "temperature 0": (
        {"temperature": 0.0},
        r"temperature must be above 0 and finite, got 0\.0: PPO needs samples",
    ),
    "negative temperature": ({"temperature": -1.0}, r"temperature must be above 0 and finite, got -1\.0"),
    "minibatches": (
        {"per_device_train_batch_size": 10, "num_minibatches": 3},
        r"10 completions an iteration \(per_device_train_batch_size=10 x 1 processes\) do not divide into "
        r"num_minibatches=3",
    ),
    "micro-batches": (
        {"per_device_train_batch_size": 12, "num_minibatches": 2, "micro_batch_size": 4},
        r"A minibatch of 6 completions \(per_device_train_batch_size=12 .* num_minibatches=2\) does not divide into "
        r"micro_batch_size=4",
    ),
    "generation batches": (
        {"per_device_train_batch_size": 12, "generation_batch_size": 5},
        r"per_device_train_batch_size=12 does not divide into generation_batch_size=5",
    ),
    "a smaller last batch": (
        {"dataloader_drop_last": False},
        r"dataloader_drop_last=False is not supported: every",
    ),
    "estimator": ({"kl_estimator": "k4"}, r"kl_estimator must be k1, k2 or k3, got 'k4'"),
    "truncation": (
        {"truncation": "ignore"},
        r"truncation must be 'penalty', 'bootstrap' or 'mask', got 'ignore'",
    ),
    "extra_critic_epochs": (
        {"extra_critic_epochs": 1, "vf_coef": 0.0},
        r"extra_critic_epochs trains the critic alone, but vf_coef is 0",
    ),
    "critic_warmup_patience": (
        {"critic_warmup_patience": 2},
        r"critic_warmup_patience ends a warm-up sooner, but critic_warmup_iterations is 0",
    ),
    "critic_gae_lambda": ({"critic_gae_lambda": 1.5}, r"critic_gae_lambda must be between 0 and 1, got 1.5"),
    "gae_lambda_alpha": ({"gae_lambda_alpha": 0.0}, r"gae_lambda_alpha must be above 0 and finite, got 0.0"),
    "importance_sampling": (
        {"importance_sampling": "row"},
        r"importance_sampling must be token, sequence or not set, got 'row'",
    ),
    "importance_sampling_cap": (
        {"importance_sampling_cap": -1.0},
        r"importance_sampling_cap must be above 0",
    ),
    "kl_target without kl_coef": (
        {"kl_target": 3.0, "kl_coef": 0.0},
        r"kl_target steers kl_coef, which is 0",
    ),
    "overlong without penalty": (
        {"overlong_buffer_length": 4, "truncation": "mask"},
        r"which truncation=mask does not charge",
    ),
    "overlong beyond the limit": (
        {"overlong_buffer_length": 40, "max_completion_length": 20},
        r"overlong_buffer_length=40 is more than max_completion_length=20",
    ),
    "completion length": ({"max_completion_length": 0}, r"max_completion_length must be at least 1, got 0"),
    "kl_coef": ({"kl_coef": -0.1}, r"kl_coef must be a finite number of at least 0, got -0\.1"),
    "penalty": (
        {"missing_eos_penalty": -1.0},
        r"missing_eos_penalty must be a finite number of at least 0, got -1\.0",
    ),
    "warm-up of a critic that does not learn": (
        {"critic_warmup_iterations": 2, "vf_coef": 0.0},
        r"critic_warmup_iterations=2 trains the critic alone, but vf_coef is 0",
    ),
    "warm-up": (
        {"critic_warmup_iterations": -1},
        r"critic_warmup_iterations must be a finite number of at least 0, got -1",
    ),
    "micro_batch_size 0": ({"micro_batch_size": 0}, r"micro_batch_size must be above 0 and finite, got 0"),
    "generation_batch_size 0": (
        {"generation_batch_size": 0},
        r"generation_batch_size must be above 0 and finite, got 0",
    ),
    "kl_target": ({"kl_target": 0.0}, r"kl_target must be above 0 and finite, got 0\.0"),
    "kl_horizon": ({"kl_horizon": 0}, r"kl_horizon must be above 0 and finite, got 0"),
    "reward_clip": ({"reward_clip": -2.0}, r"reward_clip must be above 0 and finite, got -2\.0"),
    "critic_learning_rate": (
        {"critic_learning_rate": 0.0},
        r"critic_learning_rate must be above 0 and finite, got 0\.0",
    ),
    "clip_range": ({"clip_range": 0.0}, r"clip_range must be greater than 0"),
    "gamma": ({"gamma": 1.5}, r"gamma must be between 0 and 1"),
    "epochs": ({"num_ppo_epochs": 0}, r"num_ppo_epochs must be a whole number of at least 1"),
    # What is no number, or none that can be computed with.
    "text for a number": ({"learning_rate": "1e-3"}, r"learning_rate must be a number, but is '1e-3'"),
    "a part of an iteration": (
        {"critic_warmup_iterations": 0.5},
        r"critic_warmup_iterations must be a whole number, but is 0\.5",
    ),
    "half a token": (
        {"max_completion_length": 6.5},
        r"max_completion_length must be a whole number, but is 6\.5",
    ),
    "text for a truth value": ({"bf16": "yes"}, r"bf16 must be true or false, but is 'yes'"),
    "a truth value for a number": ({"kl_coef": True}, r"kl_coef must be a number, but is True"),
    "NaN": ({"missing_eos_penalty": math.nan}, r"missing_eos_penalty must be a number, but is nan"),
    "infinite kl_coef": ({"kl_coef": math.inf}, r"kl_coef must be a finite number of at least 0, got inf"),
    "no batch": (
        {"per_device_train_batch_size": 0},
        r"per_device_train_batch_size must be above 0 and finite, got 0",
    ),
    "no evaluation batch": (
        {"per_device_eval_batch_size": -4},
        r"per_device_eval_batch_size must be above 0 and finite, got -4",
    ),
    "a weight that is NaN": (
        {"reward_weights": [1.0, math.nan]},
        r"reward_weights must be a list of finite numbers, got \[1\.0, nan\]",
    ),
    "one weight for a list": (
        {"reward_weights": 1.0},
        r"reward_weights must be a list of finite numbers, got 1\.0",
    ),
    "generation_kwargs that are no JSON": (
        {"generation_kwargs": "{use_cache"},
        r"generation_kwargs is not valid JSON: Expecting",
    ),
    "generation_kwargs that are a list": (
        {"generation_kwargs": ["use_cache"]},
        r"generation_kwargs must be a mapping of names to values, got \['use_cache'\]",
    ),
    "a schedule's arguments that are no JSON": (
        {"lr_scheduler_kwargs": "{min_lr"},
        r"lr_scheduler_kwargs is not valid JSON: Expecting",
    ),
    "a schedule without what it needs": (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        r"lr_scheduler_kwargs of lr_scheduler_type=cosine_with_min_lr: One of min_lr",
    ),
    "a cache that there is not": (
        {"generation_kwargs": {"cache_implementation": "nonsense"}},
        r"generation_kwargs: Invalid `cache_implementation` \(nonsense\)",
    ),
    "a tracker that is not installed": (
        {"report_to": "clearml"},
        r"report_to: clearml is not installed",
    ),
    "an optimiser that is not installed": (
        {"optim": "adamw_bnb_8bit"},
        r"optim=adamw_bnb_8bit: You need to install",
    ),
    # What Trainer has, and PPO cannot honour.
    "auto_find_batch_size": ({"auto_find_batch_size": True}, r"auto_find_batch_size=True .*micro_batch_size"),
    "neftune": ({"neftune_noise_alpha": 5.0}, r"neftune_noise_alpha=5\.0 .*ratio is not 1"),
    "label smoothing": ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor=0\.1 .*no labels"),
    "liger": ({"use_liger_kernel": True}, r"use_liger_kernel=True .*Apply the kernels to the model"),
    "grouping by length": (
        {"train_sampling_strategy": "group_by_length"},
        r"train_sampling_strategy=group_by_length .*Choose random or sequential",
    ),
    "evaluation in bf16": ({"bf16_full_eval": True}, r"bf16_full_eval=True .*Set bf16=True"),
    "columns": ({"remove_unused_columns": True}, r"remove_unused_columns=True .*read the columns"),
    "an optimiser that steps in the backward pass": ({"optim": "lomo"}, r"optim=lomo .*adamw_torch"),
    "an optimiser that steps layer by layer": (
        {"optim": "galore_adamw_layerwise"},
        r"optim=galore_adamw_layerwise .*adamw_torch",
    ),
    "an optimiser with a mode": (
        {"optim": "schedule_free_adamw"},
        r"optim=schedule_free_adamw .*adamw_torch",
    ),
    "split batches": (
        {"accelerator_config": {"split_batches": True}},
        r"accelerator_config: split_batches and dispatch_batches are not supported",
    ),
    "dispatched batches": (
        {"accelerator_config": {"dispatch_batches": True}},
        r"accelerator_config: split_batches and dispatch_batches are not supported",
    ),
    "gradient accumulation by another way": (
        {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}},
        r"accelerator_config: num_steps is not supported.*set micro_batch_size",
    ),
    "sharding without a launcher": (
        {"fsdp": "full_shard"},
        r"fsdp needs a launcher.*accelerate launch --config_file accelerate_configs/fsdp2\.yaml",
    ),
    "DeepSpeed without a launcher": (
        {"deepspeed": {"zero_optimization": {"stage": 2}}},
        r"deepspeed needs a launcher.*accelerate_configs/zero2\.yaml",
    ),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_a_setting_that_cannot_be_honoured_is_refused(
    tmp_path: Path, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, message = REFUSED[setting]
    # Whatever is installed here.
    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    defaults = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    with pytest.raises(ValueError, match=message):
        PPOConfig(**(defaults | settings))


@pytest.mark.parametrize(
    "name",
    [
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "do_sample",
        "num_beams",
        "no_repeat_ngram_size",
        "min_new_tokens",
        "bad_words_ids",
        "suppress_tokens",
        "guidance_scale",
        "num_return_sequences",
        "return_dict_in_generate",
        "nonsense",
    ],
)
def test_generation_settings_that_scoring_would_not_know_of_are_refused_with_the_reason(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` is refused.*ratio would not be 1 before the first step"):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, generation_kwargs={name: 2})


@pytest.mark.parametrize(("name", "field"), SETTINGS_WITH_A_FIELD.items())
def test_what_has_a_setting_of_its_own_is_not_taken_from_generation_kwargs(
    tmp_path: Path, name: str, field: str
) -> None:
    with pytest.raises(ValueError, match=f"set `{field}` instead of `{name}`"):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, generation_kwargs={name: 2})


def test_the_settings_that_are_taken_exist_in_transformers() -> None:
    assert set(HARMLESS_GENERATION_SETTINGS) <= set(GenerationConfig().to_dict())


def test_generation_kwargs_may_be_json_and_reach_generate(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, generation_kwargs=json.dumps({"use_cache": False}))
    assert trainer.sampler.config.use_cache is False
    with pytest.raises(ValueError, match="`top_k` is refused"):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, generation_kwargs='{"top_k": 5}')


def test_a_number_that_may_be_left_out_may_be_set_to_none() -> None:
    config = PPOConfig(use_cpu=True, report_to="none", value_clip_range=None, max_prompt_length=None)
    assert config.value_clip_range is None
