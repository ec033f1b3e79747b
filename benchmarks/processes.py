"""What an iteration of PPO takes on one process and on several (DDP, on the CPU), a thread each: the same completions, shared out.

    make sft collect reward
    python -m benchmarks.processes --run_dir runs/helpdesk --json processes.json

By the clock, so on a machine with as many idle cores as processes. The runs take turns; of each the median iteration counts.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import yaml

from benchmarks.side_by_side import Figures, flag_parser, tell, threads_of
from tieback.pipeline.report.curves import read_log

_ROOT = Path(__file__).parents[1]
_PHASES = ("generate", "score", "logprobs", "update")
_ROWS = 128
_WARM_UP = 2  # iterations


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = flag_parser("processes", __doc__, rounds=2)
    parser.add_argument("--run_dir", default="runs/helpdesk", help="run with sft and reward (runs/helpdesk)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes (1 2)")
    parser.add_argument("--iterations", type=int, default=10, help="of each run (10)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure, print, and write the file."""
    found: dict[int, list[dict[str, float]]] = {count: [] for count in args.processes}
    for _ in range(args.rounds):
        for count in args.processes:
            found[count].append(iteration(count, args))
    figures: Figures = {}
    for count, runs in found.items():
        seconds = {phase: median(run[phase] for run in runs) for phase in _PHASES}
        figures |= {f"seconds/{count}_{phase}": value for phase, value in seconds.items()}
        figures[f"seconds/{count}"] = sum(seconds.values())
    least = min(args.processes)
    for count in args.processes:
        for name in ("", *(f"_{phase}" for phase in _PHASES)):
            figures[f"ratio/{count}{name}"] = (
                figures[f"seconds/{least}{name}"] / figures[f"seconds/{count}{name}"]
            )
    tell(figures, args.threads, args.json)


def iteration(count: int, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each phase in a run of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        shipped = yaml.safe_load(
            (_ROOT / "accelerate_configs" / "multi_gpu.yaml").read_text(encoding="utf-8")
        )
        config = Path(folder, "processes.yaml")
        changes = {"num_processes": count, "use_cpu": True, "mixed_precision": "no", "main_process_port": 0}
        config.write_text(yaml.safe_dump(shipped | changes), encoding="utf-8")
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
        settings = {
            "config": "helpdesk",
            "run_dir": args.run_dir,
            "output_dir": folder,
            "max_steps": args.iterations,
            "per_device_train_batch_size": _ROWS // count,
            "num_eval_prompts": 0,
            "save_strategy": "no",
            "report_to": "none",
        }
        flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        environment = threads_of(args.threads) | {"CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([*launch, str(_ROOT / "pipeline" / "ppo.py"), *flags], check=True, env=environment)
        log = [entry for entry in read_log(Path(folder)) if "time/update" in entry][_WARM_UP:]
    return {phase: median(entry[f"time/{phase}"] for entry in log) for phase in _PHASES}


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
