"""The gridworld: its rules, the published table, and what it refuses."""

import json
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import classic_rl  # noqa: F401 (registers the environment)
from tieback.classic_rl.gridworld import GridWorldArguments, main, parse_cell, q_learning
from tieback.cli.errors import UsageError

UP, RIGHT, DOWN, LEFT = range(4)
ID = "tieback/GridWorld-v0"


def optimal_table(rows, columns, goal, obstacles, gamma=0.99, goal_reward=100.0, bump=-10.0, step=-1.0):
    """Q* by value iteration on the rules as the task states them, apart from the environment's code."""
    table = np.zeros((rows, columns, 4))
    for _ in range(1000):
        new = np.zeros_like(table)
        for row in range(rows):
            for column in range(columns):
                if (row, column) == goal or (row, column) in obstacles:
                    continue
                for action, there in enumerate(
                    [(row - 1, column), (row, column + 1), (row + 1, column), (row, column - 1)]
                ):
                    off = not (0 <= there[0] < rows and 0 <= there[1] < columns) or there in obstacles
                    if off:
                        new[row, column, action] = bump + gamma * table[row, column].max()
                    elif there == goal:
                        new[row, column, action] = goal_reward
                    else:
                        new[row, column, action] = step + gamma * table[there].max()
        table = new
    return table


def test_the_reference_is_the_published_table():
    table = optimal_table(3, 3, (2, 2), {(1, 1)})
    np.testing.assert_allclose(table[0, 0], [83.12, 94.06, 94.06, 83.12], atol=0.005)
    assert table[1, 2, DOWN] == table[2, 1, RIGHT] == 100


@pytest.mark.parametrize("seed", [*range(20), 2**32 - 1])
def test_q_learning_finds_the_published_table(seed):
    learnt = q_learning(gym.make(ID), seed=seed).reshape(3, 3, 4)
    np.testing.assert_allclose(learnt, optimal_table(3, 3, (2, 2), {(1, 1)}), atol=0.01)


def test_another_grid_with_other_rewards():
    world = {"rows": 2, "columns": 4, "start": (1, 0), "goal": (0, 3), "obstacles": ((0, 1),)}
    rewards = {"goal_reward": 7.0, "bump_reward": -3.0, "step_reward": -0.5}
    learnt = q_learning(gym.make(ID, **world, **rewards), episodes=5000, epsilon=0.5, gamma=0.9)
    expected = optimal_table(2, 4, (0, 3), {(0, 1)}, 0.9, 7.0, -3.0, -0.5)
    np.testing.assert_allclose(learnt.reshape(2, 4, 4), expected, atol=0.01)


def test_the_environment_is_one_by_gymnasiums_own_check():
    check_env(gym.make(ID, render_mode="ansi").unwrapped, skip_render_check=True)


def test_a_walk_bumps_steps_and_ends_at_the_goal():
    env = gym.make(ID, render_mode="ansi")
    state, _ = env.reset()
    assert state == 0
    assert env.render() == "A . .\n. # .\n. . G"
    seen = [env.step(action)[:4] for action in (UP, LEFT, RIGHT, DOWN, RIGHT, RIGHT, DOWN, DOWN)]
    assert seen == [
        (0, -10.0, False, False),
        (0, -10.0, False, False),
        (1, -1.0, False, False),
        (1, -10.0, False, False),
        (2, -1.0, False, False),
        (2, -10.0, False, False),
        (5, -1.0, False, False),
        (8, 100.0, True, False),
    ]
    assert env.render() == ". . .\n. # .\n. . A"


class Cut(gym.Wrapper):
    """Says after every step that time is up."""

    def step(self, action):
        state, reward, terminated, _, info = self.env.step(action)
        return state, reward, terminated, True, info


def test_a_truncated_step_is_not_taken_for_the_end():
    learnt = q_learning(Cut(gym.make(ID, rows=1, columns=3, goal=(0, 2), obstacles=())), episodes=300)
    # Each episode is one step from the start, so that its value bootstraps from a cell that stays at 0 ...
    assert learnt[0, RIGHT] == pytest.approx(-1, abs=0.01)
    # ... and bumping from its own: Q = -10 + 0.99 max(Q); by contrast, taken for the end it would be -10.
    assert learnt[0, UP] == pytest.approx(-10 - 0.99, abs=0.3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"obstacles": ["1,2", "2,1"]}, "cannot be reached"),
        ({"obstacles": ["0,0"]}, "start (0, 0) is on an obstacle"),
        ({"goal": "1,1"}, "goal (1, 1) is on an obstacle"),
        ({"goal": "0,0"}, "both"),
        ({"goal": "3,0"}, "goal: (3, 0) is outside"),
        ({"start": "-1,0"}, "start: (-1, 0) is outside"),
        ({"obstacles": ["7,7"]}, "obstacles: (7, 7) is outside"),
        ({"goal": "a,b"}, "goal: 'a,b' is not a cell"),
        ({"rows": 1, "columns": 1, "goal": "0,0", "obstacles": []}, "at least two cells"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"alpha": 1.5}, "alpha"),
        ({"gamma": 1.0}, "gamma"),
        ({"episodes": 0}, "episodes"),
    ],
)
def test_what_makes_no_task_is_refused_before_anything_is_written(flags, message, tmp_path):
    with pytest.raises(UsageError) as refusal:
        main(GridWorldArguments(**flags, output_dir=str(tmp_path / "out")))
    assert message in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_parse_cell():
    assert parse_cell("1,2", "goal") == (1, 2)
    with pytest.raises(UsageError, match="goal: '1;2' is not a cell"):
        parse_cell("1;2", "goal")


def test_the_command_prints_both_grids_and_leaves_table_picture_and_figures(tmp_path):
    command = [sys.executable, "-m", "classic_rl.gridworld", "--output_dir", str(tmp_path), "--seed", "3"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Q-table" in out
    assert "Best actions" in out
    assert "94.06" in out
    table = np.load(tmp_path / "q_table.npy", allow_pickle=False)
    np.testing.assert_allclose(table, optimal_table(3, 3, (2, 2), {(1, 1)}), atol=0.01)
    assert (tmp_path / "q_table.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["eval/mean_return"] == 97
    assert metrics["eval/steps"] == 4


def test_the_command_refuses_in_one_line(tmp_path):
    command = [sys.executable, "-m", "classic_rl.gridworld", "--goal", "1,1", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: goal (1, 1) is on an obstacle."
