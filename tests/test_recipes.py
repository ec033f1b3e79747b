"""Every recipe and every launcher configuration is read by what it is for, and begins with what it needs."""

import importlib
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from tieback.cli.devices import has_fast_bf16
from tieback.cli.errors import UsageError
from tieback.pipeline.arguments import RECIPES, RunArguments, parse_stage
from tieback.pipeline.ppo import PPOArguments
from tieback.pipeline.trainer import PPOConfig

ROOT = Path(__file__).parents[1]
STAGES = ("sft", "collect", "reward", "ppo", "evaluate")
FILES = sorted(RECIPES.glob("*/*.yaml"))
LAUNCHERS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
PPO_TYPES = (RunArguments, PPOArguments, PPOConfig)


class ParsedError(Exception):
    """Carries what a stage read of its recipe out of its main()."""


def read_by_stage(path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[Any, ...]:
    """A recipe as its stage reads it."""
    stage_name = path.stem.split("_")[0]
    stage = importlib.import_module(f"tieback.pipeline.{stage_name}")

    def parse(name: str, types: tuple[type, ...]) -> None:
        assert name == stage_name
        raise ParsedError(parse_stage(name, types, ["--config", str(path), *overrides]))

    monkeypatch.setattr(stage, "parse_stage", parse)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ParsedError) as caught:
        stage.main()
    parsed: tuple[Any, ...] = caught.value.args[0]
    return parsed


def name_of(path: Path) -> str:
    return "/".join(path.parts[-2:])


