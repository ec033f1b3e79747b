"""Peak memory of an iteration of PPO above that of the models themselves, beside TRL 1.12's.

    make bench-setup
    python -m benchmarks.memory --json memory.json

The models and prompts of `benchmarks.llm_ppo` in bf16: 64 rows of 32 + 48 tokens, with vocabularies of 2,048 and 50,000. What
is counted is resident memory: gradients, the optimiser's states, activations, logits. Each trainer runs
one iteration, or as many as `--rounds` says.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.side_by_side import Figures, flag_parser, ours, peer, take_turns, tell


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    return flag_parser("memory", __doc__, rounds=1).parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure, print, and write the file."""
    figures: Figures = {}
    for vocabulary, world in (("2k", "equal"), ("50k", "vocab50k")):
        print(world)
        for name, value in above_models(world, ("separate", "shared"), args.rounds, args.threads).items():
            kind, _, rest = name.partition("/")
            figures[f"{kind}/{vocabulary}_{rest}"] = value
    tell(figures, args.threads, args.json)


def above_models(world: str, critics: Sequence[str], rounds: int, threads: int) -> Figures:
    """MiB above the models' own for TRL and for ours with some kinds of critic, and ours over TRL's."""
    workers = {"trl": peer("trl_ppo.py", world, "bf16", threads)}
    workers |= {critic: ours("tieback_ppo.py", world, "bf16", threads, critic) for critic in critics}
    found = take_turns(workers, rounds, warm_up=0, threads=threads)
    above = {name: of["memory"] - of["own"] for name, of in found.items()}
    return {
        **{f"memory_mib/{name}": value for name, value in above.items()},
        **{f"ratio/{critic}": above[critic] / above["trl"] for critic in critics},
    }


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
