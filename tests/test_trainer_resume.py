"""Checkpoints: a resumed run ends bit for bit as the uninterrupted one, and a torn or damaged one is never resumed."""

import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from safetensors.torch import load_file
from transformers import Trainer

from tieback.pipeline.resume import whole_checkpoints
from tieback.pipeline.scorers import RewardError
from tieback.pipeline.trainer import PPOTrainer
from tieback.pipeline.trainer.checkpoints import STATE_FILE, CheckpointError, resolve_checkpoint


def trainer(folder: Path, reward: Any = toy.id_reward, **settings: Any) -> PPOTrainer:
    """Six iterations over three epochs, with everything that has a state, and a checkpoint after each."""
    defaults = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 1,
        "kl_target": 0.4,
        "kl_horizon": 40,
        "normalize_rewards": True,
        "critic_learning_rate": 2e-2,
        "critic_warmup_iterations": 2,
        "weight_decay": 0.01,
    }
    return toy.ppo_trainer(folder, reward, **(defaults | settings))


def state_of(run: PPOTrainer) -> dict[str, Any]:
    """All that a run is at its end."""
    numpy_state = np.random.get_state()
    return {
        "weights": toy.weights(run.model),
        "optimizer": run.optimizer.state_dict(),
        "learning rates": run.lr_scheduler.get_last_lr(),
        "kl": run.kl_controller.state_dict(),
        "moments": run.reward_moments.state_dict(),
        "torch": torch.get_rng_state(),
        "numpy": [numpy_state[1].tolist(), numpy_state[2]],
        "python": list(random.getstate()[1]),
        "rollout": run._last_rollout.rollout.completion_ids,
        "prompts": [str(prompt) for prompt in run._last_rollout.rollout.prompts],
        "step": run.state.global_step,
        "log": [toy.without_measurements(entry) for entry in run.state.log_history],
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run: its folder and its end."""
    folder = tmp_path_factory.mktemp("straight")
    run = trainer(folder)
    run.train()
    return folder, state_of(run)


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_resumed_run_ends_as_the_straight_one_bit_for_bit(
    tmp_path: Path, straight: tuple[Path, dict[str, Any]], step: int
) -> None:
    folder, expected = straight
    resumed = trainer(tmp_path)
    # What a new process would have drawn by now is another number.
    torch.rand(3), np.random.rand(3), random.random()
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    end = state_of(resumed)
    assert end["step"] == 6
    assert expected["kl"]["value"] != 0.05
    assert expected["moments"]["count"] == 48
    for name in ("weights", "optimizer", "torch"):
        torch.testing.assert_close(end.pop(name), expected[name], rtol=0, atol=0)
    assert end == {name: expected[name] for name in end}


def test_a_run_that_was_killed_after_its_last_checkpoint_takes_no_step_too_many(tmp_path: Path) -> None:
    """In the middle of an epoch, where Trainer would go on to the next batch."""
    trained = trainer(tmp_path, max_steps=3)
    trained.train()
    for max_steps in (3, 2):
        resumed = trainer(tmp_path, max_steps=max_steps)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 3
        assert toy.iteration_logs(resumed) == toy.iteration_logs(trained)
        torch.testing.assert_close(toy.weights(resumed.model), toy.weights(trained.model), rtol=0, atol=0)
        assert resumed.reward_moments.state_dict() == trained.reward_moments.state_dict()


def test_the_checkpoint_holds_critic_optimiser_coefficient_and_reward_statistics(
    straight: tuple[Path, dict[str, Any]],
) -> None:
    folder, expected = straight
    last = folder / "checkpoint-6"
    saved = json.loads((last / "ppo_state.json").read_text())
    files, identity = saved.pop("files"), saved.pop("identity")
    assert identity["settings"]["learning_rate"] == 1e-2
    assert identity["inputs"]["reward_funcs"] == ["toy:id_reward"]
    assert set(saved.pop("critic_warmup")) == {"best", "without_rise"}
    assert saved == {"kl": expected["kl"], "reward_moments": expected["moments"]}
    assert {"model.safetensors", "value_model/model.safetensors", "optimizer.pt", "rng_state.pth"} <= set(
        files
    )
    critic = load_file(last / "value_model" / "model.safetensors")
    for name, tensor in critic.items():
        assert torch.equal(tensor, expected["weights"][f"critic.{name}"]), name


# Checkpoints that must not be resumed from.


def copy_of(folder: Path, destination: Path, *steps: int) -> Path:
    for step in steps:
        shutil.copytree(folder / f"checkpoint-{step}", destination / f"checkpoint-{step}")
    return destination


def test_a_torn_checkpoint_is_passed_over_by_true(
    tmp_path: Path, straight: tuple[Path, dict[str, Any]]
) -> None:
    copy_of(straight[0], tmp_path, 2, 4)
    (tmp_path / "checkpoint-4" / "ppo_state.json").unlink()
    assert resolve_checkpoint(tmp_path, True) == str(tmp_path / "checkpoint-2")
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    torch.testing.assert_close(toy.weights(resumed.model), straight[1]["weights"], rtol=0, atol=0)


def test_true_without_any_whole_checkpoint_starts_at_the_beginning(
    tmp_path: Path, straight: tuple[Path, dict[str, Any]]
) -> None:
    run = trainer(tmp_path)
    run.train(resume_from_checkpoint=True)
    torch.testing.assert_close(toy.weights(run.model), straight[1]["weights"], rtol=0, atol=0)


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for number in (9, 10, 100, 2):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "ppo_state.json").write_text("{}")
    (tmp_path / "checkpoint-200").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert [folder.name for folder in whole_checkpoints(tmp_path, STATE_FILE)] == [
        f"checkpoint-{number}" for number in (2, 9, 10, 100)
    ]


def test_a_torn_or_missing_checkpoint_named_by_the_user_is_refused_with_the_whole_ones(
    tmp_path: Path, straight: tuple[Path, dict[str, Any]]
) -> None:
    copy_of(straight[0], tmp_path, 2, 4)
    (tmp_path / "checkpoint-4" / "ppo_state.json").unlink()
    run = trainer(tmp_path)
    for name in ("checkpoint-4", "checkpoint-7"):
        with pytest.raises(
            CheckpointError,
            match=rf"{name} is not a whole checkpoint.*lacks ppo_state\.json.*: checkpoint-2\.",
        ):
            run.train(resume_from_checkpoint=str(tmp_path / name))


@pytest.mark.parametrize("damaged", ["model.safetensors", "value_model/model.safetensors", "optimizer.pt"])
@pytest.mark.parametrize(
    ("damage", "message"), [("cut", r"has \d+ bytes instead of \d+"), ("missing", "is missing")]
)
def test_a_checkpoint_copied_in_part_is_refused_by_file(
    tmp_path: Path, straight: tuple[Path, dict[str, Any]], damaged: str, damage: str, message: str
) -> None:
    path = copy_of(straight[0], tmp_path, 2) / "checkpoint-2" / damaged
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        path.unlink()
    run = trainer(tmp_path)
    for resume in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(
            CheckpointError, match=rf"checkpoint-2 is damaged: {damaged} {message}.*Delete that folder"
        ):
            run.train(resume_from_checkpoint=resume)
    assert run.state.global_step == 0


@pytest.mark.parametrize("damaged", ["model.safetensors", "value_model/model.safetensors"])
def test_weights_damaged_on_the_disk_are_refused(
    tmp_path: Path, straight: tuple[Path, dict[str, Any]], damaged: str
) -> None:
    path = copy_of(straight[0], tmp_path, 2) / "checkpoint-2" / damaged
    content = path.read_bytes()
    path.write_bytes(b"\0" * 16 + content[16:])
    run = trainer(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"weights in .*checkpoint-2 cannot be loaded.*Delete that folder"
    ):
        run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 0


def test_checkpoints_of_models_alone_are_refused(tmp_path: Path) -> None:
    trainer(tmp_path, save_only_model=True, max_steps=2).train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
    with pytest.raises(CheckpointError, match=r"not a whole checkpoint.*save_only_model"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resolve_checkpoint(tmp_path, True) is None


def test_a_checkpoint_being_written_over_is_not_whole_meanwhile(
    tmp_path: Path, straight: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of(straight[0], tmp_path, 1)
    run = trainer(tmp_path)

    def killed(*_: Any) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(run, "_save_rng_state", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run.train()
    assert whole_checkpoints(tmp_path, STATE_FILE) == []


# Which checkpoints stay.


def test_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    trainer(tmp_path, save_total_limit=2).train()
    assert [folder.name for folder in whole_checkpoints(tmp_path, STATE_FILE)] == [
        "checkpoint-5",
        "checkpoint-6",
    ]
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_a_checkpoint_says_how_many_are_kept_and_a_failure_to_save_does_not_forget_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = trainer(tmp_path, save_total_limit=2)
    trained.train()
    saved = json.loads((whole_checkpoints(tmp_path, STATE_FILE)[-1] / "ppo_config.json").read_text())
    assert saved["save_total_limit"] == 2

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Trainer, "_save_checkpoint", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trained._save_checkpoint(trained.model, None)
    assert trained.args.save_total_limit == 2


def test_the_best_checkpoint_stays_too_and_is_what_remains_at_the_end(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        save_total_limit=2,
        eval_dataset=toy.prompts(3),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="kl/ref",
        greater_is_better=False,
        critic_warmup_iterations=0,
    )
    run.train()
    # The KL was least after the first iteration, or whichever the log says.
    entries = [entry for entry in run.state.log_history if "eval_kl/ref" in entry]
    best = min(entries, key=lambda entry: entry["eval_kl/ref"])["step"]
    assert best < 6
    assert {folder.name for folder in whole_checkpoints(tmp_path, STATE_FILE)} == {
        f"checkpoint-{best}",
        "checkpoint-6",
    }
    saved = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(run.model.policy.get_parameter(name), tensor), name


# Signals.


@pytest.fixture
def handlers() -> Iterator[list[Any]]:
    """The handlers of SIGINT and SIGTERM, which a run must leave as they were."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_iteration_with_a_checkpoint_and_the_same_trainer_goes_on(
    tmp_path: Path, straight: tuple[Path, dict[str, Any]], number: int
) -> None:
    calls = [0]

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), number)
        return toy.id_reward(completion_ids)

    reward.__name__ = "id_reward"
    run = trainer(tmp_path, reward, save_steps=100)
    run.train()
    assert run.interrupt.interrupted
    assert run.state.global_step == 3
    assert [folder.name for folder in whole_checkpoints(tmp_path, STATE_FILE)] == ["checkpoint-3"]
    run.train(resume_from_checkpoint=True)
    assert not run.interrupt.interrupted
    torch.testing.assert_close(toy.weights(run.model), straight[1]["weights"], rtol=0, atol=0)


@pytest.mark.usefixtures("handlers")
def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")

    run = trainer(tmp_path, reward)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.usefixtures("handlers")
def test_an_error_gives_the_signals_back(tmp_path: Path) -> None:
    with pytest.raises(RewardError):
        trainer(tmp_path, lambda **_: None).train()
