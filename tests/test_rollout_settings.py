"""Rollout settings: what is refused, and that what PPO was trained with reaches the evaluation without being said again."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from transformers import AutoModelForCausalLM, AutoTokenizer

from tieback.cli.errors import UsageError
from tieback.pipeline import evaluate
from tieback.pipeline.arguments import RunArguments, parse_stage
from tieback.pipeline.collect import CollectArguments
from tieback.pipeline.evaluate import EvaluateArguments
from tieback.pipeline.rollout.settings import RolloutSettings, settings_of_policy
from tieback.pipeline.trainer import PPOConfig

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
    "infinity": ({"temperature": float("inf")}, "temperature must be above 0 and finite, got inf"),
    "stop tokens that are one text": (
        {"stop_tokens": "</s>"},
        "stop_tokens must be a list of tokens, got '</s>'",
    ),
    "NaN": ({"temperature": float("nan")}, "temperature must be (above 0|a number)"),
    "completion": ({"max_completion_length": 0}, "max_completion_length must be at least 1, got 0"),
    "prompt": ({"max_prompt_length": 0}, "max_prompt_length must be at least 1, got 0"),
    "share of a GPU": (
        {"vllm_gpu_memory_utilization": 1.5},
        "vllm_gpu_memory_utilization must be between 0 and 1, got 1.5",
    ),
    "JSON": ({"chat_template_kwargs": "{brief}"}, "chat_template_kwargs is not valid JSON"),
    "a list": ({"chat_template_kwargs": "[1]"}, "chat_template_kwargs must be a mapping of names to values"),
}


@pytest.mark.parametrize("kind", [RolloutSettings, CollectArguments, EvaluateArguments, PPOConfig])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sampled_with_is_refused_in_every_stage(kind: Any, name: str) -> None:
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_arguments_of_the_template_are_json_on_the_command_line_and_a_mapping_in_a_recipe(
    tmp_path: Path,
) -> None:
    recipe = tmp_path / "recipe.yaml"
    for stage, kind in (("collect", CollectArguments), ("evaluate", EvaluateArguments), ("ppo", PPOConfig)):
        types, cpu = (RunArguments, kind), ["--use_cpu"] if stage == "ppo" else []
        recipe.write_text("chat_template_kwargs:\n  enable_thinking: false\n")
        _, args = parse_stage(stage, types, ["--config", str(recipe), *cpu])
        assert args.template_arguments == {"enable_thinking": False}
        argv = ["--config", str(recipe), "--chat_template_kwargs", '{"enable_thinking": true}', *cpu]
        assert parse_stage(stage, types, argv)[1].template_arguments == {"enable_thinking": True}
        recipe.write_text("seed: 1\n")
        assert parse_stage(stage, types, ["--config", str(recipe), *cpu])[1].template_arguments == {}


def test_a_policy_that_ppo_did_not_write_has_no_settings(tmp_path: Path) -> None:
    assert settings_of_policy(tmp_path) == {}
    assert settings_of_policy("a/hub-name") == {}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PPO run whose prompts and samples are not those of the defaults."""
    folder = tmp_path_factory.mktemp("home")
    toy.write_ppo_home(folder, eval_strategy="no", max_steps=1, kl_target=None)
    tok = AutoTokenizer.from_pretrained(folder / "sft")
    thinks = "{% if enable_thinking is not defined or enable_thinking %}{{ 'maybe' }}{% endif %}"
    tok.chat_template += "{%- if add_generation_prompt -%}" + thinks + "{%- endif -%}"
    tok.save_pretrained(folder / "sft")
    for stage in ("sft", "reward"):
        (folder / stage / "metrics.json").write_text("{}")
    settings = {
        "temperature": "0.6",
        "max_completion_length": "5",
        "max_prompt_length": "20",
        "chat_template_kwargs": '{"enable_thinking": false}',
    }
    argv = [part for name, value in settings.items() for part in (f"--{name}", value)]
    toy.run_ppo(
        folder, "--run_dir", str(folder), "--use_cpu", *argv, "--stop_tokens", "a", "b", "c", "d", "e"
    )
    return folder


