"""How Pong learns over several seeds: the time to +18 and the evaluation of whole runs, or the curves of bf16 and fp32.

    python -m benchmarks.pong_learning --json whole.json                          # five whole runs
    python -m benchmarks.pong_learning --until 500000 --dtypes bf16 fp32 --seeds 0 1 2 --json curves.json

Each run is `python -m classic_rl.pong` in a process of its own. Minutes are by the clock and hold the evaluations that select the
policy: let nothing else run, and no more threads than cores (--at_once times --threads).
"""

import argparse
import concurrent.futures
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.side_by_side import Figures, tell, threads_of
from tieback.classic_rl.checkpoints import list_checkpoints
from tieback.cli.devices import has_fast_bf16

_SECONDS_BETWEEN_LOOKS = 2.0
_GOAL = 18.0
_EVERY = 100_000


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        curve: steps, seconds, and the mean return of the last 20 episodes.
        metrics: the run's metrics.json; empty where it was stopped.
    """

    curve: list[tuple[int, float, float]]
    metrics: Figures


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pong_learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds (0 to 4)")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["bf16", "fp32"],
        default=["bf16" if has_fast_bf16(use_cpu=True) else "fp32"],
        help="what to compute in (what is faster here: %(default)s)",
    )
    parser.add_argument(
        "--until", type=int, help="environment steps at which a run is stopped; not, where left out"
    )
    parser.add_argument("--at_once", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each run (2)")
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Train, print, and write the file."""
    wanted = [(dtype, seed) for seed in args.seeds for dtype in args.dtypes]
    with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
        done = pool.map(lambda of: train(*of, until=args.until, threads=args.threads), wanted)
        runs = dict(zip(wanted, done, strict=True))
    figures: Figures = {}
    for (dtype, seed), run in runs.items():
        figures |= {f"{name}/{dtype}_seed{seed}": value for name, value in figures_of(run).items()}
    for dtype in args.dtypes:
        own = [run.curve for (of, _), run in runs.items() if of == dtype]
        figures |= {f"{name}_{dtype}": value for name, value in mean_curve(own).items()}
    tell(figures, args.threads, args.json)


def train(dtype: str, seed: int, until: int | None, threads: int) -> Run:
    """Run one training to its end, or to `until` steps.

    Raises:
        RuntimeError: it failed; with the last lines that it wrote.
    """
    with tempfile.TemporaryDirectory() as parent:
        folder, log = Path(parent) / "run", Path(parent) / "log"
        command = [
            sys.executable,
            "-m",
            "classic_rl.pong",
            "--seed",
            str(seed),
            "--bf16",
            str(dtype == "bf16"),
        ]
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, "--output_dir", str(folder), "--report_to", "none"],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=threads_of(threads),
            )
            while until is not None and process.poll() is None:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                if any(int(place.name) >= until for place in list_checkpoints(folder)):
                    process.send_signal(signal.SIGINT)
                    break
            code = process.wait()
        checkpoints = list_checkpoints(folder)
        if code != 0 or not checkpoints:
            raise RuntimeError(f"{dtype}, seed {seed} ended with {code}:\n{log.read_text()[-3000:]}")
        curve = json.loads((checkpoints[-1] / "state.json").read_text())["progress"]["curve"]
        metrics = folder / "metrics.json"
        print(f"  {dtype}, seed {seed}: done", file=sys.stderr, flush=True)
        return Run(
            [(steps, seconds, value) for steps, seconds, value in curve if until is None or steps <= until],
            json.loads(metrics.read_text()) if metrics.exists() else {},
        )


def figures_of(run: Run) -> Figures:
    """When the goal was reached, and what the run came to."""
    reached = next(((steps, seconds) for steps, seconds, value in run.curve if value >= _GOAL), None)
    found: Figures = {} if reached is None else {"steps/to_18": reached[0], "minutes/to_18": reached[1] / 60}
    if run.metrics:
        found["minutes/whole"] = run.metrics["train/seconds"] / 60
        found |= {
            name: run.metrics[name] for name in ("eval/mean_return", "eval/min_return", "eval/std_return")
        }
    return found


def mean_curve(curves: Sequence[Sequence[tuple[int, float, float]]]) -> Figures:
    """Mean over the runs every 100,000 steps, and the lowest and highest of them."""
    figures: Figures = {}
    last = min(curve[-1][0] for curve in curves)
    for steps in range(_EVERY, last + _EVERY // 10, _EVERY):
        values = [_value_at(curve, steps) for curve in curves]
        for name, of in (("mean", statistics.fmean), ("low", min), ("high", max)):
            figures[f"return/{steps // 1000}k_{name}"] = of(values)
    return figures


def _value_at(curve: Iterable[tuple[int, float, float]], steps: int) -> float:
    return min(curve, key=lambda point: abs(point[0] - steps))[2]


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
