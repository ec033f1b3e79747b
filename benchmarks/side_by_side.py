"""Workers that take turns: each is a process that waits for a line, runs one iteration, and tells what it took."""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

Figures = dict[str, float]

_FOLDER = Path(__file__).parent
# The environment that `make bench-setup` makes; what a peer needs stands in peers.txt.
PEERS = _FOLDER.parent / ".venv-bench" / "bin" / "python"
# That of `make vllm-cpu`, which has ours and vLLM.
VLLM = _FOLDER.parent / ".venv-vllm" / "bin" / "python"


def ours(script: str, *arguments: object, python: Path | str = sys.executable) -> list[str]:
    """Command of a worker in this environment, or in that of another `python`."""
    return [str(python), str(_FOLDER / "workers" / script), *map(str, arguments)]


def peer(script: str, *arguments: object) -> list[str]:
    """Command of a worker in the environment of the peers.

    Raises:
        SystemExit: there is no such environment.
    """
    if not PEERS.exists():
        sys.exit(f"{PEERS} is missing: run `make bench-setup` first.")
    return ours(script, *arguments, python=PEERS)


def take_turns(
    workers: Mapping[str, Sequence[str]], rounds: int, warm_up: int = 1, threads: int = 1
) -> dict[str, Figures]:
    """Let each worker run an iteration in turn, so that whatever else the machine does meets all of them alike.

    Args:
        workers: command of each, by name.
        rounds: measured iterations of each.
        warm_up: iterations before them that are not counted.
        threads: of each worker.

    Returns:
        For each worker the median of each figure that it tells.

    Raises:
        RuntimeError: a worker ended; with the last lines that it wrote.
    """
    replies: dict[str, list[Figures]] = {name: [] for name in workers}
    with contextlib.ExitStack() as stack:
        started = {name: stack.enter_context(_started(command, threads)) for name, command in workers.items()}
        for turn in range(warm_up + rounds):
            for name, (process, log) in started.items():
                figures = _turn(name, process, log)
                phase = "warm-up" if turn < warm_up else f"round {turn - warm_up + 1}"
                print(f"  {phase}  {name:<24} {figures['cpu']:8.2f} CPU seconds", file=sys.stderr, flush=True)
                if turn >= warm_up:
                    replies[name].append(figures)
    return {
        name: {key: median(figures[key] for figures in found) for key in found[0]}
        for name, found in replies.items()
    }


def flag_parser(name: str, doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The flags that every benchmark has: of `name`, whose module has the docstring `doc`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"measured iterations of each trainer ({rounds})"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of each trainer (1)")
    parser.add_argument("--json", help="file for the figures")
    return parser


def tell(figures: Figures, threads: int, path: str | None) -> None:
    """Print the figures, and write them with the machine that they are of into the file that is named."""
    print(f"\n{machine()}, {threads} thread(s)")
    for name, value in figures.items():
        print(f"{name:<44} {value:10.3f}")
    if path is not None:
        Path(path).write_text(
            json.dumps({**figures, "machine": machine()}, indent=2) + "\n", encoding="utf-8"
        )


def threads_of(count: int) -> dict[str, str]:
    """This process's environment variables, for a process that computes with `count` threads."""
    return os.environ | {"OMP_NUM_THREADS": str(count)}


def machine() -> str:
    """Processor and date of a measurement."""
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return f"{len(names)} x {names[0] if names else platform.processor()}, {time.strftime('%Y-%m-%d')}"


@contextlib.contextmanager
def _started(command: Sequence[str], threads: int) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=threads_of(threads),
            )
        try:
            yield process, log
        finally:
            process.kill()
            process.wait()


def _turn(name: str, process: subprocess.Popen[str], log: Path) -> Figures:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write("\n")
        process.stdin.flush()
    reply = process.stdout.readline()
    if not reply:
        raise RuntimeError(f"The worker {name} ended:\n{log.read_text()[-3000:]}")
    return json.loads(reply)
