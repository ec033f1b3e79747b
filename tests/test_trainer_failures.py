"""A rollout that fails in the middle of a run: what is learnt is saved, the error is told, and the run goes on as if nothing had been."""

import asyncio
import functools
import random
import signal
import subprocess
import sys
import threading
import time
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
from tieback.pipeline.trainer.judges import Judges
from tieback.pipeline.trainer.time_limit import time_limit

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


def break_evaluation(trainer: PPOTrainer) -> None:
    (scorer,) = trainer.scorers
    trainer.judges = Judges(failing_at(2, scorer, RuntimeError("the judge broke")), 5)  # type: ignore[arg-type]


def evaluated() -> dict[str, Any]:
    return {"eval_dataset": toy.prompts(5), "eval_strategy": "steps", "eval_steps": 1}


@pytest.mark.parametrize(
    ("broken", "settings"), [(break_sampler, dict), (break_judge, dict), (break_evaluation, evaluated)]
)
def test_what_was_learnt_is_saved_and_the_run_goes_on_to_the_same_weights(
    tmp_path: Path, broken: Callable[[PPOTrainer], None], settings: Callable[[], dict[str, Any]],
    uninterrupted: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trainer = run(tmp_path, **settings())  # which saves nothing by itself
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


# What never answers.

LIMIT = 3.0


def never_slept_out(*_: Any, **__: Any) -> Any:
    time.sleep(600)


def trying_for_ever(*_: Any, **__: Any) -> Any:
    """Takes the error by which it is to be broken off for one of those after which it tries again."""
    while True:
        try:
            threading.Event().wait()
        except Exception:
            continue


async def never_awaited(*_: Any, **__: Any) -> Any:
    await asyncio.sleep(600)


def with_an_alarm_of_its_own(*_: Any, **__: Any) -> Any:
    """As the judges of mathematics have, which give up on an expression after some seconds."""
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.alarm(600)
    signal.alarm(0)
    time.sleep(600)


@pytest.mark.slow
def test_a_sampler_that_hangs_is_one_that_fails(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    trainer = run(tmp_path, rollout_timeout=LIMIT)
    sample, calls = trainer.sampler.sample, 0

    def hanging(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return never_slept_out() if calls == 4 else sample(*args, **kwargs)

    trainer.sampler.sample = hanging  # type: ignore[method-assign]
    line = f"{__file__}:{never_slept_out.__code__.co_firstlineno + 1} in never_slept_out"
    with pytest.raises(
        UsageError,
        match=rf"^The sampler \(transformers\) did not answer within rollout_timeout=3 seconds; it stood at {line}\.",
    ):
        trainer.train()
    assert [folder.name for folder in whole_checkpoints(tmp_path, STATE_FILE)] == ["checkpoint-2"]
    trainer = run(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    for name, weight in toy.weights(trainer.model).items():
        assert torch.equal(weight, uninterrupted[name]), name


@pytest.mark.slow
def test_a_sampler_that_hangs_when_it_is_first_asked_is_noticed_too(tmp_path: Path) -> None:
    trainer = run(tmp_path, rollout_timeout=LIMIT)
    trainer.sampler.sample = never_slept_out  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=r"^The sampler \(transformers\) did not answer within"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.slow
@pytest.mark.parametrize("judge", [trying_for_ever, never_awaited, with_an_alarm_of_its_own])
def test_a_judge_that_hangs_is_broken_off_whatever_it_waits_in(tmp_path: Path, judge: Any) -> None:
    trainer = run(tmp_path, judge, rollout_timeout=LIMIT)
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(
        UsageError, match=r"^Reward functions did not answer within rollout_timeout=3 seconds"
    ):
        trainer.train()
    assert signal.getsignal(signal.SIGVTALRM) is before


def test_what_ends_in_time_leaves_no_limit_behind() -> None:
    threads = threading.active_count()
    with time_limit(0.2, "The block", "seconds"):
        pass
    assert threading.active_count() == threads
    time.sleep(0.4)  # past the limit


def test_a_limit_holds_in_the_main_thread_alone() -> None:
    ended = []

    def block() -> None:
        with time_limit(0.05, "The block", "seconds"):
            time.sleep(0.3)
        ended.append(True)

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert ended == [True]


HANGING_IN_C = """
import ctypes
from tieback.pipeline.trainer import time_limit

time_limit._GRACE_SECONDS = 0.5
lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
with time_limit.time_limit(0.5, "The engine", "rollout_timeout"):
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)
"""


@pytest.mark.slow
def test_what_hangs_in_foreign_code_ends_the_process_with_its_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", HANGING_IN_C], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert 'File "<string>", line 9 in <module>' in done.stderr


def test_random_numbers_go_on_from_where_they_stood() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.random()), float(torch.rand(()))]

    restore = random_state(torch.device("cpu"))
    first = draw()
    draw()
    restore()
    assert draw() == first