def test_every_recipe_folder_has_every_stage_that_it_needs() -> None:
    # Ready-made answers need no collect, and a ready-made reward function no model that is taught one.
    four = set(STAGES) - {"collect"}
    fewer = {
        "smollm2": {*four, "reward_minilm"},
        "sentiment": {"ppo", "evaluate"},
        "gsm8k-qwen2.5-0.5b": {"ppo", "evaluate"},
        **dict.fromkeys(("tldr-pythia-1b", "ultrafeedback-qwen3-0.6b-lora", "qwen3-8b-qlora"), four),
    }
    folders = {folder.name: {path.stem for path in folder.glob("*.yaml")} for folder in RECIPES.iterdir()}
    assert set(folders) >= {"helpdesk", "hh", "smoke", "lora"}
    assert folders == {name: fewer.get(name, set(STAGES)) for name in folders}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_recipe_is_read_whole_by_its_stage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = read_by_stage(path, monkeypatch)
    recipe = yaml.safe_load(path.read_text())
    for key, value in recipe.items():
        holders = [item for item in parsed if hasattr(item, key)]
        assert holders, key
        read = getattr(holders[0], key)
        value = has_fast_bf16() if (key, value) == ("bf16", "auto") else value
        # Scheduler and strategy names become enums, JSON is read, and a file may lie beside the recipe.
        assert getattr(read, "value", read) in (value, [value], str(path.parent / str(value))), key
    (run,) = (item for item in parsed if isinstance(item, RunArguments))
    assert run.run_dir == f"runs/{path.parent.name}"
    (output_dir,) = {item.output_dir for item in parsed if getattr(item, "output_dir", None)}
    assert output_dir == f"runs/{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_recipe_begins_with_its_hardware_and_its_command(path: Path) -> None:
    text = "\n".join(takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    assert "Hardware:" in text
    commands = (
        f"accelerate launch pipeline/{path.stem}.py",
        f"make {path.stem}",
        f"RECIPE={path.parent.name}",
    )
    assert any(command in text for command in commands)


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "helpdesk"], ids=name_of)
def test_a_key_that_nothing_reads_is_refused_by_every_stage(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / path.name
    copy.write_text(path.read_text() + "\nrun_dri: elsewhere\n")
    with pytest.raises(
        UsageError, match=rf"{path.name}: nothing reads the key `run_dri`. Did you mean `run_dir`\?"
    ):
        read_by_stage(copy, monkeypatch)


# How a recipe is read, whatever the stage.


def recipe(folder: Path, text: str) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def test_the_command_line_overrides_the_recipe(tmp_path: Path) -> None:
    argv = recipe(tmp_path, f"run_dir: {tmp_path}\nlearning_rate: 1.0e-3\nkl_coef: 0.3\nuse_cpu: true\n")
    _, _, args = parse_stage("ppo", PPO_TYPES, [*argv, "--kl_coef", "0.7"])
    assert (args.learning_rate, args.kl_coef) == (1e-3, 0.7)
    assert args.output_dir == str(tmp_path / "ppo")
    run, _, args = parse_stage("ppo", PPO_TYPES, [*argv, "--kl_coef", "0.7", "--max_rows=5"])
    # What both set, and not the hundred defaults: for the report.
    assert run.recipe == {
        "run_dir": str(tmp_path), "learning_rate": 1e-3, "kl_coef": 0.7, "use_cpu": True, "max_rows": 5,
    }  # fmt: skip
    _, _, args = parse_stage("ppo", PPO_TYPES, [f"--config={argv[1]}", "--output_dir", str(tmp_path / "x")])
    assert (args.kl_coef, args.output_dir) == (0.3, str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("processor", "instructions", "fast"),
    [
        ("AMD EPYC", "avx512_bf16", True),
        ("Intel Xeon", "amx_bf16", True),
        ("Intel Xeon", "avx512_bf16", False),
        ("AMD EPYC", "avx2", False),
    ],
)
def test_bf16_auto_is_true_where_the_processor_is_faster_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processor: str, instructions: str, fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": processor, instructions: True})
    argv = [*recipe(tmp_path, f"run_dir: {tmp_path}\nbf16: auto\n"), "--use_cpu"]
    run, _, args = parse_stage("ppo", PPO_TYPES, argv)
    assert args.bf16 is run.recipe["bf16"] is fast
    _, _, args = parse_stage("ppo", PPO_TYPES, [*argv, "--bf16", "false"])
    assert args.bf16 is False
    _, _, args = parse_stage("ppo", PPO_TYPES, [*recipe(tmp_path, "bf16: false"), "--use_cpu", "--bf16=auto"])
    assert args.bf16 is fast


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16: sometimes", r"argument --bf16: Truthy value expected: got sometimes"),
        ("kl_coeff: 0.1", r"recipe\.yaml: nothing reads the key `kl_coeff`. Did you mean `kl_coef`\?"),
        ("zzzz: 0.1", r"recipe\.yaml: nothing reads the key `zzzz`\. Remove it"),
        ("[1, 2]", r"recipe\.yaml must be a mapping of settings"),
        ("", r"recipe\.yaml must be a mapping of settings"),
        ("a: b: c", r"recipe\.yaml is not valid YAML"),
        ("temperature: 0.0", r"recipe\.yaml and the command line: temperature must be above 0"),
        (
            "critic_init: random",
            r"recipe\.yaml and the command line: critic_init must be 'reward' or 'policy'",
        ),
        (
            "per_device_train_batch_size: 10\nnum_minibatches: 3",
            r"10 completions an iteration .* do not divide into num_minibatches=3",
        ),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused_with_file_and_key(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        parse_stage("ppo", PPO_TYPES, [*recipe(tmp_path, text), "--use_cpu"])


def test_a_recipe_that_is_not_there_is_refused_with_where_recipes_are(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"none\.yaml: no such file. The built-in recipes \(.*helpdesk, .*\) are in .*recipes",
    ):
        parse_stage("ppo", PPO_TYPES, ["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(UsageError, match="--config: name a recipe or its file"):
        parse_stage("ppo", PPO_TYPES, ["--config"])


def test_an_option_that_nothing_reads_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lerning_rate"):
        parse_stage("ppo", PPO_TYPES, [*recipe(tmp_path, "seed: 1"), "--lerning_rate", "1"])


# Launchers.


@pytest.mark.parametrize("path", LAUNCHERS, ids=name_of)
def test_accelerate_reads_the_launcher_configuration(path: Path) -> None:
    config = load_config_from_file(str(path))
    kinds = {
        "cpu": "NO",
        "single_gpu": "NO",
        "multi_gpu": "MULTI_GPU",
        "multi_node": "MULTI_GPU",
        "fsdp2": "FSDP",
        "zero2": "DEEPSPEED",
        "zero3": "DEEPSPEED",
    }
    assert config.distributed_type == kinds[path.stem]
    assert config.use_cpu == (path.stem == "cpu")
    assert config.mixed_precision == ("no" if path.stem == "cpu" else "bf16")
    assert (config.num_processes > 1) == (path.stem not in ("cpu", "single_gpu"))
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if path.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
    assert path.read_text().startswith("# ")


def test_all_launchers_are_there() -> None:
    assert {path.stem for path in LAUNCHERS} == {
        *("cpu", "single_gpu", "multi_gpu", "multi_node", "fsdp2", "zero2", "zero3")
    }
