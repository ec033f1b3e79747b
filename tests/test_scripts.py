"""The stage scripts from any folder: their own packages, their help, and what they say when a stage before is missing."""

import importlib
import json
import os
import subprocess
import sys
import tomllib
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
import toy

from tieback.cli.errors import UsageError

ROOT = Path(__file__).parents[1]
STAGES = ("sft", "collect", "reward", "ppo", "evaluate")
PROGRAMS = (
    *STAGES,
    "memory",
    "preflight",
    "label",
    "rlhf",
    "pipeline.label",
    "pipeline.report",
    "classic_rl.gridworld",
    "classic_rl.cartpole",
    "classic_rl.pong",
)
DECOYS = ("data", "reward_model", "ppo_core", "pipeline")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a user's own, with folders named like our packages."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in DECOYS:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise RuntimeError('imported the {name} of the user')\n")
    return folder


@pytest.fixture(scope="module")
def printed(elsewhere: Path) -> dict[str, Any]:
    """What the programs print there, and which modules they import."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "workers" / "every_help.py")],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.parametrize("stage", [*STAGES, "memory", "preflight"])
def test_help_is_printed_from_any_folder(printed: dict[str, Any], stage: str) -> None:
    output = printed[stage]["output"]
    assert printed[stage]["status"] == 0
    assert output.startswith(f"usage: pipeline/{stage}.py")
    for option in ("--run_dir", "--seed", "--output_dir"):
        assert option in output


def test_help_of_the_stages_loads_nothing_that_only_a_run_needs(printed: dict[str, Any]) -> None:
    assert printed["loaded for help"] == []


@pytest.mark.parametrize("stage", [*STAGES, "memory", "preflight"])
def test_help_is_that_of_all_the_settings_which_a_run_reads(
    printed: dict[str, Any], stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [stage, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"tieback.pipeline.{stage}").main()
    assert capsys.readouterr().out == printed[stage]["output"]


def test_a_missing_stage_is_one_line_and_status_2(printed: dict[str, Any]) -> None:
    assert printed["a missing stage"]["status"] == 2
    assert printed["a missing stage"]["errors"].strip().splitlines()[-1] == (
        "error: nothing/sft/config.json does not exist. Make it with `accelerate launch pipeline/sft.py --run_dir "
        "nothing` (or `make sft RUN=nothing`)."
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_module_of_ours_is_loaded_once_under_the_one_name(printed: dict[str, Any], program: str) -> None:
    assert printed[program]["status"] == 0
    modules = printed[program]["modules"]
    assert len(modules) > 3
    for name, file in modules:
        path = Path(file).relative_to(ROOT).with_suffix("")
        parts = path.parent.parts if path.name == "__init__" else path.parts
        assert name == ".".join(("tieback", *parts))
    files = [file for _, file in modules]
    assert len(files) == len(set(files))


def test_no_file_of_ours_stands_for_a_library(printed: dict[str, Any]) -> None:
    assert set(printed["libraries"]) == {"trl", "datasets", "transformers", "peft", "accelerate"}
    for name, file in printed["libraries"].items():
        assert "site-packages" in Path(file).parts, f"{name} was imported from {file}"


def test_no_file_in_the_pipeline_is_named_like_something_that_can_be_imported() -> None:
    names = {path.stem for path in (ROOT / "pipeline").iterdir() if path.suffix == ".py" or path.is_dir()}
    others = [path for path in sys.path if path and Path(path).resolve() != ROOT / "pipeline"]
    taken = {name for name in names if name.isidentifier() and PathFinder.find_spec(name, others) is not None}
    # What the package `evaluate` offers is used by nothing here.
    assert taken - {"evaluate", "__init__", "__pycache__"} == set()
    assert not names & set(sys.stdlib_module_names)


def test_every_folder_with_code_is_in_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    rooms = {package.split(".")[1] for package in packages if "." in package}
    folders = {file.parent.relative_to(ROOT) for room in rooms for file in (ROOT / room).rglob("__init__.py")}
    assert {"tieback", *(".".join(("tieback", *folder.parts)) for folder in folders)} == set(packages)


def run_here(stage: str, folder: Path, *options: str) -> None:
    """A stage's main() in this process, with the smoke recipe."""
    config = ROOT / "pipeline" / "recipes" / "smoke" / f"{stage}.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [stage, "--config", str(config), "--run_dir", str(folder), *options])
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")
        patch.setenv("ACCELERATE_USE_CPU", "true")
        importlib.import_module(f"tieback.pipeline.{stage}").main()


@pytest.mark.parametrize(
    ("stage", "there", "missing"),
    [
        ("collect", [], "sft"),
        ("reward", [], "(sft|collect)"),
        ("reward", ["sft"], "collect"),
        ("ppo", [], "sft"),
        ("ppo", ["sft"], "reward"),
        ("evaluate", [], "sft"),
        ("evaluate", ["sft"], "ppo"),
    ],
)
def test_a_missing_stage_is_named_with_the_command_that_makes_it(
    tmp_path: Path, stage: str, there: list[str], missing: str
) -> None:
    for name in there:
        save_stage(tmp_path / name)
    message = rf"does not exist. Make it with `accelerate launch pipeline/{missing}\.py --run_dir {tmp_path}`"
    with pytest.raises(UsageError, match=message):
        run_here(stage, tmp_path)


def save_stage(folder: Path) -> None:
    tok = toy.tokenizer()
    toy.policy(tok).save_pretrained(folder)
    tok.save_pretrained(folder)
    (folder / "metrics.json").write_text("{}")
