"""Tabular Q-learning in a small gridworld: the whole of reinforcement learning in one table.

    python -m classic_rl.gridworld
    python -m classic_rl.gridworld --rows 5 --columns 6 --goal 4,5 --obstacles 1,1 2,3 --episodes 30000

An agent walks from the start to the goal around the obstacles. It learns Q(s, a), what an action is worth in a cell,
from nothing but what happens to it:

    Q(s, a) ← Q(s, a) + α (r + γ max_a' Q(s', a') − Q(s, a))          (Watkins 1989; Sutton & Barto 2018, eq. 6.8)

It leaves out everything that a table cannot hold: for that, see `classic_rl.cartpole` and `classic_rl.pong`.
"""

import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Discrete
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tieback.classic_rl.grid_environment import ACTIONS, Cell, GridWorld
from tieback.classic_rl.plots import draw_q_table
from tieback.cli.arguments import parse_flags
from tieback.cli.errors import UsageError, run
from tieback.cli.results import write_metrics

ARROWS = ("↑", "→", "↓", "←")


@dataclass
class GridWorldArguments:
    """Settings of the gridworld and of Q-learning."""

    rows: int = field(default=3, metadata={"help": "Rows of the grid."})
    columns: int = field(default=3, metadata={"help": "Columns of the grid."})
    start: str = field(default="0,0", metadata={"help": "Cell where an episode begins: row,column from 0."})
    goal: str = field(default="2,2", metadata={"help": "Cell where it ends."})
    obstacles: list[str] = field(
        default_factory=lambda: ["1,1"], metadata={"help": "Cells that cannot be entered; `none` for none."}
    )
    goal_reward: float = field(default=100.0, metadata={"help": "Reward of reaching the goal."})
    bump_reward: float = field(default=-10.0, metadata={"help": "Reward of bumping into something."})
    step_reward: float = field(default=-1.0, metadata={"help": "Reward of any other step."})
    episodes: int = field(default=10_000, metadata={"help": "Episodes to learn from."})
    epsilon: float = field(default=0.3, metadata={"help": "Probability of a random action; above 0."})
    alpha: float = field(default=0.3, metadata={"help": "Learning rate, above 0 and at most 1."})
    gamma: float = field(default=0.99, metadata={"help": "Discount, at least 0 and below 1."})
    seed: int = field(default=0, metadata={"help": "Seed of the exploration."})
    output_dir: str = field(default="runs/gridworld", metadata={"help": "Folder to write into."})

    def __post_init__(self) -> None:
        for name, fits, range_ in (
            ("episodes", self.episodes >= 1, "at least 1"),
            ("epsilon", 0 < self.epsilon <= 1, "above 0 and at most 1, or the grid is never explored"),
            ("alpha", 0 < self.alpha <= 1, "above 0 and at most 1"),
            ("gamma", 0 <= self.gamma < 1, "at least 0 and below 1"),
        ):
            if not fits:
                raise UsageError(f"{name} must be {range_}, but is {getattr(self, name)}.")


