"""pipeline/ppo.py stopped in its middle by ctrl-C and by a kill, and started again by the same command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from safetensors.torch import load_file

from tieback.pipeline import ppo
from tieback.pipeline.resume import whole_checkpoints
from tieback.pipeline.trainer.checkpoints import STATE_FILE

STEPS = 7


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    toy.write_ppo_home(folder, max_steps=STEPS)
    return folder


def run_here(home: Path, run: str) -> Path:
    """Run the stage to its end in this process, and give its folder."""
    toy.run_ppo(home, "--run_dir", str(home / run), "--use_cpu")
    return home / run / "ppo"


def stopped(home: Path, run: str, number: signal.Signals) -> tuple[int, str]:
    """Start the stage in a process of its own, send it a signal after its second checkpoint, and see it end."""
    process = subprocess.Popen(
        [
            sys.executable,
            ppo.__file__,
            "--config",
            str(home / "ppo.yaml"),
            "--run_dir",
            str(home / run),
            "--use_cpu",
        ],
        cwd=home,
        env={**os.environ, "SECONDS_A_REWARD": "0.2", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    mark = home / run / "ppo" / "checkpoint-2" / "ppo_state.json"
    deadline = time.monotonic() + 180
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def end_of(folder: Path) -> dict[str, Any]:
    """What a run has left, but for its seconds."""
    metrics = toy.without_measurements(json.loads((folder / "metrics.json").read_text()))
    last = folder / f"checkpoint-{STEPS}"
    state = json.loads((last / "ppo_state.json").read_text())
    return {
        "policy": load_file(folder / "model.safetensors"),
        "critic": load_file(folder / "value_model" / "model.safetensors"),
        "optimizer": torch.load(last / "optimizer.pt")["state"],
        "rng": torch.load(last / "rng_state.pth", weights_only=False)["cpu"],
        "kl": state["kl"],
        "moments": state["reward_moments"],
        "metrics": metrics,
    }


@pytest.fixture(scope="module")
def straight(home: Path) -> dict[str, Any]:
    return end_of(run_here(home, "straight"))


def test_a_run_to_its_end_leaves_models_and_figures(home: Path, straight: dict[str, Any]) -> None:
    assert straight["metrics"]["train/iterations"] == STEPS
    assert straight["metrics"]["num_prompts/train"] == 24
    assert straight["moments"]["count"] == 8 * STEPS
    assert {"reward/reward_model", "reward/slow", "reward/mean", "kl/ref", "policy/entropy"} <= set(
        straight["metrics"]
    )
    start = load_file(home / "sft" / "model.safetensors")
    assert not torch.equal(straight["policy"]["model.norm.weight"], start["model.norm.weight"])


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_ends_with_the_weights_of_the_uninterrupted_run(
    home: Path, straight: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = stopped(home, "ctrl-c", signal.SIGINT)
    assert code == 130, output
    newest = whole_checkpoints(home / "ctrl-c" / "ppo", STATE_FILE)[-1]
    done = int(newest.name.split("-")[1])
    assert 2 <= done < STEPS
    assert f"Stopped after step {done} of {STEPS}; the same command goes on." in output
    assert not (home / "ctrl-c" / "ppo" / "metrics.json").exists()
    end = end_of(run_here(home, "ctrl-c"))
    assert f"Going on from {newest}, where this run was interrupted" in capsys.readouterr().out
    torch.testing.assert_close(end, straight, rtol=0, atol=0)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_of_the_uninterrupted_run(
    home: Path, straight: dict[str, Any]
) -> None:
    code, output = stopped(home, "killed", signal.SIGKILL)
    assert code == -signal.SIGKILL, output
    assert whole_checkpoints(home / "killed" / "ppo", STATE_FILE)
    assert not (home / "killed" / "ppo" / "model.safetensors").exists()
    end = end_of(run_here(home, "killed"))
    torch.testing.assert_close(end, straight, rtol=0, atol=0)
