"""Two processes: one raises, dies or is slow; both are told to stop; each is on a machine of its own."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import launching
import psutil
import pytest
import torch
import toy
from safetensors.torch import load_file

from tieback.cli import processes
from tieback.cli.errors import UsageError, run
from tieback.pipeline import collect, evaluate, ppo, reward, sft
from tieback.pipeline.resume import whole_checkpoints
from tieback.pipeline.trainer.checkpoints import STATE_FILE

pytestmark = pytest.mark.backends

STEPS = 4

# What the second process does when it is to judge the third batch, and the first one meanwhile.
JUDGE = """\
import os, signal, time
import torch

calls = 0

def judge(completions, **columns):
    global calls
    calls += 1
    trouble, first = os.environ.get("TROUBLE", ""), os.environ["RANK"] == "0"
    if calls == 3:
        if first and trouble == "dies":
            # In C++, where no Python runs, and in no collective operation that would fail.
            torch.linalg.matrix_power(torch.eye(3000), 2**60)
        elif first:
            pass
        elif trouble == "raises":
            raise ValueError("the judge broke down")
        elif trouble == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        elif trouble == "slow":
            time.sleep(float(os.environ["SECONDS"]))
    return [float(len(text[0]["content"])) for text in completions]
"""


class End(NamedTuple):
    """How a run ended."""

    status: int
    seconds: float  # after the trouble began
    screen: str


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    toy.write_ppo_home(
        folder, max_steps=STEPS, reward_funcs=["judge:judge"], critic_init="policy", normalize_rewards=False
    )
    (folder / "judge.py").write_text(JUDGE)
    return folder


def start(home: Path, name: str, config: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    """Start PPO by a configuration; all that it prints goes to `<home>/<name>.log`."""
    command = launching.command(config, ppo.__file__, "--config", str(home / "ppo.yaml"), *options)
    with (home / f"{name}.log").open("a") as log:
        return subprocess.Popen(
            [*command, "--run_dir", str(home / name)],
            cwd=home,
            env=launching.environment(**environment),
            stdout=log,
            stderr=log,
            text=True,
        )


def two_processes(home: Path, config: str = "multi_gpu") -> Path:
    """A configuration of two processes on this machine."""
    return launching.write_config(home, config, **({"use_cpu": True} if config.startswith("multi") else {}))


def wait_for_checkpoint(home: Path, name: str, step: int, process: subprocess.Popen[str]) -> None:
    mark = home / name / "ppo" / f"checkpoint-{step}" / STATE_FILE
    while not mark.exists() and process.poll() is None:
        time.sleep(0.01)


def run_into(home: Path, trouble: str, *options: str, config: str = "multi_gpu", seconds: float = 0) -> End:
    """PPO of two processes that comes into trouble after its first checkpoint."""
    name = f"{trouble}-{config}"
    process = start(home, name, two_processes(home, config), *options, TROUBLE=trouble, SECONDS=str(seconds))
    try:
        wait_for_checkpoint(home, name, 1, process)
        began = time.monotonic()
        status = process.wait(60)
    finally:
        process.kill()
    return End(status, time.monotonic() - began, (home / f"{name}.log").read_text())


def last_words(end: End) -> str:
    """The message at the end of torchrun's report."""
    report = end.screen.rstrip().rstrip("=").rstrip()
    return report[report.rindex("traceback :") :].removeprefix("traceback :").strip()


