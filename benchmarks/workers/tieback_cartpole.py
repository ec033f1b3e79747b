"""Our Double DQN on CartPole until it is learnt: `tieback_cartpole.py SEED THREADS`."""

import sys

import torch
from cartpole_world import EVAL_EVERY, TOTAL_STEPS, UntilLearnt

from tieback.classic_rl import dqn
from tieback.classic_rl.cartpole import MAGNITUDES, NUM_ACTIONS, make_env
from tieback.classic_rl.networks import q_network


def main() -> None:
    """Train with the settings of `python -m classic_rl.cartpole`."""
    seed = int(sys.argv[1])
    torch.set_num_threads(int(sys.argv[2]))
    torch.manual_seed(seed)
    network = q_network(MAGNITUDES, NUM_ACTIONS)
    settings = dqn.DQNArguments(total_steps=TOTAL_STEPS, eval_every=EVAL_EVERY)
    until = UntilLearnt()
    steps, learnt = 0, False
    for progress in dqn.train(network, make_env(settings.num_envs), settings, seed):
        steps, learnt = progress.env_steps, until.evaluate(network)
        if learnt:
            break
    until.done(steps, learnt)


if __name__ == "__main__":
    main()
