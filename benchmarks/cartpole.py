"""Double DQN on CartPole beside Stable-Baselines3's DQN: CPU seconds until a greedy mean return of 490, as a ratio.

    make bench-setup
    python -m benchmarks.cartpole --json cartpole.json

Ours has the settings of `python -m classic_rl.cartpole`, the peer those of RL Baselines3 Zoo. Both are judged by the same 100
episodes every 2,000 steps, whose time does not count, and stop at 200,000 steps. As many seeds as `--rounds` says.
"""

import argparse
import sys
from collections.abc import Sequence
from statistics import median

from benchmarks.side_by_side import Figures, flag_parser, ours, peer, take_turns, tell


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    return flag_parser("cartpole", __doc__, rounds=5).parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure, print, and write the file."""
    found: dict[str, list[Figures]] = {"sb3": [], "ours": []}
    for seed in range(args.rounds):
        workers = {
            "sb3": peer("sb3_cartpole.py", seed, args.threads),
            "ours": ours("tieback_cartpole.py", seed, args.threads),
        }
        for name, figures in take_turns(workers, 1, warm_up=0, threads=args.threads).items():
            found[name].append(figures)
    figures: Figures = {}
    for name, of in found.items():
        figures[f"seconds/{name}"] = median(one["cpu"] for one in of)
        figures[f"steps/{name}"] = median(one["steps"] for one in of)
        figures[f"learnt/{name}"] = sum(one["learnt"] for one in of)
        figures |= {f"seconds/{name}_seed{seed}": one["cpu"] for seed, one in enumerate(of)}
        figures |= {f"steps/{name}_seed{seed}": one["steps"] for seed, one in enumerate(of)}
    figures["ratio/sb3"] = figures["seconds/sb3"] / figures["seconds/ours"]

    tell(figures, args.threads, args.json)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
