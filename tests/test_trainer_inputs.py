"""Data, models and other arguments of the trainer: their forms, and what is refused, by name, before compute is spent."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PromptTuningConfig
from transformers import LlamaForCausalLM, TrainingArguments

from tieback.cli.errors import UsageError
from tieback.data.tokenizer import train_tokenizer
from tieback.pipeline.model_loading import load_policy
from tieback.pipeline.trainer import PPOConfig, PPOTrainer

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
        r"model: no model can be loaded from /nowhere: there is no such folder here, and on the hub: ",
    ),
    "a critic that is nowhere": (
        {"value_model": "/nowhere"},
        r"value_model: no model can be loaded from /nowhere: there is no such folder here, and on the hub: ",
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
        r"reward_funcs: no reward model can be loaded from /nowhere: there is no such folder here, and on the hub: ",
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
