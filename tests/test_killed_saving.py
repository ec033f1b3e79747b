"""Killed before, and in the middle of, each single file operation of a save: no checkpoint is lost, no torn one is taken."""

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import toy
import transformers.modeling_utils

from tieback.pipeline.trainer import PPOTrainer
from tieback.pipeline.trainer.checkpoints import resolve_checkpoint

SETTINGS: dict[str, Any] = {
    "max_steps": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 1,
    "kl_target": 0.4,
    "kl_horizon": 40,
    "normalize_rewards": True,
}


def end_of(trainer: PPOTrainer) -> dict[str, Any]:
    return {
        "weights": toy.weights(trainer.model),
        "optimizer": trainer.optimizer.state_dict(),
        "kl": trainer.kl_controller.state_dict(),
        "moments": trainer.reward_moments.state_dict(),
        "torch": torch.get_rng_state(),
        "logs": toy.iteration_logs(trainer),
    }


class Killer:
    """Ends this process by SIGKILL at its n-th chance from now on.

    Chances are: before each file that Python opens to write, moves, removes or makes a folder of; after such a file was
    opened and nothing written; and when half of a file of PyTorch or safetensors, which write past Python, is there.
    """

    def __init__(self, chance: int, folder: Path) -> None:
        self.left = chance
        self.folder = str(folder)
        sys.addaudithook(self._on_event)
        for module, name in ((torch, "save"), (transformers.modeling_utils, "safe_save_file")):
            setattr(module, name, self._torn(getattr(module, name)))

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            self._maybe_kill()
        elif event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR)
            if isinstance(path, str | os.PathLike) and str(path).startswith(self.folder) and writes:
                self._maybe_kill()
                self._maybe_kill(lambda: Path(path).write_bytes(b""))

    def _torn(self, save: Callable[..., Any]) -> Callable[..., Any]:
        def torn(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            save(content, path, *args, **kwargs)
            self._maybe_kill(lambda: os.truncate(path, Path(path).stat().st_size // 2))

        return torn

    def _maybe_kill(self, tear: Callable[[], object] = lambda: None) -> None:
        self.left -= 1
        if self.left == 0:
            tear()
            self._kill()

    def _kill(self) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("alive")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], dict[int, Path], dict[str, Any]]:
    """The folders that a kill at each chance of the second save leaves, what the checkpoints are whole, and the end."""
    home = tmp_path_factory.mktemp("killed")
    run, before = home / "run", home / "before"
    folders: list[Path] = []
    whole: dict[int, Path] = {}
    trainer = toy.ppo_trainer(run, **SETTINGS)
    own_save = trainer._save_checkpoint

    def save(model: Any, trial: Any) -> None:
        if trainer.state.global_step == 2:
            shutil.copytree(run, before)
            status, drawn = signal.SIGKILL, random.getstate()
            while status == signal.SIGKILL:
                child = os.fork()
                if child == 0:
                    random.setstate(drawn)  # of which Python makes a new one in every child
                    Killer(len(folders) + 1, run)
                    own_save(model, trial)
                    os._exit(0)
                status = signal.Signals(os.waitpid(child, 0)[1] or signal.SIGTERM)
                folders.append(home / f"killed{len(folders) + 1}")
                shutil.move(run, folders[-1])
                shutil.copytree(before, run)
            assert status == signal.SIGTERM  # the last child came to the end of its save
            whole.update({1: before / "checkpoint-1", 2: folders[-1] / "checkpoint-2"})
        own_save(model, trial)

    trainer._save_checkpoint = save  # type: ignore[method-assign]
    trainer.train()
    return folders, whole, end_of(trainer)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_whole_checkpoint_is_there_at_any_moment_and_it_alone_is_taken(
    killed: tuple[list[Path], dict[int, Path], dict[str, Any]],
) -> None:
    folders, whole, _ = killed
    assert len(folders) > 40
    taken = []
    for folder in folders:
        checkpoint = resolve_checkpoint(folder, True)
        assert checkpoint is not None, folder
        taken.append(int(checkpoint[-1]))
        assert contents(Path(checkpoint)) == contents(whole[taken[-1]]), folder
    # The old one until the new one is whole, and then the new one, while the old one is being removed.
    assert taken == sorted(taken)
    assert taken.count(2) > 10


def resume_and_compare(folder: Path, copy: Path, end: dict[str, Any]) -> None:
    shutil.copytree(folder, copy)
    resumed = toy.ppo_trainer(copy, **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    torch.testing.assert_close(end_of(resumed), end, rtol=0, atol=0)
    assert [path.name for path in copy.glob("checkpoint-*")] == ["checkpoint-3"]
    resolve_checkpoint(copy, True)


@pytest.mark.parametrize("share", range(8))
def test_the_same_run_goes_on_from_what_a_kill_has_left(
    killed: tuple[list[Path], dict[int, Path], dict[str, Any]], tmp_path: Path, share: int
) -> None:
    folders, _, end = killed
    folder = folders[share * (len(folders) - 1) // 7]
    resume_and_compare(folder, tmp_path / "run", end)


@pytest.mark.slow
def test_the_same_run_goes_on_from_what_any_kill_has_left(
    killed: tuple[list[Path], dict[int, Path], dict[str, Any]], tmp_path: Path
) -> None:
    folders, _, end = killed
    for folder in folders:
        resume_and_compare(folder, tmp_path / folder.name, end)
