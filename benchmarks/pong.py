"""PPO on Pong beside Stable-Baselines3's and CleanRL's with envpool: steps a second, as ratios.

    make bench-setup
    python -m benchmarks.pong --json pong.json

Every trainer has the settings of the tutorials: 8 environments, 128 steps, 4 epochs, batches of 256, the Nature network.
They take turns, an iteration each, and CPU seconds are compared, of all the threads that a trainer has.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.side_by_side import flag_parser, ours, peer, take_turns, tell
from benchmarks.workers.pong_world import STEPS


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    return flag_parser("pong", __doc__, rounds=10).parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure, print, and write the file."""
    workers = {
        "sb3": peer("sb3_pong.py", args.threads),
        "cleanrl_envpool": peer("cleanrl_pong.py", args.threads),
        "ours_fp32": ours("tieback_pong.py", "fp32", args.threads),
        "floor_fp32": ours("floor_pong.py", "fp32", args.threads),
        "ours_bf16": ours("tieback_pong.py", "bf16", args.threads),
        "floor_bf16": ours("floor_pong.py", "bf16", args.threads),
    }
    found = take_turns(workers, args.rounds, threads=args.threads)
    seconds = {name: of["cpu"] for name, of in found.items()}
    # `python -m classic_rl.pong` computes in what is faster on the processor.
    best = min(("fp32", "bf16"), key=lambda dtype: seconds[f"ours_{dtype}"])
    figures = {f"steps_per_second/{name}": STEPS / value for name, value in seconds.items()}
    for dtype in ("fp32", "bf16"):
        own = seconds[f"ours_{dtype}"]
        figures[f"ratio/{dtype}_sb3"] = seconds["sb3"] / own
        figures[f"ratio/{dtype}_cleanrl_envpool"] = seconds["cleanrl_envpool"] / own
        figures[f"ratio/{dtype}_floor"] = seconds[f"floor_{dtype}"] / own
    for name in ("sb3", "cleanrl_envpool", "floor"):
        figures[f"ratio/{name}"] = figures[f"ratio/{best}_{name}"]

    tell(figures, args.threads, args.json)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
