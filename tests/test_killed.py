"""Killed at any moment, saving included, and started again: the end is that of the uninterrupted run, bit for bit."""

import contextlib
import io
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import launching
import psutil
import pytest
import torch
import toy
from safetensors.torch import load_file

from tieback.pipeline import ppo
from tieback.pipeline.resume import whole_checkpoints
from tieback.pipeline.trainer.checkpoints import STATE_FILE

# How often a run is killed: one process without a launcher, and two under each configuration.
KILLS = {"alone": 20, "multi_gpu": 8, "zero2": 8, "zero3": 8, "fsdp2": 8}
# Appends a line to a file, by which the test knows that an iteration has begun.
REWARD = """\
import os

def noted(completions, target, **columns):
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(".")
    return [len(text[0]["content"]) / 10 + len(word) / 10 for text, word in zip(completions, target)]
"""


@pytest.fixture(autouse=True)
def as_many_threads_as_the_runs_that_are_killed() -> Iterator[None]:
    """Sums over several threads differ in their last bits from those of one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# What a run has left.


def end_of(folder: Path) -> dict[str, Any]:
    """Every number in the folder of a run that came to its end, but for its seconds."""
    (last,) = whole_checkpoints(folder, STATE_FILE)[-1:]
    metrics = toy.without_measurements(json.loads((folder / "metrics.json").read_text()))
    state = json.loads((last / STATE_FILE).read_text())
    files = {name for name in state.pop("files") if not name.endswith(("training_args.bin", ".py", ".json"))}
    log = json.loads((folder / "trainer_state.json").read_text())
    return {
        "policy": load_file(folder / "model.safetensors"),
        "critic": load_file(folder / "value_model" / "model.safetensors"),
        "checkpoint": {name: content_of(last / name) for name in sorted(files)},
        "state": state,
        "metrics": metrics,
        "step": log["global_step"],
        "log": [toy.without_measurements(entry) for entry in log["log_history"]],
    }


def content_of(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        return torch.load(path, weights_only=False)
    return path.read_bytes()


def assert_same(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_same(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{where}/{place}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif hasattr(one, "tolist"):
        assert one.tolist() == other.tolist(), where
    elif not hasattr(one, "__dict__"):
        assert one == other, where


def newest(folder: Path) -> int:
    """Number of the newest whole checkpoint; 0 for none."""
    whole = whole_checkpoints(folder, STATE_FILE)
    return int(whole[-1].name.split("-")[1]) if whole else 0


# Killed from outside, at random moments.


class Run:
    """The stage ppo in a folder, as one command that is given again and again."""

    def __init__(self, home: Path, backend: str, name: str) -> None:
        self.folder = home / name / "ppo"
        self.calls = home / f"{name}.calls"
        batch = ["--per_device_train_batch_size", "8" if backend == "alone" else "4"]
        self.arguments = [
            "--run_dir",
            str(home / name),
            *batch,
            *(["--use_cpu"] if backend == "alone" else []),
        ]
        arguments = ["--config", str(home / "ppo.yaml"), *self.arguments]
        self.home, self.backend = home, backend
        if backend == "alone":
            self.command = [sys.executable, ppo.__file__, *arguments]
        else:
            config = launching.write_config(
                home, backend, **({"use_cpu": True} if backend == "multi_gpu" else {})
            )
            self.command = launching.command(config, ppo.__file__, *arguments)

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command,
            cwd=self.home,
            env=launching.environment(CALLS=str(self.calls)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def iterations(self) -> int:
        return self.calls.stat().st_size if self.calls.exists() else 0

    def finish(self) -> str:
        """Let it come to its end; one process alone in this one, which has imported everything."""
        if self.backend == "alone":
            output = io.StringIO()
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
                patch.setenv("CALLS", str(self.calls))
                toy.run_ppo(self.home, *self.arguments)
            return output.getvalue()
        process = self.start()
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return output

    def kill_after(self, seconds: Callable[[], float]) -> bool:
        """Start it and kill all of its processes some time into an iteration; whether it had not ended before."""
        before = self.iterations()
        process = self.start()
        deadline = time.monotonic() + 180
        while self.iterations() == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(seconds())
        whole = newest(self.folder)
        alive = process.poll() is None
        if alive:
            kill_all(process.pid)
        output, _ = process.communicate(timeout=60)
        assert alive or process.returncode == 0, output
        # Never one lost.
        assert newest(self.folder) >= whole
        return alive


def kill_all(pid: int) -> None:
    """SIGKILL to a process and all that it has started (torchrun gives each worker a group of its own)."""
    root = psutil.Process(pid)
    processes = [root, *root.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have come to its end since
            process.kill()
    psutil.wait_procs(processes[1:], timeout=30)


def killed_and_finished(tmp_path: Path, backend: str, kills: int, seed: int) -> None:
    toy.write_ppo_home(tmp_path, max_steps=kills + 3, reward_funcs=[str(tmp_path / "reward"), "noting:noted"])
    (tmp_path / "noting.py").write_text(REWARD)
    straight, killed = Run(tmp_path, backend, "straight"), Run(tmp_path, backend, "killed")
    straight.finish()
    state = json.loads((straight.folder / "trainer_state.json").read_text())
    steps = [path.stat().st_mtime for path in whole_checkpoints(straight.folder, STATE_FILE)]
    # From the beginning of an iteration's scoring to the middle of the next one, its saving between them.
    duration = 1.5 * (steps[-1] - steps[-2])
    moments = random.Random(seed)
    done = 0
    for _ in range(kills):
        if not killed.kill_after(lambda: moments.uniform(0, duration)):
            break
        done += 1
    assert done >= min(kills, 2) - (kills > 1), "it ended before it was killed"
    expected = newest(killed.folder)
    output = killed.finish() if not (killed.folder / "metrics.json").exists() else ""
    if output and expected:
        assert f"checkpoint-{expected}, where this run was interrupted" in output
    assert state["global_step"] == kills + 3
    assert_same(end_of(killed.folder), end_of(straight.folder))


@pytest.mark.slow
def test_killed_once_in_one_process(tmp_path: Path) -> None:
    killed_and_finished(tmp_path, "alone", 1, seed=0)


@pytest.mark.backends
@pytest.mark.slow
def test_killed_once_with_its_models_sharded(tmp_path: Path) -> None:
    killed_and_finished(tmp_path, "fsdp2", 1, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", KILLS)
def test_killed_at_random_moments(tmp_path: Path, backend: str) -> None:
    killed_and_finished(tmp_path, backend, KILLS[backend], seed=list(KILLS).index(backend))
