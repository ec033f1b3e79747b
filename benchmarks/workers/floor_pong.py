"""What an iteration of PPO on Pong cannot do without: `floor_pong.py DTYPE THREADS`.

Passes of the bare network forward and backward over each step, once an epoch, in batches; forward passes to act; and
steps of the environments.
"""

import sys

import numpy as np
import torch
from pong_world import BATCH_SIZE, EPOCHS, NUM_ENVS, NUM_STEPS, STEPS
from protocol import Turns

from tieback.classic_rl.networks import NatureActorCritic
from tieback.classic_rl.pong_environment import ACTION_NAMES, make_env


def main() -> None:
    """Run as many iterations as there are turns."""
    torch.set_num_threads(int(sys.argv[2]))
    network = NatureActorCritic(len(ACTION_NAMES))
    env = make_env(NUM_ENVS)
    observations = torch.from_numpy(env.reset(seed=0)[0].copy())
    batch = observations[0].expand(BATCH_SIZE, -1, -1, -1).clone()
    dice = np.random.default_rng(0)
    turns = Turns()
    while True:
        turns.wait()
        with torch.autocast("cpu", torch.bfloat16, enabled=sys.argv[1] == "bf16"):
            with torch.no_grad():
                for _ in range(NUM_STEPS):
                    network(observations)
                    env.step(dice.integers(len(ACTION_NAMES), size=NUM_ENVS))
            for _ in range(EPOCHS * STEPS // BATCH_SIZE):
                logits, values = network(batch)
                (logits.float().sum() + values.float().sum()).backward()
                network.zero_grad()
        turns.done()


if __name__ == "__main__":
    main()
