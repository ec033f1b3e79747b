"""Settings and data that are refused, each with its message, before any compute is spent."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PromptTuningConfig
from transformers import GenerationConfig, LlamaForCausalLM, TrainingArguments

from tieback.cli.errors import UsageError
from tieback.data.tokenizer import train_tokenizer
from tieback.pipeline.model_loading import load_policy
from tieback.pipeline.trainer import PPOConfig, PPOTrainer, setting_checks
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
    "truncation": ({"truncation": "ignore"}, r"truncation must be 'penalty' or 'bootstrap', got 'ignore'"),
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
        r"per_device_train_batch_size must be above 0, got 0",
    ),
    "no evaluation batch": (
        {"per_device_eval_batch_size": -4},
        r"per_device_eval_batch_size must be above 0, got -4",
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
    monkeypatch.setattr(setting_checks, "get_available_reporting_integrations", lambda: ["tensorboard"])
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
    "numbers": (
        {"prompt": [1] * 8},
        r"train_dataset, row 1: the prompt is 1\. Write a text, or a list of messages",
    ),
    "lists of texts": (
        {"prompt": [["red", "cat"]] * 8},
        r"train_dataset, row 1: the prompt is \['red', 'cat'\]\. Write a text, or a list of messages",
    ),
    "a message in the place of a conversation": (
        {"prompt": [{"role": "user", "content": "red"}] * 8},
        r"train_dataset, row 1: the prompt is \{'role': 'user', 'content': 'red'\}\. Write a text",
    ),
    "messages without a role": (
        {"prompt": [[{"content": "red"}]] * 8},
        r"train_dataset, row 1: the prompt is \[\{'content': 'red'\}\]\. Write a text, or a list of messages",
    ),
    "content in parts": (
        {"prompt": [[{"role": "user", "content": [{"type": "text", "text": "red"}]}]] * 8},
        r"train_dataset, row 1: the prompt is .*\. Write a text, or a list of messages",
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


@pytest.mark.parametrize("rows", [list, tuple])
def test_rows_are_taken_for_a_data_set(tmp_path: Path, rows: Any) -> None:
    weights = []
    for dataset in (toy.prompts(), rows(toy.prompts())):
        trainer = toy.ppo_trainer(tmp_path, train_dataset=dataset)
        trainer.train()
        weights.append(toy.weights(trainer.model))
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["numpy", "pandas", "torch"])
def test_rows_are_plain_values_whatever_the_format_of_the_data_set(tmp_path: Path, form: str) -> None:
    trainer = toy.ppo_trainer(tmp_path, train_dataset=toy.prompts().with_format(form))
    trainer.train()
    assert all(isinstance(completion, list) for completion in trainer._last_rollout.rollout.completions)


NO_DATA_SETS: dict[str, tuple[Any, str]] = {
    "a stream": (
        toy.prompts().to_iterable_dataset(),
        r"train_dataset is of type IterableDataset.*read first: Dataset\.from_generator",
    ),
    "a generator": (({"prompt": "red"} for _ in range(8)), r"train_dataset is of type generator"),
    "a name": ("helpdesk", r"train_dataset is of type str\. Give a datasets\.Dataset or a list of rows"),
    "texts": (["red"] * 8, r"train_dataset is of type list\. Give a datasets\.Dataset or a list of rows"),
    "no rows": ([], r"train_dataset is empty"),
    "splits": (
        DatasetDict(train=toy.prompts(), test=toy.prompts()),
        r"train_dataset holds several data sets \(train, test\)\. Choose one of them, such as dataset\['train'\]",
    ),
    "rows of several types": (
        [{"prompt": "red"}, {"prompt": 1}],
        r"train_dataset: the rows are no table.*each of one type",
    ),
}


@pytest.mark.parametrize("kind", NO_DATA_SETS)
def test_what_is_no_data_set_is_refused_with_what_to_give(tmp_path: Path, kind: str) -> None:
    given, message = NO_DATA_SETS[kind]
    with pytest.raises(UsageError, match=f"(?s){message}"):
        toy.ppo_trainer(tmp_path, train_dataset=given)


def test_training_without_a_data_set_is_refused(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path)
    trainer.train_dataset = None
    with pytest.raises(UsageError, match=r"train\(\) needs prompts: give the trainer a train_dataset"):
        trainer.train()


def test_prompts_that_the_chat_template_refuses_are_named(tmp_path: Path) -> None:
    for template, message in (
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        (None, "chat_template is not set"),
    ):
        tok = toy.tokenizer()
        tok.chat_template = template
        with pytest.raises(UsageError, match=f"train_dataset, row 1: the tokenizer cannot read.*{message}"):
            toy.ppo_trainer(tmp_path, tok=tok)


def test_a_tokenizer_of_another_model_is_refused_where_its_ids_go_beyond_the_model(tmp_path: Path) -> None:
    model = toy.policy(train_tokenizer([" ".join(toy.WORDS)] * 4, 290))
    with pytest.raises(
        UsageError, match=r"train_dataset, row 1: .* token 298 of .* 290 tokens: .* not the model's tokenizer"
    ):
        toy.ppo_trainer(tmp_path, model=model)


# The trainer's other arguments.


NO_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "a classifier": (
        {"model": toy.reward_model(toy.tokenizer())},
        r"model is of type LlamaForSequenceClassification\. Give a causal language model",
    ),
    "a class": ({"model": LlamaForCausalLM}, r"model is of type LlamaForCausalLM\. Give a causal"),
    "a folder without a model": (
        {"model": "/nowhere"},
        r"model: no model can be loaded from /nowhere: ",
    ),
    "a critic that is nowhere": (
        {"value_model": "/nowhere"},
        r"value_model: no model can be loaded from /nowhere: ",
    ),
    "an adapter that fits nowhere": (
        {
            "peft_config": LoraConfig(target_modules=["nowhere"]),
            "value_model": toy.reward_model(toy.tokenizer()),
        },
        r"The adapter cannot be put into the model: Target modules",
    ),
    "a name for a tokenizer": (
        {"tok": "gpt2", "model": toy.policy(toy.tokenizer())},
        r"processing_class is of type str\. Give the model's tokenizer",
    ),
    "settings of an adapter": ({"peft_config": {"r": 4}}, r"peft_config is of type dict\. Give a PeftConfig"),
    "virtual tokens": (
        {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)},
        r"adapter of virtual tokens \(PROMPT_TUNING\) cannot be trained.*LoRA",
    ),
    "a number for a reward": ({"reward_funcs": 3}, r"reward_funcs: 3 is of type int\. Give a function"),
    "a reward that is nowhere": (
        {"reward_funcs": "/nowhere"},
        r"reward_funcs: no reward model can be loaded from /nowhere: ",
    ),
    "a reward model without its tokenizer": (
        {"reward_funcs": toy.reward_model(toy.tokenizer())},
        r"reward_processing_classes is not given, and this LlamaForSequenceClassification was not loaded by a name",
    ),
    "a negative rate": (
        {"learning_rate": -1.0},
        r"learning_rate must be a number of at least 0, but is -1\.0",
    ),
    "a negative seed": ({"seed": -1}, r"seed must be a whole number from 0 to 4294967295, but is -1"),
}


@pytest.mark.parametrize("kind", NO_INPUTS)
def test_what_the_trainer_cannot_use_is_refused_with_what_to_give(tmp_path: Path, kind: str) -> None:
    arguments, message = NO_INPUTS[kind]
    with pytest.raises(UsageError, match=message):
        toy.ppo_trainer(tmp_path, **arguments)


def test_a_classifier_is_not_made_into_a_policy_with_an_untrained_head(tmp_path: Path) -> None:
    toy.reward_model(toy.tokenizer()).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"model: no model can be loaded from .*: it is a classifier"):
        toy.ppo_trainer(tmp_path, model=str(tmp_path))
    with pytest.raises(UsageError, match=r"No language model can be loaded from .*: it is a classifier"):
        load_policy(tmp_path, toy.tokenizer())


def test_settings_of_another_trainer_are_refused(tmp_path: Path) -> None:
    settings = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    tok = toy.tokenizer()
    with pytest.raises(UsageError, match=r"args is of type TrainingArguments\. Give a PPOConfig"):
        PPOTrainer(toy.policy(tok), toy.id_reward, settings, toy.prompts(), processing_class=tok)


def test_a_hub_that_cannot_be_reached_is_named_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whoami(*_: Any, **__: Any) -> None:
        raise OSError("no token\nand much more")

    monkeypatch.setattr("huggingface_hub.HfApi.whoami", whoami)
    with pytest.raises(UsageError, match=r"push_to_hub: .*\(OSError: no token\)\. Log in with"):
        toy.ppo_trainer(tmp_path, model="/nowhere", push_to_hub=True)


def test_several_gpus_without_a_launcher_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PPOConfig, "n_gpu", 2)
    with pytest.raises(UsageError, match=r"sees 2 GPUs.*accelerate launch"):
        toy.ppo_trainer(tmp_path)
