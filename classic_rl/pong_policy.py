"""A trained Pong policy: how it is loaded, how it acts, and the returns of its games."""

from pathlib import Path

import numpy as np
import torch

from tieback.classic_rl.evaluation import episode_returns
from tieback.classic_rl.networks import NatureActorCritic
from tieback.classic_rl.pong_environment import ACTION_NAMES, make_env
from tieback.classic_rl.weights import load_weights
from tieback.cli.errors import UsageError


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
