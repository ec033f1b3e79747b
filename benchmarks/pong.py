"""PPO on Pong beside Stable-Baselines3's and CleanRL's with envpool: steps a second, as ratios.

    make bench-setup
    python -m benchmarks.pong --json pong.json

Every trainer has the settings of the tutorials: 8 environments, 128 steps, 4 epochs, batches of 256, the Nature network.
They take turns, an iteration each, and CPU seconds are compared, of all the threads that a trainer has.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.side_by_side import machine, ours, peer, take_turns, write_json

_STEPS = 8 * 128


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pong",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=10, help="measured iterations of each trainer")
    parser.add_argument("--threads", type=int, default=1, help="threads of each trainer")
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args(argv)


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
    # `python -m classic_rl.pong` computes in bf16 where the processor has it, and this is where it pays.
    best = min(("fp32", "bf16"), key=lambda dtype: seconds[f"ours_{dtype}"])
    figures = {f"steps_per_second/{name}": _STEPS / value for name, value in seconds.items()}
    for dtype in ("fp32", "bf16"):
        own = seconds[f"ours_{dtype}"]
        figures[f"ratio/{dtype}_sb3"] = seconds["sb3"] / own
        figures[f"ratio/{dtype}_cleanrl_envpool"] = seconds["cleanrl_envpool"] / own
        figures[f"ratio/{dtype}_floor"] = seconds[f"floor_{dtype}"] / own
    for name in ("sb3", "cleanrl_envpool", "floor"):
        figures[f"ratio/{name}"] = figures[f"ratio/{best}_{name}"]

    print(f"\n{machine()}, {args.threads} thread(s); ratio/* without a precision: {best}")
    for name, value in figures.items():
        print(f"{name:<44} {value:10.3f}")
    write_json(args.json, figures)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
