"""Settings and data that are refused, each with its message, before any compute is spent."""

import json
from pathlib import Path
from typing import Any

import pytest
import toy
from datasets import Dataset
from transformers import GenerationConfig

from tieback.cli.errors import UsageError
from tieback.pipeline.trainer import PPOConfig
from tieback.pipeline.trainer.config import HARMLESS_GENERATION_SETTINGS, SETTINGS_WITH_A_FIELD

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fp16": ({"fp16": True}, r"fp16 is not supported.*Use bf16"),
    "gradient accumulation": (
        {"gradient_accumulation_steps": 2},
        r"gradient_accumulation_steps=2.*set micro_batch_size",
    ),
    "temperature 0": ({"temperature": 0.0}, r"temperature must be above 0, got 0\.0: PPO needs samples"),
    "negative temperature": ({"temperature": -1.0}, r"temperature must be above 0, got -1\.0"),
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
    "a smaller last batch": ({"dataloader_drop_last": False}, r"dataloader_drop_last must stay True"),
    "estimator": ({"kl_estimator": "k4"}, r"kl_estimator must be k1, k2 or k3, got 'k4'"),
    "truncation": ({"truncation": "ignore"}, r"truncation must be 'penalty' or 'bootstrap', got 'ignore'"),
    "completion length": ({"max_completion_length": 0}, r"max_completion_length must be at least 1, got 0"),
    "kl_coef": ({"kl_coef": -0.1}, r"kl_coef must not be negative, got -0\.1"),
    "penalty": ({"missing_eos_penalty": -1.0}, r"missing_eos_penalty must not be negative, got -1\.0"),
    "warm-up of a critic that does not learn": (
        {"critic_warmup_iterations": 2, "vf_coef": 0.0},
        r"critic_warmup_iterations=2 trains the critic alone, but vf_coef is 0",
    ),
    "warm-up": ({"critic_warmup_iterations": -1}, r"critic_warmup_iterations must not be negative, got -1"),
    "micro_batch_size 0": ({"micro_batch_size": 0}, r"micro_batch_size must be above 0, got 0"),
    "generation_batch_size 0": (
        {"generation_batch_size": 0},
        r"generation_batch_size must be above 0, got 0",
    ),
    "kl_target": ({"kl_target": 0.0}, r"kl_target must be above 0, got 0\.0"),
    "kl_horizon": ({"kl_horizon": 0}, r"kl_horizon must be above 0, got 0"),
    "reward_clip": ({"reward_clip": -2.0}, r"reward_clip must be above 0, got -2\.0"),
    "critic_learning_rate": (
        {"critic_learning_rate": 0.0},
        r"critic_learning_rate must be above 0, got 0\.0",
    ),
    "clip_range": ({"clip_range": 0.0}, r"clip_range must be greater than 0"),
    "gamma": ({"gamma": 1.5}, r"gamma must be between 0 and 1"),
    "epochs": ({"num_ppo_epochs": 0}, r"num_ppo_epochs must be a whole number of at least 1"),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_a_setting_that_cannot_be_honoured_is_refused(tmp_path: Path, setting: str) -> None:
    settings, message = REFUSED[setting]
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


# Data.


def conversations(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


BAD_DATA: dict[str, tuple[dict[str, list[Any]], str]] = {
    "no prompt column": (
        {"question": ["red"] * 8},
        r"train_dataset has no `prompt` column; its columns are \['question'\]",
    ),
    "empty": ({"prompt": []}, r"train_dataset is empty"),
    "a name of the trainer's": (
        {"prompt": ["red"] * 8, "completions": ["blue"] * 8},
        r"train_dataset has a column `completions`, but reward functions receive prompts, completions, completion_ids",
    ),
    "an empty prompt": (
        {"prompt": ["red"] * 5 + ["", "blue", "up"]},
        r"train_dataset, row 6: the prompt is empty",
    ),
    "a blank prompt": (
        {"prompt": ["red", " \n ", *["up"] * 6]},
        r"train_dataset, row 2: the prompt is empty",
    ),
    "no prompt": ({"prompt": ["red", None, *["up"] * 6]}, r"train_dataset, row 2: the prompt is empty"),
    "an empty message": (
        {"prompt": conversations("red", "blue", "", *["up"] * 5)},
        r"train_dataset, row 3: the prompt is empty",
    ),
    "an empty conversation": (
        {"prompt": [*conversations("red"), [], *conversations(*["up"] * 6)]},
        r"train_dataset, row 2: the prompt is empty",
    ),
    "a prompt longer than the context": (
        {"prompt": ["red"] * 3 + ["red cat " * 40] + ["up"] * 4},
        r"train_dataset, row 4: the prompt's \d+ tokens and max_completion_length=6 exceed the model's context of 64",
    ),
}


@pytest.mark.parametrize("fault", BAD_DATA)
def test_data_that_cannot_be_used_is_refused_by_row_before_anything_is_made(
    tmp_path: Path, fault: str
) -> None:
    columns, message = BAD_DATA[fault]
    with pytest.raises(ValueError, match=message):
        toy.ppo_trainer(tmp_path, train_dataset=Dataset.from_dict(columns))


def test_evaluation_data_are_checked_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval_dataset, row 2: the prompt is empty"):
        toy.ppo_trainer(tmp_path, eval_dataset=Dataset.from_dict({"prompt": ["red", ""]}))


def test_a_prompt_that_just_fits_is_taken(tmp_path: Path) -> None:
    tok = toy.tokenizer()
    words = "a" * 58
    assert len(tok.encode(words)) == 58
    toy.ppo_trainer(tmp_path, train_dataset=Dataset.from_dict({"prompt": [words] * 8})).train()
    with pytest.raises(ValueError, match="the prompt's 59 tokens"):
        toy.ppo_trainer(tmp_path, train_dataset=Dataset.from_dict({"prompt": [words + "a"] * 8}))


def test_fewer_prompts_than_one_iteration_takes_are_refused_with_the_numbers(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, train_dataset=toy.prompts(7))
    with pytest.raises(
        ValueError,
        match=r"has 7 prompts, but one iteration takes 8 \(per_device_train_batch_size=8 x 1 processes\)",
    ):
        trainer.train()


def test_several_gpus_without_a_launcher_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PPOConfig, "n_gpu", 2)
    with pytest.raises(UsageError, match=r"sees 2 GPUs.*accelerate launch"):
        toy.ppo_trainer(tmp_path)
