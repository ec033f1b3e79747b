"""A stage that has come to its end: left as it is, refused where it was another run, replaced where that is asked for."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tieback.cli.errors import UsageError
from tieback.pipeline.arguments import RECIPES
from tieback.pipeline.finished import is_finished
from tieback.pipeline.resume import checkpoint_to_resume, settings_check

SETTINGS: dict[str, Any] = {"learning_rate": 0.1, "max_steps": 9, "train_dataset": "abc", "report_to": "none"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    return tmp_path


def test_a_finished_run_of_the_same_settings_and_inputs_is_left_as_it_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert is_finished(folder, {**SETTINGS, "report_to": "wandb", "run_dir": "moved"}, overwrite=False)
    assert f"{folder} is finished" in capsys.readouterr().out
    assert is_finished(folder, SETTINGS, overwrite=False, asked="false")


@pytest.mark.parametrize("changed", [{"learning_rate": 0.2}, {"train_dataset": "xyz"}, {"kl_coef": 0.3}])
def test_a_finished_run_of_others_is_refused_by_name_with_what_to_do(
    folder: Path, changed: dict[str, Any]
) -> None:
    (name,) = changed
    with pytest.raises(
        UsageError, match=rf"finished run of other .*\({name} was .*--run_dir.*--overwrite\.$"
    ):
        is_finished(folder, SETTINGS | changed, overwrite=False)
    assert not is_finished(folder, SETTINGS | changed, overwrite=True)


def test_more_steps_are_another_run_that_may_go_on(folder: Path) -> None:
    longer = {**SETTINGS, "max_steps": 20}
    with pytest.raises(
        UsageError, match=r"max_steps was 9, is 20.*train it further with --resume_from_check"
    ):
        is_finished(folder, longer, overwrite=False)
    assert not is_finished(folder, longer, overwrite=False, asked="true")


def test_a_run_of_unknown_settings_is_not_replaced(folder: Path) -> None:
    (folder / "settings.json").unlink()
    with pytest.raises(UsageError, match="--overwrite"):
        is_finished(folder, SETTINGS, overwrite=False)


def test_a_run_that_did_not_come_to_its_end_is_not_finished(folder: Path) -> None:
    (folder / "metrics.json").unlink()
    assert not is_finished(folder, {"learning_rate": 0.2}, overwrite=False)


def test_overwriting_leaves_no_weights_that_would_be_taken_for_the_new_ones(folder: Path) -> None:
    left = ("adapter_config.json", "adapter_model.safetensors", "value_model/model.safetensors")
    for name in (*left, "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    assert checkpoint_to_resume(folder, "false", SETTINGS, settings_check(SETTINGS, None)) is None
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "settings.json"]
    # Of a folder that no stage has finished, nothing goes: a model of the user's own may lie there.
    (folder / "model.safetensors").write_text("{}")
    assert checkpoint_to_resume(folder, None, SETTINGS, settings_check(SETTINGS, None)) is None
    assert (folder / "model.safetensors").exists()


# All stages.

STAGES = ("sft", "collect", "reward", "ppo", "evaluate")


def run(stage: str, folder: Path, *options: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        recipe = RECIPES / "smoke" / f"{stage}.yaml"
        patch.setattr(sys, "argv", [stage, "--config", str(recipe), "--run_dir", str(folder), *options])
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")
        importlib.import_module(f"tieback.pipeline.{stage}").main()


def files(folder: Path) -> dict[str, int]:
    """When each file was written, but for the page, which may be made again."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != "report.html")
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in found}


OTHERS = {
    "sft": ("--learning_rate", "0.5"),
    "collect": ("--temperature", "0.5"),
    "reward": ("--learning_rate", "0.5"),
    "ppo": ("--kl_coef", "0.5"),
    "evaluate": ("--num_prompts", "5"),
}


@pytest.mark.slow
def test_no_stage_touches_a_finished_run_unless_it_is_told_to(tmp_path: Path) -> None:
    for stage in STAGES:
        run(stage, tmp_path)
    before = files(tmp_path)
    (tmp_path / "evaluate" / "report.html").unlink()
    for stage in STAGES:
        run(stage, tmp_path)
        with pytest.raises(UsageError, match=f"{OTHERS[stage][0][2:]} was .*--overwrite"):
            run(stage, tmp_path, *OTHERS[stage])
    assert files(tmp_path) == before
    assert (tmp_path / "evaluate" / "report.html").is_file()

    # Another SFT model: what was made from the first one is no longer what this run would make.
    run("sft", tmp_path, "--overwrite", *OTHERS["sft"])
    assert files(tmp_path)["sft/model.safetensors"] != before["sft/model.safetensors"]
    for stage in STAGES[1:]:
        with pytest.raises(UsageError, match=r"(models?|digests) was .*--overwrite"):
            run(stage, tmp_path)
    run("collect", tmp_path, "--overwrite")
    with pytest.raises(UsageError, match="--overwrite"):
        run("reward", tmp_path)
