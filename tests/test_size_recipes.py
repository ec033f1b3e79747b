"""Recipes for sizes that are not trained here: every stage, as written but for fewer and shorter rows, on a tiny model of
the same family under the name of the real one, and on rows of the columns that the data sets of the hub have."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import toy
from datasets import Dataset
from peft import PeftConfig
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tieback.cli.arguments import parse_flags
from tieback.data import sources
from tieback.pipeline.rlhf import RlhfArguments, commands
from tieback.pipeline.trainer import PPOTrainer
from tieback.pipeline.trainer.critics import AdapterCritic

pytestmark = pytest.mark.slow

QWEN = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
NEOX = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rotary_pct": 0.25,
}
# What makes seconds of hours, and nothing else; a CPU has no bf16 to compute in quickly.
SMALLER: dict[str, dict[str, Any]] = {
    "sft": {
        "max_steps": 2,
        "report_to": "none",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "bf16": False,
    },
    "reward": {
        "max_steps": 2,
        "report_to": "none",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "bf16": False,
    },
    "ppo": {
        "max_steps": 2,
        "report_to": "none",
        "per_device_train_batch_size": 8,
        "max_completion_length": 8,
        "bf16": False,
    },
    "evaluate": {"num_prompts": 4, "num_resamples": 2000, "max_completion_length": 8, "dtype": "float32"},
}
WORDS = ("red", "blue", "green", "cat", "dog", "sun", "moon", "one", "two")


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def tldr(place: int) -> dict[str, Any]:
    post = f"SUBREDDIT: r/{WORDS[place % 9]}\n\nPOST: {WORDS[place // 9]} {place}\n\nTL;DR:"
    return {"prompt": post, "completion": f" {WORDS[place % 7]}"}


def tldr_preference(place: int) -> dict[str, Any]:
    return {"prompt": tldr(place)["prompt"], "chosen": f" {WORDS[place % 9]}", "rejected": " no no no"}


def ultrafeedback(place: int) -> dict[str, Any]:
    asked = said("user", f"{WORDS[place % 9]} {place}?")
    answers = {"chosen": WORDS[place % 7], "rejected": "no no no"}
    sides: dict[str, Any] = {side: [asked, said("assistant", text)] for side, text in answers.items()}
    return sides | {"score_chosen": 7.0, "score_rejected": 3.0}


def gsm8k(place: int) -> dict[str, Any]:
    return {"question": f"What is {place} + 1?", "answer": f"<<{place}+1={place + 1}>>\n#### {place + 1}"}


# By name, configuration and split: what a row is like.
SETS = {
    ("trl-lib/tldr", None, "train"): tldr,
    ("trl-lib/tldr", None, "validation"): tldr,
    ("trl-lib/tldr-preference", None, "train"): tldr_preference,
    ("trl-lib/ultrafeedback_binarized", None, "train"): ultrafeedback,
    ("trl-lib/ultrafeedback_binarized", None, "test"): ultrafeedback,
    ("openai/gsm8k", "main", "train"): gsm8k,
    ("openai/gsm8k", "main", "test"): gsm8k,
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with the models that recipes name; and their data sets in the place of the hub."""
    tok = toy.tokenizer()
    ids = {"vocab_size": len(tok), "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    models: dict[str, PreTrainedModel] = {
        "EleutherAI/pythia-1b-deduped": GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX, **ids)),
        "Qwen/Qwen2.5-0.5B-Instruct": Qwen2ForCausalLM(Qwen2Config(**QWEN, **ids, tie_word_embeddings=True)),
        "Qwen/Qwen3-0.6B": Qwen3ForCausalLM(Qwen3Config(**QWEN, **ids, head_dim=8, tie_word_embeddings=True)),
        # As many rows of 64 as 4 bits are packed in.
        "Qwen/Qwen3-8B": Qwen3ForCausalLM(Qwen3Config(**(QWEN | {"hidden_size": 64}), **ids, head_dim=16)),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)

    def load_dataset(name: str, config: str | None, split: str) -> Dataset:
        return Dataset.from_list([SETS[name, config, split](place) for place in range(80)])

    monkeypatch.setattr(sources.datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(recipe: str, monkeypatch: pytest.MonkeyPatch, **ppo: Any) -> dict[str, dict[str, float]]:
    """All stages of a recipe, in this process: the figures of each, by its folder.

    `ppo` are settings of that stage on top of `SMALLER`.
    """
    (arguments,) = parse_flags(RlhfArguments, "tieback rlhf", ["--recipe", recipe, "--run_dir", "run"])
    for command in commands(arguments, []):
        stage = Path(command[0]).stem
        settings = SMALLER[stage] | (ppo if stage == "ppo" else {})
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", [*command, *flags])
        importlib.import_module(f"tieback.pipeline.{stage}").main()
    return {path.parent.name: json.loads(path.read_text()) for path in Path("run").glob("*/metrics.json")}


def test_tldr(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = run("tldr-pythia-1b", monkeypatch, generation_batch_size=4, num_eval_prompts=4)
    assert set(metrics) == {"sft", "reward", "ppo", "evaluate"}
    assert metrics["reward"]["num_pairs/train"] > 70
    assert metrics["ppo"]["train/iterations"] == 2
    assert 0 <= metrics["evaluate"]["win_rate/ppo_vs_sft"] <= 1
    assert json.loads(Path("run/ppo/config.json").read_text())["model_type"] == "gpt_neox"


def test_gsm8k(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = run("gsm8k-qwen2.5-0.5b", monkeypatch, generation_batch_size=8)
    assert set(metrics) == {"ppo", "evaluate"}
    # An untrained model writes no right answer, and one that writes the right one scores 1 (test_reward_functions.py).
    assert metrics["ppo"]["reward/mean"] == metrics["evaluate"]["gold_score/ppo"] == 0
    assert metrics["ppo"]["policy/ratio"] == pytest.approx(1, abs=1e-3)
    sample = json.loads(Path("run/evaluate/samples.jsonl").read_text().splitlines()[0])
    assert 'output the final answer after "####"' in json.dumps(sample["prompt"]).replace("\\", "")


@pytest.mark.parametrize(
    ("recipe", "base"),
    [("ultrafeedback-qwen3-0.6b-lora", "Qwen/Qwen3-0.6B"), ("qwen3-8b-qlora", "Qwen/Qwen3-8B")],
)
def test_ultrafeedback(home: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, base: str) -> None:
    four_bits = base == "Qwen/Qwen3-8B"
    if four_bits:
        pytest.importorskip("bitsandbytes")
    made: list[PPOTrainer] = []
    init = PPOTrainer.__init__

    def spy(trainer: PPOTrainer, *args: Any, **kwargs: Any) -> None:
        made.append(trainer)
        init(trainer, *args, **kwargs)

    monkeypatch.setattr(PPOTrainer, "__init__", spy)
    more = {"generation_batch_size": 4} if four_bits else {}
    metrics = run(recipe, monkeypatch, num_eval_prompts=4, **more)
    assert set(metrics) == {"sft", "reward", "ppo", "evaluate"}
    assert metrics["ppo"]["train/iterations"] == 2
    for stage in ("sft", "reward", "ppo"):
        adapter = PeftConfig.from_pretrained(f"run/{stage}")
        assert (adapter.base_model_name_or_path, adapter.r) == (base, 32)
    (trainer,) = made
    layers = [
        module for name, module in trainer.model.policy.named_modules() if name.endswith("q_proj.base_layer")
    ]
    assert {type(layer).__name__ for layer in layers} == {"Linear4bit" if four_bits else "Linear"}
    # One base: reference, critic and reward model are adapters of the policy.
    assert trainer.reference is None
    assert isinstance(trainer.model, AdapterCritic)
    assert set(trainer.model.reward_heads) != set()
