"""CartPole: both algorithms learn, what a run leaves, and that there is one PPO core."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tieback.classic_rl import cartpole, ppo
from tieback.classic_rl.cartpole import CartPolePPOArguments, greedy, main, make_env, parse
from tieback.classic_rl.dqn import DQNArguments
from tieback.classic_rl.evaluation import episode_returns, write_video
from tieback.classic_rl.networks import MlpActorCritic, q_network
from tieback.cli.errors import UsageError

ROOT = Path(__file__).parents[1]


def physics_policy(observations):
    """Push to where the pole falls: known to balance for long."""
    return (3 * observations[:, 2] + observations[:, 3] > 0).astype(np.int64)


def test_returns_are_those_of_first_episodes():
    assert episode_returns(make_env(20), lambda o: np.zeros(len(o), dtype=np.int64), seed=0).max() < 11
    good = episode_returns(make_env(20), physics_policy, seed=0)
    assert good.mean() > 150
    # Episodes that end soon are not counted twice, and none is left out.
    assert episode_returns(make_env(1), physics_policy, seed=0)[0] == good[0]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dqn", "ppo"])
def test_it_learns_to_balance_for_ever(algorithm, tmp_path):
    arguments, settings = parse(
        ["--algorithm", algorithm, "--output_dir", str(tmp_path), "--report_to", "none", "--seed", "7"]
    )
    main(arguments, settings)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["eval/mean_return"] >= 490
    for name in ("policy_map.png", "episode.mp4"):
        assert (tmp_path / name).stat().st_size > 5_000

    # The file holds the policy that was judged.
    network = q_network(cartpole.MAGNITUDES, 2) if algorithm == "dqn" else MlpActorCritic(4, 2)
    network.load_state_dict(load_file(tmp_path / "policy.safetensors"))
    returns = episode_returns(make_env(cartpole.NUM_EVAL_EPISODES), greedy(network), cartpole._FINAL_SEED)
    assert returns.mean() == metrics["eval/mean_return"]
    assert returns.min() == metrics["eval/min_return"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_policy(tmp_path):
    def weights(folder, seed, algorithm):
        flags = ["--total_steps", "2048", "--eval_every", "1024", "--algorithm", algorithm]
        main(*parse([*flags, "--output_dir", str(folder), "--seed", str(seed), "--report_to", "none"]))
        return load_file(folder / "policy.safetensors")

    for algorithm in ("dqn", "ppo"):
        first, again, other = (
            weights(tmp_path / f"{algorithm}{i}", seed, algorithm)
            for i, seed in enumerate((2**32 - 1, 2**32 - 1, 2))
        )
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not all(torch.equal(first[name], other[name]) for name in first)


def test_flags_depend_on_the_algorithm():
    assert isinstance(parse([])[1], DQNArguments)
    assert isinstance(parse(["--algorithm", "ppo", "--gae_lambda", "0.5"])[1], CartPolePPOArguments)
    with pytest.raises(UsageError, match="gae_lambda"):
        parse(["--algorithm", "dqn", "--gae_lambda", "0.5"])


def test_a_bad_setting_is_refused_in_one_line(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "classic_rl.cartpole",
            "--batch_size",
            "0",
            "--output_dir",
            str(tmp_path / "run"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: batch_size must be at least 1, but is 0."
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="sarsa"):
        parse(["--algorithm", "sarsa"])


def test_a_video_needs_frames(tmp_path):
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "a.mp4", [], 10)


def functions_and_calls(path):
    tree = ast.parse(path.read_text())
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return names, calls


def test_there_is_one_ppo_core():
    """CartPole, Pong and the language model call the same `gae` and `update`, and nothing else steps for PPO."""
    core = {"gae", "policy_loss", "value_loss", "update", "whiten", "kl_estimate"}
    used = set()
    for package in ("classic_rl", "pipeline", "reward_model", "data"):
        for path in (ROOT / package).rglob("*.py"):
            names, calls = functions_and_calls(path)
            # `update` is also what a method of anything may be called.
            assert not names & (core - {"update"}), f"{path.name} defines {names & core} again"
            steps = {call for call in calls if call.endswith("optimizer.step")}
            assert not steps or path.name == "dqn.py", (
                f"{path.name} has an optimiser loop of its own: {steps}"
            )
            assert not any("minimum" in call and "torch" in call for call in calls), (
                f"{path.name}: a clipped objective?"
            )
            used |= {(package, call) for call in calls if call.split(".")[-1] in core}
    for package in ("classic_rl", "pipeline"):
        assert {call.split(".")[-1] for owner, call in used if owner == package} >= {"gae", "update"}
    assert ppo.ppo_core.update.__module__ == "tieback.ppo_core.update"