@pytest.mark.slow
def test_a_process_that_raises_ends_the_run_with_its_message_once_and_last(home: Path) -> None:
    end = run_into(home, "raises")
    assert end.status == 1
    assert end.seconds < 10
    assert last_words(end).startswith(
        "error: The reward function `judge` raised ValueError: the judge broke down."
    )
    assert end.screen.count("the judge broke down") == 1
    assert "another process" not in end.screen


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_gpu", "zero3", "fsdp2"])
def test_after_a_process_has_raised_the_run_goes_on_from_what_was_learnt(home: Path, config: str) -> None:
    name = f"goes-on-{config}"
    options = ("--save_strategy=no", "--max_steps=3")
    process = start(home, name, two_processes(home, config), *options, TROUBLE="raises")
    assert process.wait(120) == 1
    # Nothing else has saved the two iterations before.
    assert [folder.name for folder in whole_checkpoints(home / name / "ppo", STATE_FILE)] == ["checkpoint-2"]
    process = start(home, name, two_processes(home, config), *options)
    assert process.wait(120) == 0, (home / f"{name}.log").read_text()[-2000:]
    history = json.loads((home / name / "ppo" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "policy/loss" in entry] == [1, 2, 3]


@pytest.mark.slow
def test_a_process_that_dies_ends_one_that_is_busy(home: Path) -> None:
    end = run_into(home, "dies")
    assert end.status == 1
    assert end.seconds < 10
    assert last_words(end).startswith("Signal 9 (SIGKILL) received by PID")
    assert "Traceback (most recent call last)" not in end.screen.split("ChildFailedError")[-1]


@pytest.mark.slow
@pytest.mark.parametrize("config", launching.BACKENDS)
def test_a_judge_slower_than_ddp_timeout_ends_the_run_with_the_setting_to_raise(
    home: Path, config: str
) -> None:
    end = run_into(home, "slow", "--ddp_timeout=3", config=config, seconds=40)
    assert end.status == 1
    assert end.seconds < 20
    assert "did not come within ddp_timeout" in last_words(end)
    assert end.screen.count("did not come") == 1


@pytest.mark.slow
@pytest.mark.parametrize("config", launching.BACKENDS)
def test_a_judge_that_hangs_on_one_process_ends_the_run_with_a_checkpoint(home: Path, config: str) -> None:
    options = ("--rollout_timeout=3", "--save_strategy=no")
    name = f"hangs-{config}"
    process = start(home, name, two_processes(home, config), *options, TROUBLE="slow", SECONDS="60")
    assert process.wait(50) == 1
    screen = (home / f"{name}.log").read_text()
    assert last_words(End(1, 0, screen)).startswith(
        "error: Reward functions did not answer within rollout_timeout=3 seconds; it stood at "
    )
    assert [folder.name for folder in whole_checkpoints(home / name / "ppo", STATE_FILE)] == ["checkpoint-2"]


@pytest.mark.slow
def test_bad_input_of_both_processes_is_said_once(home: Path) -> None:
    process = start(home, "refused", two_processes(home), "--num_minibatches=3")
    assert process.wait(60) == 1
    screen = (home / "refused.log").read_text()
    assert last_words(End(1, 0, screen)).endswith("do not divide into num_minibatches=3.")
    assert screen.count("do not divide") == 1


# One process of several, without the others.


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The statuses that this process, the first of two, would have left with."""
    statuses: list[int] = []

    def leave(status: int) -> None:
        statuses.append(status)
        raise InterruptedError

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(processes, "leave", leave)
    monkeypatch.setattr(processes, "SECONDS_BEHIND_ANOTHER", 0.3)
    return statuses


@pytest.mark.parametrize(
    ("error", "status", "message", "waits"),
    [
        (UsageError("name a file."), 2, "error: name a file.", False),
        (ValueError("a fault"), 1, "Traceback (most recent call last):", False),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer"),
            1,
            "error: another process of this run has ended; its own message says why.",
            True,
        ),
        (
            torch.distributed.DistStoreError("wait timeout after 3000ms"),
            1,
            "error: another process of this run did not come within ddp_timeout",
            True,
        ),
    ],
)
def test_a_failure_is_told_to_the_launcher_and_one_that_follows_from_another_waits_for_that(
    left: list[int], tmp_path: Path, error: Exception, status: int, message: str, waits: bool
) -> None:
    def main() -> None:
        raise error

    began = time.monotonic()
    with pytest.raises(InterruptedError):
        run(main)
    assert left == [status]
    assert (time.monotonic() - began > 0.3) == waits
    told = json.loads((tmp_path / "error.json").read_text())["message"]["extraInfo"]["py_callstack"]
    assert told.startswith(message)
    assert str(error) in told or waits


@pytest.mark.parametrize("stage", [sft, collect, reward, ppo, evaluate])
def test_every_stage_makes_the_process_group_with_the_ddp_timeout_of_its_settings(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class MadeError(Exception):
        pass

    def make(cpu: bool, timeout: Any) -> None:
        raise MadeError(timeout.total_seconds())

    name = stage.__name__.rpartition(".")[2]
    recipe = tmp_path / "recipe.yaml"
    monkeypatch.setattr("tieback.cli.devices.PartialState", make)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for ways, seconds in (((), 1800), (("--ddp_timeout=7",), 7)):
        recipe.write_text("seed: 1\n")
        monkeypatch.setattr("sys.argv", [name, "--config", str(recipe), *ways])
        with pytest.raises(MadeError, match=str(seconds)):
            stage.main()
    recipe.write_text("ddp_timeout: 9\n")
    with pytest.raises(MadeError, match="7"):
        stage.main()
    monkeypatch.setattr("sys.argv", [name, "--config", str(recipe)])
    with pytest.raises(MadeError, match="9"):
        stage.main()
    for value in ("0", ".nan", "[1]"):
        recipe.write_text(f"ddp_timeout: {value}\n")
        with pytest.raises(UsageError, match="ddp_timeout must be a number of seconds above 0"):
            stage.main()


# Runs that come to their end.


def end_of(folder: Path) -> dict[str, Any]:
    """What a run has left, but for its seconds."""
    metrics = toy.without_measurements(json.loads((folder / "metrics.json").read_text()))
    last = folder / f"checkpoint-{STEPS}"
    return {
        "policy": load_file(folder / "model.safetensors"),
        "critic": load_file(folder / "value_model" / "model.safetensors"),
        "optimizer": torch.load(last / "optimizer.pt")["state"],
        "rng": [torch.load(last / f"rng_state_{rank}.pth", weights_only=False)["cpu"] for rank in range(2)],
        "metrics": metrics,
    }


@pytest.fixture(scope="module")
def straight(home: Path) -> dict[str, Any]:
    """A run of two processes on one machine."""
    process = start(home, "straight", two_processes(home))
    assert process.wait(120) == 0, (home / "straight.log").read_text()
    return end_of(home / "straight" / "ppo")


@pytest.mark.slow
def test_two_machines_compute_what_two_processes_on_one_do_and_wait_for_a_judge_within_ddp_timeout(
    home: Path, straight: dict[str, Any]
) -> None:
    config = launching.write_config(home, "multi_node", use_cpu=True, main_process_ip="127.0.0.1")
    nodes = []
    for rank in range(2):
        text = config.read_text().replace("machine_rank: 0", f"machine_rank: {rank}")
        machine = home / f"machine{rank}.yaml"
        machine.write_text(text)
        nodes.append(start(home, "nodes", machine, "--ddp_timeout=60", TROUBLE="slow", SECONDS="5"))
    statuses = [node.wait(120) for node in nodes]
    assert statuses == [0, 0], (home / "nodes.log").read_text()
    torch.testing.assert_close(end_of(home / "nodes" / "ppo"), straight, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_run_that_is_told_to_stop_saves_and_the_same_command_ends_as_the_uninterrupted_one(
    home: Path, straight: dict[str, Any], number: signal.Signals, to_all: bool
) -> None:
    """SIGTERM to the launcher, and ctrl-C, which a terminal sends to its processes, too."""
    name = f"stopped-{number.name}"
    config = two_processes(home)
    process = start(home, name, config, TROUBLE="slow", SECONDS="2")
    wait_for_checkpoint(home, name, 1, process)
    workers = psutil.Process(process.pid).children() if to_all else []
    for one in (process, *workers):
        one.send_signal(number)
    assert process.wait(30) == 1
    log = (home / f"{name}.log").read_text()
    assert "Stopped after step 2 of 4; the same command goes on." in log
    assert log.count("Finishing this step") == 1
    saved = [folder.name for folder in whole_checkpoints(home / name / "ppo", STATE_FILE)]
    assert saved == ["checkpoint-1", "checkpoint-2"]
    again = start(home, name, config)
    assert again.wait(120) == 0, (home / f"{name}.log").read_text()
    assert "where this run was interrupted" in (home / f"{name}.log").read_text()
    torch.testing.assert_close(end_of(home / name / "ppo"), straight, rtol=0, atol=0)
