"""Stable-Baselines3's DQN on CartPole until it is learnt: `sb3_cartpole.py SEED THREADS`."""

import sys

import gymnasium
import torch
from cartpole_world import ENVIRONMENT, EVAL_EVERY, TOTAL_STEPS, UntilLearnt
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

# The zoo decays epsilon over 16% of 50,000 steps.
_EXPLORATION_STEPS = 0.16 * 50_000


class Evaluate(BaseCallback):
    """Ends the training once it has learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.until = UntilLearnt()
        self.learnt = False

    def _on_step(self) -> bool:
        if self.num_timesteps % EVAL_EVERY == 0:
            self.learnt = self.until.evaluate(self.q_values)
        return not self.learnt

    def q_values(self, observations: Tensor) -> Tensor:
        assert isinstance(self.model, DQN)
        return self.model.q_net(observations)


def main() -> None:
    """Train with the settings of RL Baselines3 Zoo (hyperparams/dqn.yml, CartPole-v1)."""
    torch.set_num_threads(int(sys.argv[2]))
    callback = Evaluate()
    model = DQN(
        "MlpPolicy",
        gymnasium.make(ENVIRONMENT),
        learning_rate=2.3e-3,
        batch_size=64,
        buffer_size=100_000,
        learning_starts=1000,
        gamma=0.99,
        target_update_interval=10,
        train_freq=256,
        gradient_steps=128,
        exploration_fraction=_EXPLORATION_STEPS / TOTAL_STEPS,
        exploration_final_eps=0.04,
        policy_kwargs={"net_arch": [256, 256]},
        seed=int(sys.argv[1]),
        device="cpu",
    )
    model.learn(TOTAL_STEPS, callback=callback)
    callback.until.done(model.num_timesteps, callback.learnt)


if __name__ == "__main__":
    main()
