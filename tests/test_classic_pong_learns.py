"""Pong learnt from pixels, and played in the environment that others use. Ten minutes on two cores."""

import json
import subprocess
import sys

import ale_py
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from tieback.classic_rl.pong import load_policy


def returns_in_gymnasiums_environment(policy, episodes):
    """Greedy episodes in PongNoFrameskip-v4 as Gymnasium's own wrappers prepare it, with up to 30 no-ops first."""
    gym.register_envs(ale_py)
    env = gym.make("PongNoFrameskip-v4")
    env = FrameStackObservation(AtariPreprocessing(env, noop_max=30, frame_skip=4, screen_size=84), 4)
    returns = []
    for seed in range(episodes):
        observation, over, total = env.reset(seed=seed)[0], False, 0.0
        while not over:
            action = policy.act(np.asarray(observation)[None], deterministic=True)[0]
            observation, reward, terminated, truncated, _ = env.step(int(action))
            total += float(reward)
            over = terminated or truncated
        returns.append(total)
    env.close()
    return np.array(returns)


@pytest.mark.slow
@pytest.mark.long
def test_pong_is_learnt_and_scores_the_same_elsewhere(tmp_path):
    command = [
        *(sys.executable, "-m", "classic_rl.pong", "--total_steps", "450000", "--use_cpu", "True"),
        *("--output_dir", str(tmp_path), "--report_to", "none"),
    ]
    subprocess.run(command, check=True)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["train/mean_return_100"] > 10
    assert metrics["eval/mean_return"] > 15
    assert (tmp_path / "learning_curve.png").stat().st_size > 5_000
    elsewhere = returns_in_gymnasiums_environment(load_policy(tmp_path), episodes=30)
    spread = np.hypot(metrics["eval/std_return"], elsewhere.std()) / np.sqrt(30)
    assert abs(elsewhere.mean() - metrics["eval/mean_return"]) < 4 * spread + 0.5
