"""A rollout that fails in the middle of a run: what is learnt is saved, the error is told, and the run goes on as if nothing had been."""

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy

from tieback.cli.errors import UsageError
from tieback.pipeline.resume import whole_checkpoints
from tieback.pipeline.rollout.random_state import random_state
from tieback.pipeline.trainer import PPOTrainer
from tieback.pipeline.trainer.checkpoints import STATE_FILE

STEPS = 4


def restless_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Draws random numbers, as a judge may: they too must be those of the run that did not fail."""
    noise = random.random() + np.random.random() + float(torch.rand(()))
    return [score + noise for score in toy.id_reward(completion_ids)]


def failing_at(call: int, function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    """The function, of which the call of that number, counted from 1, raises once its work is done."""
    calls = 0

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = function(*args, **kwargs)
        if calls == call:
            raise error
        return result

    return wrapped


def run(folder: Path, reward: Any = restless_reward, **settings: Any) -> PPOTrainer:
    return toy.ppo_trainer(folder, reward, max_steps=STEPS, **settings)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    trainer = run(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return toy.weights(trainer.model)


def break_sampler(trainer: PPOTrainer) -> None:
    # The first call is the comparison with scoring; the fourth is the third rollout.
    trainer.sampler.sample = failing_at(4, trainer.sampler.sample, RuntimeError("the engine broke"))  # type: ignore[method-assign]


def break_judge_at(call: int, trainer: PPOTrainer) -> None:
    (scorer,) = trainer.scorers
    trainer.scorers = [failing_at(call, scorer, RuntimeError("the judge broke"))]


def break_judge(trainer: PPOTrainer) -> None:
    break_judge_at(3, trainer)


@pytest.mark.parametrize("broken", [break_sampler, break_judge])
def test_what_was_learnt_is_saved_and_the_run_goes_on_to_the_same_weights(
    tmp_path: Path, broken: Callable[[PPOTrainer], None], uninterrupted: dict[str, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trainer = run(tmp_path)  # which saves nothing by itself
    broken(trainer)
    with pytest.raises((RuntimeError, UsageError), match="broke"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert [folder.name for folder in whole_checkpoints(tmp_path, STATE_FILE)] == ["checkpoint-2"]
    assert (
        f"The rollout failed; {tmp_path / 'checkpoint-2'} has all that came before it."
        in capsys.readouterr().err
    )

    trainer = run(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    for name, weight in toy.weights(trainer.model).items():
        assert torch.equal(weight, uninterrupted[name]), name


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    trainer = run(tmp_path, save_strategy="steps", save_steps=2)
    break_judge(trainer)
    with pytest.raises(UsageError, match="the judge broke"):
        trainer.train()
    state = tmp_path / "checkpoint-2" / STATE_FILE
    before = state.stat().st_mtime_ns
    trainer = run(tmp_path, save_strategy="steps", save_steps=2)
    break_judge_at(1, trainer)
    with pytest.raises(UsageError, match="the judge broke"):
        trainer.train(resume_from_checkpoint=True)
    assert state.stat().st_mtime_ns == before


def test_before_the_first_update_there_is_nothing_to_save(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    break_judge_at(1, trainer)
    with pytest.raises(UsageError, match="the judge broke"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_where_nothing_can_be_saved_the_first_error_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = run(tmp_path)
    break_judge(trainer)

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(trainer, "_save_checkpoint", full)
    with pytest.raises(UsageError, match="the judge broke"):
        trainer.train()
    assert "No checkpoint could be saved (OSError: no space left on device)." in capsys.readouterr().err


def test_random_numbers_go_on_from_where_they_stood() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.random()), float(torch.rand(()))]

    restore = random_state(torch.device("cpu"))
    first = draw()
    draw()
    restore()
    assert draw() == first
