"""Run every stage with --help, with pipeline/ first on sys.path as Python and `accelerate launch` put it there.

Then PPO with a run that has no stage yet. Prints, as JSON, each one's exit status, output and errors, and the file that
each package was imported from.
"""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

PIPELINE = Path(__file__).parents[2] / "pipeline"
STAGES = ("sft", "collect", "reward", "ppo", "evaluate")
PACKAGES = (
    "data",
    "reward_model",
    "ppo_core",
    "pipeline",
    "trl",
    "datasets",
    "transformers",
    "peft",
    "accelerate",
)


def run(stage: str, *options: str) -> tuple[Any, str, str]:
    """Exit status, output and errors of a script."""
    sys.argv = [str(PIPELINE / f"{stage}.py"), *options]
    output, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code, output.getvalue(), errors.getvalue()
    return None, output.getvalue(), errors.getvalue()


if __name__ == "__main__":
    sys.path[0] = str(PIPELINE)
    results: dict[str, Any] = {stage: run(stage, "--help") for stage in STAGES}
    results["a missing stage"] = run("ppo", "--run_dir", "nothing")
    results["packages"] = {name: sys.modules[name].__file__ for name in PACKAGES if name in sys.modules}
    print(json.dumps(results))