def parse_cell(text: str, name: str) -> Cell:
    """Read "row,column".

    Raises:
        UsageError: it is not two whole numbers.
    """
    try:
        row, column = (int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{name}: {text!r} is not a cell; write row,column, as in 0,2.") from None
    return row, column


def q_learning(
    env: gym.Env[Any, Any],
    episodes: int = 10_000,
    epsilon: float = 0.3,
    alpha: float = 0.3,
    gamma: float = 0.99,
    seed: int = 0,
    progress: bool = False,
) -> np.ndarray:
    """Learn the table of an environment with discrete observations and actions.

    Actions are epsilon-greedy, ties broken at random. A truncated episode is not taken for a finished one: only after
    a terminated one nothing follows.

    Args:
        env: the environment.
        episodes: episodes to learn from.
        epsilon: probability of a random action.
        alpha: learning rate α.
        gamma: discount γ.
        seed: of the exploration.
        progress: show a bar.

    Returns:
        Q, float64 `[observations, actions]`; 0 where an action was never tried.

    Raises:
        TypeError: the environment's observations or actions are not discrete.
    """
    rng = random.Random(seed)
    observations, actions = env.observation_space, env.action_space
    if not (isinstance(observations, Discrete) and isinstance(actions, Discrete)):
        raise TypeError("Q-learning in a table needs discrete observations and actions.")
    num_actions = int(actions.n)
    table = [[0.0] * num_actions for _ in range(int(observations.n))]
    for episode in track(range(episodes), "Q-learning (episodes)", disable=not progress, transient=True):
        state, _ = env.reset(seed=seed if episode == 0 else None)
        over = False
        while not over:
            row = table[state]
            best = max(row)
            if rng.random() < epsilon:
                action = rng.randrange(num_actions)
            else:
                action = rng.choice([a for a, value in enumerate(row) if value == best])
            state, reward, terminated, truncated, _ = env.step(action)
            target = float(reward) + (0.0 if terminated else gamma * max(table[state]))
            row[action] += alpha * (target - row[action])
            over = terminated or truncated
    return np.array(table)


def greedy_return(env: gym.Env[Any, Any], table: np.ndarray, max_steps: int) -> tuple[float, int]:
    """Undiscounted return and length of one greedy episode, cut at `max_steps`."""
    state, _ = env.reset()
    total, over, steps = 0.0, False, 0
    while not over and steps < max_steps:
        state, reward, terminated, truncated, _ = env.step(int(table[state].argmax()))
        total, over, steps = total + float(reward), terminated or truncated, steps + 1
    return total, steps


def print_tables(q_table: np.ndarray, goal: Cell, obstacles: frozenset[Cell]) -> None:
    """Print what was learnt in two views: Q of each action in each cell, and the best actions on the grid.

    Args:
        q_table: `[rows, columns, 4]`, actions in the order of `ACTIONS`.
        goal, obstacles: cells that nothing is done in.
    """
    detailed = Table("state", title="Q-table")
    for action in ACTIONS:
        detailed.add_column(action, justify="right")
    best = Table(title="Best actions", show_header=False, show_lines=True)
    rows, columns, _ = q_table.shape
    for row in range(rows):
        marks = []
        for column in range(columns):
            cell, values = (row, column), q_table[row, column]
            if cell == goal or cell in obstacles:
                marks.append("goal" if cell == goal else "█")
                continue
            detailed.add_row(str(cell), *(f"{value:.2f}" for value in values))
            marks.append(
                " ".join(
                    ARROWS[a] for a in range(len(ACTIONS)) if np.isclose(values[a], values.max(), atol=0.005)
                )
            )
        best.add_row(*marks)
    console = Console()
    console.print(detailed)
    console.print(best)


def parse(argv: list[str]) -> GridWorldArguments:
    """Read the flags.

    Raises:
        UsageError: a flag is unknown or its value out of range.
    """
    (arguments,) = parse_flags(GridWorldArguments, "python -m classic_rl.gridworld", argv)
    return arguments


def main(arguments: GridWorldArguments) -> None:
    """Learn the table, print it, draw it, and write it down."""
    env = gym.make(
        "tieback/GridWorld-v0",
        rows=arguments.rows,
        columns=arguments.columns,
        start=parse_cell(arguments.start, "start"),
        goal=parse_cell(arguments.goal, "goal"),
        obstacles=tuple(
            parse_cell(text, "obstacles") for text in arguments.obstacles if text.lower() != "none"
        ),
        goal_reward=arguments.goal_reward,
        bump_reward=arguments.bump_reward,
        step_reward=arguments.step_reward,
    )
    world = env.unwrapped
    assert isinstance(world, GridWorld)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)

    started = time.perf_counter()
    table = q_learning(
        env,
        arguments.episodes,
        arguments.epsilon,
        arguments.alpha,
        arguments.gamma,
        arguments.seed,
        progress=True,
    )
    seconds = time.perf_counter() - started
    total, steps = greedy_return(env, table, max_steps=10 * world.rows * world.columns)

    q_table = table.reshape(world.rows, world.columns, len(ACTIONS))
    print_tables(q_table, world.goal, world.obstacles)
    np.save(folder / "q_table.npy", q_table)
    draw_q_table(folder / "q_table.png", q_table, world.start, world.goal, world.obstacles)
    write_metrics(
        folder,
        {
            "eval/mean_return": total,
            "eval/steps": steps,
            "train/episodes": arguments.episodes,
            "train/seconds": seconds,
        },
    )
    print(f"The greedy path takes {steps} steps and earns {total:g}. Written to {folder}.")


if __name__ == "__main__":
    run(lambda: main(parse(sys.argv[1:])))
