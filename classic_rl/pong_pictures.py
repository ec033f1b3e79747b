"""Pictures of a Pong policy: videos of its games, its action probabilities, and its values over an episode."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from tieback.classic_rl.evaluation import write_video
from tieback.classic_rl.networks import NatureActorCritic
from tieback.classic_rl.pong_environment import ACTION_NAMES, STEPS_PER_SECOND, play_in_colour
from tieback.classic_rl.pong_policy import PongPolicy

_ENLARGED = 3


def write_pictures(policy: PongPolicy, folder: Path, seed: int) -> None:
    """Play one episode greedily and write `episode.mp4`, `action_probabilities.png` and `values.png`."""
    values: list[float] = []
    rewards: list[float] = []
    chosen: tuple[float, np.ndarray, np.ndarray] | None = None

    def pictures() -> Iterator[np.ndarray]:
        nonlocal chosen
        for observation, picture, reward in _play(policy, seed):
            probabilities, value = policy.look(observation[None])
            values.append(float(value[0]))
            rewards.append(reward)
            # The moment after the first second in which the policy is surest of itself.
            surest = float(probabilities[0].max())
            if len(values) > STEPS_PER_SECOND and (chosen is None or surest > chosen[0]):
                chosen = (surest, picture, probabilities[0])
            yield enlarge(picture)

    write_video(folder / "episode.mp4", pictures(), fps=STEPS_PER_SECOND)
    assert chosen is not None
    # matplotlib takes half a second, which --help has no use for
    from tieback.classic_rl.plots import draw_action_probabilities, draw_values

    draw_action_probabilities(folder / "action_probabilities.png", chosen[1], ACTION_NAMES, chosen[2])
    draw_values(folder / "values.png", np.array(values), np.array(rewards), STEPS_PER_SECOND)


def write_training_video(network: NatureActorCritic, path: Path, seed: int, device: torch.device) -> None:
    """Film one episode of a policy in training."""
    pictures = (enlarge(picture) for _, picture, _ in _play(PongPolicy(network, device), seed))
    write_video(path, pictures, fps=STEPS_PER_SECOND)


def enlarge(picture: np.ndarray) -> np.ndarray:
    """Each pixel three times as wide and as high."""
    return picture.repeat(_ENLARGED, axis=0).repeat(_ENLARGED, axis=1)


def _play(policy: PongPolicy, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    def act(observations: np.ndarray) -> np.ndarray:
        return policy.act(observations, deterministic=True)

    return play_in_colour(act, seed)
