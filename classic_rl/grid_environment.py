"""The gridworld as a Gymnasium environment, registered as `tieback/GridWorld-v0` by importing this module."""

from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np

from tieback.cli.errors import UsageError

ACTIONS = ("up", "right", "down", "left")
_MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))

Cell = tuple[int, int]


class GridWorld(gym.Env[Any, Any]):
    """A grid with a start, a goal and obstacles; cells are (row, column), counted from the upper left.

    Observations are the cell's number, row · columns + column; actions are those of `ACTIONS`. Bumping into a wall or
    an obstacle leaves the agent where it is. The episode terminates at the goal.

    Args:
        rows, columns: size of the grid.
        start, goal: where an episode begins and ends.
        obstacles: cells that cannot be entered.
        goal_reward, bump_reward, step_reward: reward of reaching the goal, of a bump, and of any other step.
        render_mode: "ansi" or None.

    Raises:
        UsageError: the cells do not make a grid in which the goal can be reached.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012 (Gymnasium's own declaration)

    def __init__(
        self,
        rows: int = 3,
        columns: int = 3,
        start: Cell = (0, 0),
        goal: Cell = (2, 2),
        obstacles: tuple[Cell, ...] = ((1, 1),),
        goal_reward: float = 100.0,
        bump_reward: float = -10.0,
        step_reward: float = -1.0,
        render_mode: str | None = None,
    ) -> None:
        self.rows, self.columns = rows, columns
        self.start, self.goal, self.obstacles = start, goal, frozenset(obstacles)
        self.goal_reward, self.bump_reward, self.step_reward = goal_reward, bump_reward, step_reward
        self.render_mode = render_mode
        self._check()
        self.observation_space = gym.spaces.Discrete(rows * columns)
        self.action_space = gym.spaces.Discrete(len(ACTIONS))
        self._cell: Cell = self.start

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.int64, dict]:
        """Go back to the start."""
        super().reset(seed=seed)
        self._cell = self.start
        return self._number(self._cell), {}

    def step(self, action: np.int64 | int) -> tuple[np.int64, float, bool, bool, dict]:
        """Move, or bump."""
        cell = self._neighbour(self._cell, action)
        if cell is None:
            return self._number(self._cell), self.bump_reward, False, False, {}
        self._cell = cell
        reached = cell == self.goal
        return self._number(cell), self.goal_reward if reached else self.step_reward, reached, False, {}

    def render(self) -> str | None:
        """The grid as text: A the agent, G the goal, # an obstacle."""
        if self.render_mode != "ansi":
            return None
        marks = {self._cell: "A", **dict.fromkeys(self.obstacles, "#")} | (
            {} if self._cell == self.goal else {self.goal: "G"}
        )
        return "\n".join(
            " ".join(marks.get((row, column), ".") for column in range(self.columns))
            for row in range(self.rows)
        )

    def _number(self, cell: Cell) -> np.int64:
        return np.int64(cell[0] * self.columns + cell[1])

    def _inside(self, cell: Cell) -> bool:
        return 0 <= cell[0] < self.rows and 0 <= cell[1] < self.columns

    def _neighbour(self, cell: Cell, action: np.int64 | int) -> Cell | None:
        """The cell that an action leads to, None where it bumps."""
        there = (cell[0] + _MOVES[action][0], cell[1] + _MOVES[action][1])
        return there if self._inside(there) and there not in self.obstacles else None

    def _check(self) -> None:
        if self.rows < 1 or self.columns < 1 or self.rows * self.columns < 2:
            raise UsageError(f"a grid needs at least two cells, but is {self.rows} x {self.columns}.")
        for name, cells in (("start", [self.start]), ("goal", [self.goal]), ("obstacles", self.obstacles)):
            for cell in cells:
                if not self._inside(cell):
                    raise UsageError(f"{name}: {cell} is outside the {self.rows} x {self.columns} grid.")
        for name, cell in (("start", self.start), ("goal", self.goal)):
            if cell in self.obstacles:
                raise UsageError(f"{name} {cell} is on an obstacle.")
        if self.start == self.goal:
            raise UsageError(f"start and goal are both {self.start}: nothing would be left to learn.")
        seen, queue = {self.start}, deque([self.start])
        while queue:
            cell = queue.popleft()
            for action in range(len(ACTIONS)):
                there = self._neighbour(cell, action)
                if there is not None and there not in seen:
                    seen.add(there)
                    queue.append(there)
        if self.goal not in seen:
            raise UsageError(f"the goal {self.goal} cannot be reached from {self.start}: remove an obstacle.")


gym.register(id="tieback/GridWorld-v0", entry_point="tieback.classic_rl.grid_environment:GridWorld")
