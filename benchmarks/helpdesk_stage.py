"""A stage of the help desk, run by a benchmark."""

import subprocess
import sys

from benchmarks.side_by_side import threads_of


def run_stage(name: str, threads: int, *flags: object) -> None:
    """Run a stage of the help desk with further flags; one that has finished with the same settings is left as it is.

    Raises:
        CalledProcessError: the stage failed; it has said why.
    """
    command = [sys.executable, "-m", f"tieback.pipeline.{name}", "--config", "helpdesk", *map(str, flags)]
    subprocess.run(command, check=True, env=threads_of(threads))
