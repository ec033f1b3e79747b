"""Pictures of what was learnt."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

_ACTION_TRIANGLES = (  # corners in a cell's own coordinates: up, right, down, left
    ((0, 0), (1, 0)),
    ((1, 0), (1, 1)),
    ((1, 1), (0, 1)),
    ((0, 1), (0, 0)),
)
_ACTION_TEXT = ((0.5, 0.17), (0.81, 0.5), (0.5, 0.83), (0.19, 0.5))


def draw_q_table(
    path: Path,
    q_table: np.ndarray,
    start: tuple[int, int],
    goal: tuple[int, int],
    obstacles: Iterable[tuple[int, int]],
) -> None:
    """Draw each cell as four triangles, one an action, coloured by Q; the best are in bold type.

    Args:
        path: where to.
        q_table: `[rows, columns, 4]`, actions up, right, down, left.
        start, goal, obstacles: cells (row, column).
    """
    rows, columns, _ = q_table.shape
    blocked = set(obstacles)
    shown = [
        q_table[row, column]
        for row in range(rows)
        for column in range(columns)
        if (row, column) != goal and (row, column) not in blocked
    ]
    norm = matplotlib.colors.Normalize(np.min(shown), np.max(shown))
    colours = matplotlib.colormaps["viridis"]
    figure = Figure(figsize=(1.9 * columns + 1.2, 1.9 * rows), layout="constrained")
    axes = figure.subplots()
    for row in range(rows):
        for column in range(columns):
            cell = (row, column)
            if cell == goal or cell in blocked:
                face = "#2e8b57" if cell == goal else "#333333"
                axes.add_patch(matplotlib.patches.Rectangle((column, row), 1, 1, facecolor=face))
                label = "goal" if cell == goal else ""
                axes.text(column + 0.5, row + 0.5, label, ha="center", va="center", color="white", size=13)
                continue
            values = q_table[row, column]
            for action, value in enumerate(values):
                corners = [*_ACTION_TRIANGLES[action], (0.5, 0.5)]
                shade = colours(norm(value))
                axes.add_patch(
                    matplotlib.patches.Polygon(
                        [(column + x, row + y) for x, y in corners], facecolor=shade, edgecolor="white"
                    )
                )
                light = matplotlib.colors.rgb_to_hsv(shade[:3])[2] > 0.6
                x, y = _ACTION_TEXT[action]
                axes.text(
                    column + x,
                    row + y,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    size=9,
                    color="black" if light else "white",
                    weight="bold" if np.isclose(value, values.max(), atol=0.005) else "normal",
                )
    axes.add_patch(
        matplotlib.patches.Rectangle(
            (start[1] + 0.02, start[0] + 0.02), 0.96, 0.96, fill=False, edgecolor="#d62728", linewidth=2.5
        )
    )
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_aspect("equal")
    axes.set_xticks(np.arange(columns) + 0.5, [str(column) for column in range(columns)])
    axes.set_yticks(np.arange(rows) + 0.5, [str(row) for row in range(rows)])
    axes.tick_params(length=0)
    axes.set_xlabel("column")
    axes.set_ylabel("row")
    axes.set_title("Q(s, a): bold is best, the red frame is the start", size=10)
    mappable = matplotlib.cm.ScalarMappable(norm, colours)
    figure.colorbar(mappable, ax=axes, shrink=0.8, label="Q")
    figure.savefig(path, dpi=110)


def draw_policy_map(path: Path, act: Callable[[np.ndarray], np.ndarray], size: int = 201) -> None:
    """Draw where a CartPole policy pushes left (blue) and right (red), by pole angle and pole velocity.

    The cart stands still in the middle of its track.

    Args:
        path: where to.
        act: observations float32 `[N, 4]` → actions int64 `[N]`.
        size: points along each axis.
    """
    angles, velocities = np.linspace(-0.21, 0.21, size), np.linspace(-3, 3, size)
    grid_angles, grid_velocities = np.meshgrid(angles, velocities)
    observations = np.zeros((size * size, 4), dtype=np.float32)
    observations[:, 2], observations[:, 3] = grid_angles.ravel(), grid_velocities.ravel()
    actions = act(observations).reshape(size, size)

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colors.ListedColormap(["#3b6fb6", "#c8423b"])
    axes.pcolormesh(np.degrees(angles), velocities, actions, cmap=colours, vmin=0, vmax=1, shading="nearest")
    axes.set_xlabel("pole angle (degrees, right is positive)")
    axes.set_ylabel("pole angular velocity (rad/s)")
    axes.set_title("What the policy does, with the cart at rest in the middle", size=10)
    handles = [
        matplotlib.patches.Patch(color=colours(action), label=label)
        for action, label in enumerate(("push left", "push right"))
    ]
    axes.legend(handles=handles, loc="lower right")
    figure.savefig(path, dpi=110)


def draw_action_probabilities(
    path: Path, picture: np.ndarray, names: Sequence[str], probabilities: np.ndarray
) -> None:
    """Draw a frame of a game beside a bar for each action's probability.

    Args:
        path: where to.
        picture: uint8 `[height, width, 3]`.
        names: of the actions.
        probabilities: `[actions]`.
    """
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    left.imshow(picture, interpolation="nearest")
    left.set_axis_off()
    left.set_title("what the policy sees", size=10)
    places = np.arange(len(names))
    bars = right.barh(places, probabilities, color="#3b6fb6")
    right.bar_label(bars, [f"{probability:.3f}" for probability in probabilities], padding=3, size=9)
    right.set_yticks(places, list(names))
    right.invert_yaxis()
    right.set_xlim(0, 1.12)
    right.set_xlabel("probability")
    right.set_title("what it will do", size=10)
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def draw_values(path: Path, values: np.ndarray, rewards: np.ndarray, steps_per_second: float) -> None:
    """Draw the critic's value through an episode, with the points won and lost.

    Args:
        path: where to.
        values: `[T]`, value of each state.
        rewards: `[T]`, reward of the action in it.
        steps_per_second: of the game's time.
    """
    seconds = np.arange(len(values)) / steps_per_second
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(seconds, values, color="#333333", linewidth=1)
    low, high = axes.get_ylim()
    for sign, colour, label in ((1, "#2e8b57", "point won"), (-1, "#c8423b", "point lost")):
        places = seconds[np.sign(rewards) == sign]
        axes.vlines(
            places,
            low,
            high,
            color=colour,
            alpha=0.45,
            linewidth=1.2,
            label=f"{label} ({len(places)})",
        )
    axes.set_xlim(0, seconds[-1])
    axes.set_xlabel("seconds of the game")
    axes.set_ylabel("value V(s)")
    axes.set_title("What the critic expects, and what comes", size=10, loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def draw_learning_curve(path: Path, steps: np.ndarray, seconds: np.ndarray, returns: np.ndarray) -> None:
    """Draw the mean return of the last 20 training episodes over steps, with the minutes that they took above.

    Args:
        path: where to.
        steps: of the environments together, `[N]`, rising.
        seconds: of training up to each, `[N]`.
        returns: `[N]`.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps / 1e6, returns, color="#3b6fb6", linewidth=1.6)
    axes.set_ylim(-21.5, 21.5)
    axes.set_yticks([-21, -10, 0, 10, 18, 21])
    axes.set_xlim(0, steps[-1] / 1e6)
    axes.grid(axis="y", color="#e3e6e9")
    axes.set_xlabel("million steps")
    axes.set_ylabel("return, mean of 20 episodes")
    axes.spines[["top", "right"]].set_visible(False)
    minutes = axes.secondary_xaxis(
        "top", functions=(_between(steps / 1e6, seconds / 60), _between(seconds / 60, steps / 1e6))
    )
    # Beyond the last point there are no minutes to tell.
    ticks = matplotlib.ticker.MaxNLocator(8).tick_values(0, seconds[-1] / 60)
    minutes.set_xticks(ticks[ticks <= seconds[-1] / 60])
    minutes.set_xlabel("minutes of training")
    figure.savefig(path, dpi=110)


def _between(known: np.ndarray, values: np.ndarray) -> Callable[[Any], Any]:
    """The line through points, as a function."""
    return lambda x: np.interp(x, known, values)
