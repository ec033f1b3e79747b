"""Run every stage with --help, with pipeline/ first on sys.path as Python and `accelerate launch` put it there.

Prints, as JSON, each stage's exit status and output, and the file that each package was imported from.
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

if __name__ == "__main__":
    sys.path[0] = str(PIPELINE)
    results: dict[str, Any] = {"stages": {}}
    for stage in STAGES:
        sys.argv = [str(PIPELINE / f"{stage}.py"), "--help"]
        printed, status = io.StringIO(), None
        try:
            with contextlib.redirect_stdout(printed):
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
        results["stages"][stage] = [status, printed.getvalue()]
    results["packages"] = {name: sys.modules[name].__file__ for name in PACKAGES if name in sys.modules}
    print(json.dumps(results))