def run_evaluate(home: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    """Run the stage; return the rollouts of both policies by name."""
    rollouts: dict[str, Any] = {}
    make_pairs = evaluate.make_pairs

    def spy(made: dict[str, Any], *args: Any) -> Any:
        rollouts.update(made)
        return make_pairs(made, *args)

    recipe = home / "evaluate.yaml"
    recipe.write_text("num_resamples: 2000\nnum_examples: 2\nseed: 3\n")
    fixed = ["--config", str(recipe), "--run_dir", str(home), "--dataset_name", str(home / "prompts.jsonl")]
    monkeypatch.setattr(evaluate, "make_pairs", spy)
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", *fixed, "--dataset_test_split", "train", "--overwrite", *options]
    )
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    evaluate.main()
    return rollouts


def log_probability(model: Any, prompt: list[int], completion: list[int], temperature: float) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
    return float((logits / temperature).log_softmax(-1)[range(len(completion)), completion].sum())


def test_ppo_is_evaluated_with_the_settings_that_it_was_trained_with(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = run_evaluate(home, monkeypatch)["ppo"]
    tok = AutoTokenizer.from_pretrained(home / "ppo")
    models = {name: AutoModelForCausalLM.from_pretrained(home / name) for name in ("ppo", "sft")}
    stops = [tok.encode(character)[0] for character in "abcde"]
    ends = {tok.eos_token_id, *stops, *models["sft"].generation_config.eos_token_id}
    for prompt, ids in zip(rollout.prompts, rollout.prompt_ids, strict=True):
        written = f"<|user|>{prompt[0]['content']}<|end|><|assistant|>"
        assert ids == tok.encode(written)
        assert len(ids) <= 20
    assert 0 < sum(rollout.truncated) < len(rollout)
    assert {ids[-1] for ids in rollout.completion_ids} & set(stops)
    for ids, truncated in zip(rollout.completion_ids, rollout.truncated, strict=True):
        assert not set(ids[:-1]) & ends
        assert len(ids) == 5 if truncated else ids[-1] in ends

    samples = [json.loads(line) for line in (home / "evaluate/samples.jsonl").read_text().splitlines()]
    for row, sample in enumerate(samples):
        ids = (rollout.prompt_ids[row], rollout.completion_ids[row])
        ratio = log_probability(models["ppo"], *ids, 0.6) - log_probability(models["sft"], *ids, 0.6)
        assert sample["ppo"]["log_ratio_to_sft"] == pytest.approx(ratio, abs=1e-4)
    shown = json.loads((home / "evaluate/settings.json").read_text())
    assert (shown["temperature"], shown["max_completion_length"]) == (0.6, 5)
    assert shown["stop_tokens"] == ["a", "b", "c", "d", "e"]
    assert shown["chat_template_kwargs"] == {"enable_thinking": False}


def test_the_recipe_and_the_command_line_of_the_evaluation_go_before_them(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--max_completion_length", "3", "--chat_template_kwargs", '{"enable_thinking": true}']
    rollout = run_evaluate(home, monkeypatch, *options)["sft"]
    tok = AutoTokenizer.from_pretrained(home / "ppo")
    assert {len(ids) for ids in rollout.completion_ids} <= {1, 2, 3}
    assert all(tok.decode(ids).endswith("<|assistant|>maybe") for ids in rollout.prompt_ids)
    shown = json.loads((home / "evaluate/settings.json").read_text())
    assert (shown["temperature"], shown["max_completion_length"]) == (0.6, 3)


def test_prompts_that_the_template_makes_too_long_are_refused_by_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="row 3: the prompt has 9 tokens, more than max_prompt_length=8"):
        toy.ppo_trainer(tmp_path, max_prompt_length=8)
