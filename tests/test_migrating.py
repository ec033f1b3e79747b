"""docs/migrating_from_trl.md, held to the letter: every argument of TRL 1.12 has its row, and the examples run as they stand."""

import ast
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import toy
import yaml
from transformers import TrainingArguments
from trl import ModelConfig

from tieback.pipeline.arguments import RunArguments, parse_stage
from tieback.pipeline.ppo import PPOArguments
from tieback.pipeline.trainer import PPOConfig

PAGE = (Path(__file__).parents[1] / "docs" / "migrating_from_trl.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
RECIPES = dict(re.findall(r"```yaml\n# ppo\.yaml, from (\S+)\n(.*?)```", PAGE, re.DOTALL))

# Fields of trl.experimental.ppo.PPOConfig that TrainingArguments does not have, and arguments of its PPOTrainer (TRL 1.12.0).
TRL_CONFIG = [
    "dataset_num_proc",
    "num_mini_batches",
    "total_episodes",
    "local_rollout_forward_batch_size",
    "num_sample_generations",
    "response_length",
    "stop_token",
    "stop_token_id",
    "temperature",
    "missing_eos_penalty",
    "sft_model_path",
    "world_size",
    "num_total_batches",
    "micro_batch_size",
    "local_batch_size",
    "batch_size",
    "local_mini_batch_size",
    "mini_batch_size",
    "reward_model_path",
    "model_adapter_name",
    "ref_adapter_name",
    "num_ppo_epochs",
    "whiten_rewards",
    "kl_coef",
    "kl_estimator",
    "cliprange",
    "vf_coef",
    "cliprange_value",
    "gamma",
    "lam",
    "ds3_gather_for_generation",
]
TRL_TRAINER = [
    "args",
    "processing_class",
    "model",
    "ref_model",
    "reward_model",
    "train_dataset",
    "value_model",
    "data_collator",
    "eval_dataset",
    "optimizers",
    "callbacks",
    "peft_config",
]


def table_of(heading: str) -> list[tuple[str, str]]:
    """The rows of the table below a heading: what it was, what it is."""
    section = PAGE.split(f"## {heading}")[1].split("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| `")
    ]
    return [(row[0], row[1]) for row in cells]


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text))))


def keywords(source: str) -> set[str]:
    """Names of all keyword arguments in a script."""
    return {node.arg for node in ast.walk(ast.parse(source)) if isinstance(node, ast.keyword) and node.arg}


def test_every_argument_of_trl_1_12_has_a_row() -> None:
    left = {name for before, _ in table_of("From TRL 0.12–1.12") for name in names_in(before)}
    # That of TRL is computed, ours a setting: it stands on the right.
    right = {name for _, after in table_of("From TRL 0.12–1.12") for name in names_in(after)}
    assert {*TRL_CONFIG, *TRL_TRAINER} - left - right == set()


def test_only_what_the_table_lists_differs_between_the_scripts() -> None:
    before, after = PYTHON[:2]
    rows = table_of("From TRL 0.12–1.12")
    left = {name for row, _ in rows for name in names_in(row)}
    right = {name for _, row in rows for name in names_in(row)}
    assert keywords(before) - keywords(after) <= left
    assert keywords(after) - keywords(before) <= right
    assert keywords(before) - keywords(after), "the scripts are the same"


@pytest.mark.slow
def test_the_script_after_the_renames_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tok = toy.tokenizer()
    for name, model in (("sft", toy.brief_policy(tok)), ("reward", toy.reward_model(tok))):
        model.save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
    rows = [{"prompt": row["prompt"][0]["content"]} for row in toy.prompts(64)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    script = PYTHON[1]
    assert "max_steps=157" in script
    script = script.replace("max_steps=157", "max_steps=2, report_to='none', use_cpu=True, disable_tqdm=True")
    variables: dict[str, Any] = {}
    exec(compile(script, "after.py", "exec"), variables)
    assert variables["trainer"].state.global_step == 2
    assert (tmp_path / "ppo" / "model.safetensors").is_file()


@pytest.mark.parametrize("source", ["LLaMA-Factory", "ms-swift"])
def test_the_recipes_are_read_as_they_stand(source: str, tmp_path: Path) -> None:
    path = tmp_path / "ppo.yaml"
    path.write_text(RECIPES[source] + "use_cpu: true\n")
    run, ppo_args, args, model_args = parse_stage(
        "ppo", (RunArguments, PPOArguments, PPOConfig, ModelConfig), ["--config", str(path)]
    )
    written = yaml.safe_load(RECIPES[source])
    found = {**vars(ppo_args), **vars(model_args), **vars(args)}
    for name, value in written.items():
        # ModelConfig takes a single target out of its list.
        assert found[name] in (value, *(value if isinstance(value, list) else ())), name
    assert run.recipe.keys() >= written.keys()


@pytest.mark.parametrize("heading", ["From LLaMA-Factory", "From ms-swift"])
def test_settings_on_the_right_are_settings_of_ours(heading: str) -> None:
    known = {
        item.name
        for kind in (PPOConfig, PPOArguments, ModelConfig, TrainingArguments)
        for item in fields(kind)
    }
    for _, after in table_of(heading):
        for code in re.findall(r"`([^`]+)`", after):
            if re.fullmatch(r"\w+(: .+)?", code):
                assert code.split(":")[0] in known, code
