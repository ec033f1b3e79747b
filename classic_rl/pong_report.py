"""What a Pong policy does: its returns, a video, its action probabilities and its values over an episode."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from tieback.classic_rl.evaluation import episode_returns, write_video
from tieback.classic_rl.networks import NatureActorCritic
from tieback.classic_rl.output import load_weights
from tieback.classic_rl.plots import draw_action_probabilities, draw_values
from tieback.classic_rl.pong_environment import ACTION_NAMES, STEPS_PER_SECOND, make_env, play_in_colour
from tieback.cli.errors import UsageError

_ENLARGED = 3


class PongPolicy:
    """A trained policy, for NumPy.

    Args:
        network: its weights.
        device: where they are.
    """

    def __init__(self, network: NatureActorCritic, device: torch.device | str = "cpu") -> None:
        self._network = network.to(device).eval()
        self._device = device

    def act(self, observations: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """Choose actions: by sampling with PyTorch's random numbers, or the likeliest.

        Args:
            observations: uint8 `[N, 4, 84, 84]`, the newest frame last.
            deterministic: take the likeliest.

        Returns:
            int64 `[N]`, indices into `ACTION_NAMES`.
        """
        with torch.no_grad():
            return self._network.act(self._tensor(observations), deterministic)[0].cpu().numpy()

    def look(self, observations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities of the actions, float32 `[N, 6]`, and values, float32 `[N]`."""
        with torch.no_grad():
            logits, values = self._network(self._tensor(observations))
        return torch.softmax(logits.float(), dim=-1).cpu().numpy(), values.float().cpu().numpy()

    def _tensor(self, observations: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(observations, device=self._device)


def load_policy(folder: str | Path, device: torch.device | str = "cpu") -> PongPolicy:
    """Load the `policy.safetensors` that training wrote into a folder.

    Raises:
        UsageError: the file is missing or torn, or holds the weights of something else.
    """
    network, path = NatureActorCritic(len(ACTION_NAMES)), Path(folder) / "policy.safetensors"
    try:
        network.load_state_dict(load_weights(path))
    except RuntimeError as error:
        raise UsageError(f"{path} does not hold a Pong policy of this project: {error}") from error
    return PongPolicy(network, device)


def greedy_returns(policy: PongPolicy, num_episodes: int, seed: int) -> np.ndarray:
    """Returns of `num_episodes` episodes of the greedy policy, each from another start."""
    env = make_env(num_episodes)
    returns = episode_returns(env, lambda observations: policy.act(observations, deterministic=True), seed)
    env.close()
    return returns


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
