"""Run every program with --help, the stages as Python and `accelerate launch` run them, with pipeline/ first on sys.path.

Then PPO with a run that has no stage yet. Prints, as JSON, each one's exit status, output and errors, and the modules of
ours that are loaded after it, with their files.
"""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("sft", "collect", "reward", "ppo", "evaluate", "memory", "preflight")
OTHERS = ("label", "rlhf")
MODULES = (
    "pipeline.label",
    "pipeline.report",
    "classic_rl.gridworld",
    "classic_rl.cartpole",
    "classic_rl.pong",
)
LIBRARIES = ("trl", "datasets", "transformers", "peft", "accelerate")
# What a run needs, and help does not: each takes half a second or more to load.
OF_A_RUN = ("peft", "datasets", "torch._dynamo", "torch.distributed.fsdp", "transformers.trainer")


def run(program: str, *options: str) -> dict[str, Any]:
    """Exit status, output, errors and our modules of a script, or of a module as `python -m` runs it."""
    path = ROOT / "pipeline" / f"{program}.py"
    sys.argv = [str(path), *options]
    output, errors = io.StringIO(), io.StringIO()
    status: Any = None
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            if program in MODULES:
                sys.path[0] = str(ROOT)
                runpy.run_module(program, run_name="__main__", alter_sys=True)
            else:
                sys.path[0] = str(path.parent)
                runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        status = end.code
    return {
        "status": status,
        "output": output.getvalue(),
        "errors": errors.getvalue(),
        "modules": our_modules(),
    }


def our_modules() -> list[tuple[str, str]]:
    """Names and files of the loaded modules whose file is in this project."""
    found = []
    for name, module in sys.modules.items():
        file = getattr(module, "__file__", None)
        if name not in ("__main__", "__mp_main__") and file is not None:
            path = Path(file).resolve()
            if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
                found.append((name, str(path)))
    return found


if __name__ == "__main__":
    results: dict[str, Any] = {program: run(program, "--help") for program in STAGES}
    results["loaded for help"] = [name for name in OF_A_RUN if name in sys.modules]
    results |= {program: run(program, "--help") for program in (*OTHERS, *MODULES)}
    results["a missing stage"] = run("ppo", "--run_dir", "nothing")
    results["libraries"] = {name: sys.modules[name].__file__ for name in LIBRARIES if name in sys.modules}
    print(json.dumps(results))
