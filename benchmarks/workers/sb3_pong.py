"""Iterations of Stable-Baselines3's PPO on Pong: `sb3_pong.py THREADS`."""

import sys

import ale_py
import gymnasium
import torch
from pong_world import (
    BATCH_SIZE,
    CLIP_RANGE,
    ENT_COEF,
    EPOCHS,
    GAE_LAMBDA,
    GAMMA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    NUM_ENVS,
    NUM_STEPS,
    TOTAL_STEPS,
    VF_COEF,
)
from protocol import Turns
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack


class TakeTurns(BaseCallback):
    """Waits for the turn before each iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = Turns()
        self.began = False

    def _on_rollout_start(self) -> None:
        if self.began:
            self.turns.done()
        self.began = True
        self.turns.wait()

    def _on_step(self) -> bool:
        return True


def main() -> None:
    """Train for as many turns as there are."""
    torch.set_num_threads(int(sys.argv[1]))
    gymnasium.register_envs(ale_py)
    env = VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=NUM_ENVS, seed=0), n_stack=4)
    PPO(
        "CnnPolicy",
        env,
        learning_rate=LEARNING_RATE,
        n_steps=NUM_STEPS,
        batch_size=BATCH_SIZE,
        n_epochs=EPOCHS,
        gamma=GAMMA,
        gae_lambda=GAE_LAMBDA,
        clip_range=CLIP_RANGE,
        ent_coef=ENT_COEF,
        vf_coef=VF_COEF,
        max_grad_norm=MAX_GRAD_NORM,
        device="cpu",
    ).learn(TOTAL_STEPS, callback=TakeTurns())


if __name__ == "__main__":
    main()
