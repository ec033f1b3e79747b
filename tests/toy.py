"""Tiny models, tokenizers and prompts that the tests of trainer and stages share."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tieback.data.tokenizer import train_tokenizer
from tieback.pipeline import ppo
from tieback.pipeline.rollout.sampler import Completion, TransformersSampler
from tieback.pipeline.rollout.texts import encode_prompts
from tieback.pipeline.rollout.token_scores import completion_logprobs, pack_sequences
from tieback.pipeline.trainer import PPOConfig, PPOTrainer
from tieback.reward_model.adapter import ScalarAdapter

WORDS = [
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "bird",
    "one",
    "two",
    "three",
    "yes",
    "no",
    "maybe",
    "up",
    "down",
    "left",
    "right",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens with the project's chat template."""
    return train_tokenizer([" ".join(WORDS)] * 4, 300)


def config(vocab_size: int, **changes: Any) -> LlamaConfig:
    """A Llama of two layers and width 32."""
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        **changes,
    }
    return LlamaConfig(vocab_size=vocab_size, **settings)


def policy(tok: PreTrainedTokenizerFast, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """An untrained policy."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        config(len(tok), eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, **changes)
    )
    return model.eval()


def reward_model(
    tok: PreTrainedTokenizerFast, seed: int = 1, **changes: Any
) -> LlamaForSequenceClassification:
    """An untrained reward model with one label."""
    torch.manual_seed(seed)
    settings = {
        "num_labels": 1,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
        **changes,
    }
    model = LlamaForSequenceClassification(config(len(tok), **settings))
    return model.eval()


def prompts(count: int = 16) -> Dataset:
    """Conversational prompts of different lengths, with a column `target`."""
    rows = [
        " ".join(WORDS[i % len(WORDS)] for i in range(start, start + 1 + start % 4)) for start in range(count)
    ]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in rows],
            "target": [WORDS[i % len(WORDS)] for i in range(count)],
        }
    )


def demonstrations(count: int = 5) -> list[dict[str, Any]]:
    """The first prompts, each answered by its words in reverse."""
    return [
        {
            "prompt": prompt,
            "completion": [{"role": "assistant", "content": " ".join(prompt[0]["content"].split()[::-1])}],
        }
        for prompt in prompts(count)["prompt"]
    ]


def brief_policy(tok: PreTrainedTokenizerFast, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """An untrained policy whose responses end soon: every sixth id ends one."""
    model = policy(tok, seed, **changes)
    model.generation_config.eos_token_id = [tok.eos_token_id, *range(5, len(tok), 6)]
    return model


def reward_adapter() -> ScalarAdapter:
    """A reward model that is an adapter of the policies here."""
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(11)
    model = get_peft_model(policy(tokenizer()), config)
    head = torch.randn(1, model.config.hidden_size)
    return ScalarAdapter(config, get_peft_model_state_dict(model), head, 0.5, "reward adapter")


def id_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward function that any change of the sampled tokens changes."""
    return [sum((place + 1) * token for place, token in enumerate(ids)) % 11 / 11 for ids in completion_ids]


def ppo_trainer(
    folder: Path,
    reward_funcs: Any = id_reward,
    *,
    model: Any = None,
    tok: PreTrainedTokenizerFast | None = None,
    train_dataset: Dataset | None = None,
    eval_dataset: Dataset | None = None,
    value_model: Any = None,
    reward_processing_classes: Any = None,
    peft_config: Any = None,
    callbacks: Any = None,
    judge_funcs: Any = None,
    ptx_dataset: Any = None,
    rollout_func: Any = None,
    **settings: Any,
) -> PPOTrainer:
    """A PPOTrainer of two iterations of eight completions, two epochs and two minibatches each."""
    tok = tok or tokenizer()
    defaults = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 5,
        "max_steps": 2,
        "max_completion_length": 6,
        "num_ppo_epochs": 2,
        "num_minibatches": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return PPOTrainer(
        brief_policy(tok) if model is None else model,
        reward_funcs,
        PPOConfig(output_dir=str(folder), **(defaults | settings)),
        prompts() if train_dataset is None else train_dataset,
        eval_dataset,
        tok,
        reward_processing_classes,
        value_model,
        callbacks=callbacks,
        peft_config=peft_config,
        judge_funcs=judge_funcs,
        ptx_dataset=ptx_dataset,
        rollout_func=rollout_func,
    )


def two_turns(prompts: list[Any], trainer: PPOTrainer) -> dict[str, Any]:
    """A rollout function: policy, environment, and the policy once more in most rows; at most 14 tokens in all.

    Row by row, so that processes do not sample equally often.
    """
    prompt_ids = encode_prompts(prompts, trainer.processing_class, trainer.args.template_arguments)
    returned: dict[str, list[Any]] = {"completion_ids": [], "env_mask": [], "logprobs": [], "turns": []}
    for before in prompt_ids:
        (first,) = trainer.sample([before], max_length=4)
        said = [7, 8][: 1 + sum(first.ids) % 2]
        ids, mask, logprobs = [*first.ids, *said], [1] * len(first.ids) + [0] * len(said), first.logprobs
        turns = 1 + (sum(before) % 4 > 0)
        if logprobs is not None:
            logprobs = [*logprobs, *[math.nan] * len(said)]
        if turns == 2:
            (second,) = trainer.sample([before + ids], max_length=4)
            ids, mask = ids + second.ids, mask + [1] * len(second.ids)
            logprobs = None if logprobs is None else logprobs + (second.logprobs or [])
        for name, value in zip(returned, (ids, mask, logprobs, turns), strict=True):
            returned[name].append(value)
    if returned["logprobs"][0] is None:
        del returned["logprobs"]
    return {"prompt_ids": prompt_ids, **returned}


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def without_measurements(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures of a log or of metrics.json without seconds, speed and memory, which no two runs share."""
    return {
        name: value
        for name, value in figures.items()
        if not re.search("^time/|^memory/|per_second|/seconds|^train_|runtime", name)
    }


def iteration_logs(trainer: PPOTrainer) -> list[dict[str, float]]:
    """What each iteration logged, but for what it took."""
    return [without_measurements(entry) for entry in trainer.state.log_history if "policy/loss" in entry]


def fixed_sample(
    sampler: TransformersSampler,
    prompt_ids: list[list[int]],
    seed: int | None = None,
    with_logprobs: bool = False,
    max_length: int | None = None,
) -> list[Completion]:
    """In the place of `TransformersSampler.sample`: each prompt has one completion of one to six tokens, every other one cut.

    Where log-probabilities are asked for, they are those of scoring.
    """
    sums = [sum(prompt) for prompt in prompt_ids]
    completions = []
    for number in sums:
        middle = [6 * ((number + 7 * place) % 40) + 6 for place in range(number % 6)]
        completions.append([*middle, 6 if number % 2 else sampler.end_ids[0]])
    logprobs: list[list[float] | None] = [None] * len(sums)
    if with_logprobs:
        packed = pack_sequences(prompt_ids, completions, 0, sampler.device)
        scored, _ = completion_logprobs(sampler._model.policy, packed, sampler._model.temperature)
        logprobs = [row[: len(ids)] for row, ids in zip(scored.tolist(), completions, strict=True)]
    return [
        Completion(ids, number % 2 == 1, drawn)
        for ids, number, drawn in zip(completions, sums, logprobs, strict=True)
    ]


REWARDS = """\
import os, time

def slow(completions, target, **columns):
    time.sleep(float(os.environ.get("SECONDS_A_REWARD", 0)))
    return [len(text[0]["content"]) / 10 + len(word) / 10 for text, word in zip(completions, target)]
"""


def write_ppo_home(folder: Path, **settings: Any) -> None:
    """A folder to run pipeline/ppo.py in: SFT model, reward model, 28 prompts, a reward function, and ppo.yaml."""
    tok = tokenizer()
    for name, model in (("sft", brief_policy(tok)), ("reward", reward_model(tok))):
        model.save_pretrained(folder / name)
        tok.save_pretrained(folder / name)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts(28)))
    (folder / "my_rewards.py").write_text(REWARDS)
    recipe = {
        "model_name_or_path": str(folder / "sft"),
        "reward_funcs": [str(folder / "reward"), "my_rewards:slow"],
        "dataset_name": str(folder / "prompts.jsonl"),
        "num_eval_prompts": 4,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "per_device_train_batch_size": 8,
        "num_minibatches": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "kl_target": 0.2,
        "normalize_rewards": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
    }
    (folder / "ppo.yaml").write_text(yaml.safe_dump(recipe | settings))


def run_ppo(folder: Path, *options: str) -> None:
    """The main() of pipeline/ppo.py in this process, as the command line would call it in a folder of `write_ppo_home`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ppo.py", "--config", str(folder / "ppo.yaml"), *options])
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")  # the stage then leaves this process's logging alone
        patch.chdir(folder)
        ppo.main()
