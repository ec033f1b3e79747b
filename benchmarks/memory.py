"""Peak memory of an iteration of PPO above that of the models themselves, beside TRL 1.12's.

    make bench-setup
    python -m benchmarks.memory --json memory.json

The models and prompts of `benchmarks.llm_ppo` in bf16: 64 rows of 32 + 48 tokens, with vocabularies of 2,048 and 50,000. What
is counted is resident memory: gradients, the optimiser's states, activations, logits. Each trainer runs one iteration.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.side_by_side import Figures, machine, ours, peer, take_turns, write_json


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of each trainer")
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure, print, and write the file."""
    figures: Figures = {}
    for vocabulary, world in (("2k", "equal"), ("50k", "vocab50k")):
        print(world)
        for name, value in above_models(world, ("separate", "shared"), args.threads).items():
            kind, _, rest = name.partition("/")
            figures[f"{kind}/{vocabulary}_{rest}"] = value
    print(f"\n{machine()}, {args.threads} thread(s)")
    for name, value in figures.items():
        print(f"{name:<44} {value:10.3f}")
    write_json(args.json, figures)


def above_models(world: str, critics: Sequence[str], threads: int) -> Figures:
    """MiB above the models' own for TRL and for ours with some kinds of critic, and ours over TRL's."""
    workers = {"trl": peer("trl_ppo.py", world, "bf16", threads)}
    workers |= {critic: ours("tieback_ppo.py", world, "bf16", threads, critic) for critic in critics}
    found = take_turns(workers, rounds=1, warm_up=0, threads=threads)
    above = {name: of["memory"] - of["own"] for name, of in found.items()}
    return {
        **{f"memory_mib/{name}": value for name, value in above.items()},
        **{f"ratio/{critic}": above[critic] / above["trl"] for critic in critics},
    }


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
