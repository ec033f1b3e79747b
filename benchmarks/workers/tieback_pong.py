"""Iterations of our PPO on Pong: `tieback_pong.py DTYPE THREADS`."""

import sys

import torch
from accelerate import Accelerator
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
    STEPS,
    TOTAL_STEPS,
    VF_COEF,
)
from protocol import Turns

from tieback.classic_rl import ppo
from tieback.classic_rl.networks import NatureActorCritic
from tieback.classic_rl.pong_environment import ACTION_NAMES, make_env
from tieback.classic_rl.pong_training import PongPPOArguments
from tieback.classic_rl.rollout import Collector


def main() -> None:
    """Train for as many turns as there are."""
    torch.set_num_threads(int(sys.argv[2]))
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if sys.argv[1] == "bf16" else "no")
    policy = NatureActorCritic(len(ACTION_NAMES))
    settings = PongPPOArguments(
        total_steps=TOTAL_STEPS,
        num_envs=NUM_ENVS,
        num_steps=NUM_STEPS,
        num_ppo_epochs=EPOCHS,
        num_minibatches=STEPS // BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        clip_range=CLIP_RANGE,
        ent_coef=ENT_COEF,
        anneal_ent_coef=False,
        vf_coef=VF_COEF,
        max_grad_norm=MAX_GRAD_NORM,
        gamma=GAMMA,
        gae_lambda=GAE_LAMBDA,
        normalize_frames=False,
    )
    optimizer = torch.optim.Adam(policy.parameters(), lr=LEARNING_RATE, eps=1e-5, fused=True)
    collector = Collector(make_env(NUM_ENVS), 0, accelerator.device)
    turns = Turns()
    turns.wait()
    for _ in ppo.train(policy, optimizer, collector, settings, accelerator):
        turns.done()
        turns.wait()


if __name__ == "__main__":
    main()
