"""Which checkpoint a training stage goes on from, and what is left of a run before."""

import json
from pathlib import Path
from typing import Any

import pytest

from tieback.cli.errors import UsageError
from tieback.pipeline.resume import (
    FIXED,
    FREE,
    TRAINER_STATE,
    checkpoint_to_resume,
    settings_check,
    whole_checkpoints,
)

MARKS = (TRAINER_STATE, "ppo_state.json")


@pytest.fixture(params=MARKS)
def mark(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def leave(
    folder: Path, mark: str, *steps: int, finished: bool, settings: dict[str, Any] | None = None
) -> None:
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / mark).write_text("{}")
    if finished:
        (folder / "metrics.json").write_text("{}")
    if settings is not None:
        (folder / "settings.json").write_text(json.dumps(settings))


def resume(folder: Path, asked: str | None, settings: dict[str, Any], mark: str, *allowed: str) -> str | None:
    return checkpoint_to_resume(folder, asked, settings, settings_check(settings, allowed), mark)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_unfinished_run_goes_on_and_a_finished_one_starts_anew_without_its_checkpoints(
    tmp_path: Path, mark: str
) -> None:
    leave(tmp_path, mark, 3, 12, 100, finished=False)
    # A kill tore the newest one while its last file was written.
    (tmp_path / "checkpoint-100" / mark).write_text('{"files": ')
    assert [path.name for path in whole_checkpoints(tmp_path, mark)] == ["checkpoint-3", "checkpoint-12"]
    assert resume(tmp_path, None, {}, mark) == str(tmp_path / "checkpoint-12")
    assert len(whole_checkpoints(tmp_path, mark)) == 2
    (tmp_path / "metrics.json").write_text("{}")
    assert resume(tmp_path, None, {}, mark) is None
    # The next interrupted run must find only its own.
    assert names(tmp_path) == ["settings.json"]


@pytest.mark.parametrize("asked", ["true", "True", "by name"])
def test_what_is_asked_for_is_resumed_and_no_checkpoint_goes(tmp_path: Path, mark: str, asked: str) -> None:
    leave(tmp_path, mark, 3, finished=True, settings={"seed": 1})
    wanted = str(tmp_path / "checkpoint-3")
    assert resume(tmp_path, wanted if asked == "by name" else asked, {"seed": 1}, mark) == wanted
    assert names(tmp_path) == ["checkpoint-3", "settings.json"]


def test_a_start_anew_can_be_asked_for(tmp_path: Path, mark: str) -> None:
    leave(tmp_path, mark, 3, finished=False)
    assert resume(tmp_path, "false", {}, mark) is None
    assert names(tmp_path) == ["settings.json"]
    assert resume(tmp_path, "true", {}, mark) is None


def test_a_folder_that_is_no_whole_checkpoint_is_refused_with_those_beside_it(
    tmp_path: Path, mark: str
) -> None:
    leave(tmp_path, mark, 3, 5, finished=False)
    (tmp_path / "checkpoint-5" / mark).unlink()
    with pytest.raises(
        UsageError, match=rf"checkpoint-5: no whole checkpoint is there \({mark}.*: checkpoint-3\."
    ):
        resume(tmp_path, str(tmp_path / "checkpoint-5"), {}, mark)
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("asked", [None, "true", "by name"])
def test_other_settings_are_refused_by_name_unless_they_are_free_or_named(
    tmp_path: Path, mark: str, asked: str | None
) -> None:
    wanted = str(tmp_path / "checkpoint-3")
    asked = wanted if asked == "by name" else asked
    before = {"learning_rate": 0.1, "seed": 1, "report_to": "none", "save_steps": 5, "max_steps": 9}
    leave(tmp_path, mark, 3, finished=False, settings=before)
    free = {**before, "report_to": "wandb", "save_steps": 7, "logging_steps": 2, "max_steps": 20}
    assert resume(tmp_path, asked, free, mark) == wanted
    other = {**before, "learning_rate": 0.2, "kl_coef": 0.3}
    message = r"other settings \(kl_coef was None, is 0\.3; learning_rate was 0\.1, is 0\.2\).*--resume_with_changes kl_coef learning_rate;"
    with pytest.raises(UsageError, match=message):
        resume(tmp_path, asked, other, mark)
    with pytest.raises(UsageError, match=r"other settings \(kl_coef was None, is 0\.3\)\."):
        resume(tmp_path, asked, other, mark, "learning_rate")
    # What did not run is not written down, and nothing is lost.
    assert json.loads((tmp_path / "settings.json").read_text()) == free
    assert names(tmp_path) == ["checkpoint-3", "settings.json"]
    assert resume(tmp_path, asked, other, mark, "learning_rate", "kl_coef") == wanted
    assert json.loads((tmp_path / "settings.json").read_text()) == other
    assert resume(tmp_path, asked, other, mark, "learning_rate", "kl_coef") == wanted


def test_what_the_state_of_the_optimiser_is_bound_to_cannot_be_named(tmp_path: Path, mark: str) -> None:
    before = {"optim": "adamw_torch", "backend": "replicated", "learning_rate": 0.1}
    leave(tmp_path, mark, 3, finished=False, settings=before)
    for name in ("optim", "backend"):
        with pytest.raises(UsageError, match=rf"cannot go on with this: {name} was '\w+', is 'other'\."):
            resume(tmp_path, None, {**before, name: "other"}, mark, name)
    greedy = {**before, "lr_scheduler_type": "greedy"}
    leave(tmp_path, mark, finished=False, settings=greedy)
    with pytest.raises(UsageError, match=r"cannot go on with this: learning_rate was 0\.1, is 0\.2\."):
        resume(tmp_path, None, {**greedy, "learning_rate": 0.2}, mark, "learning_rate")


def test_a_name_that_nothing_has_is_refused_with_the_nearest(tmp_path: Path, mark: str) -> None:
    leave(tmp_path, mark, 3, finished=False, settings={"learning_rate": 0.1})
    with pytest.raises(
        UsageError, match=r"nothing is called `learning_rat`\. Did you mean `learning_rate`\?"
    ):
        resume(tmp_path, None, {"learning_rate": 0.2}, mark, "learning_rat")


def test_a_setting_is_free_or_fixed_but_not_both() -> None:
    assert not FREE & FIXED
