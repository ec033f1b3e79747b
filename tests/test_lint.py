"""The lint set-up notices what it is there for: a wrong type given to another package, and an import against the one way."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PLANTED = """
from tieback.cli.errors import run
from tieback.data.rankings import ranking_to_pairs

ranking_to_pairs("not a row")
run("not a function")
"""


def test_a_wrong_argument_type_for_a_function_of_another_package_is_reported(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(PLANTED)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", str(planted)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    errors = [line.split("error: ")[1] for line in done.stdout.splitlines() if "error: " in line]
    assert len(errors) == 2, done.stdout
    assert errors[0].startswith('Argument 1 to "ranking_to_pairs" has incompatible type "str"')
    assert errors[1].startswith('Argument 1 to "run" has incompatible type "str"')


def test_an_import_against_the_one_way_breaks_a_contract(tmp_path: Path) -> None:
    """In a copy of the project, by a planted import for each arrow that must not be."""
    for name in ("__init__.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    rooms = ("classic_rl", "cli", "data", "pipeline", "ppo_core", "reward_functions", "reward_model")
    for room in rooms:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "typings").mkdir()
    (tmp_path / "typings" / "tieback").symlink_to("..")
    assert broken(tmp_path) == []
    arrows = {
        "ppo_core/gae_by_others.py": ("tieback.cli.errors", "ppo_core imports nothing of ours"),
        "classic_rl/dqn.py": ("tieback.pipeline.stage", "classic_rl"),
        "reward_functions/vader.py": ("tieback.pipeline.stage", "Rooms, from the top down"),
        "data/errors.py": ("tieback.reward_model.head", "Rooms, from the top down"),
        "pipeline/evaluate.py": ("tieback.pipeline.ppo", "No stage script imports another"),
        "pipeline/scorers.py": (
            "tieback.pipeline.trainer.config",
            "Rooms of the pipeline, from the top down",
        ),
        "ppo_core/update.py": ("transformers", "ppo_core needs torch and accelerate alone"),
    }
    for file, (module, contract) in arrows.items():
        path = tmp_path / file
        before = path.read_text() if path.exists() else None
        path.write_text(f"import {module}\n" + (before or ""))
        found = broken(tmp_path)
        assert any(contract in name for name in found), f"{file} → {module}: {found}"
        if before is None:
            path.unlink()
        else:
            path.write_text(before)


def broken(folder: Path) -> list[str]:
    """Names of the contracts that do not hold in a project."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=folder,
        env={"PYTHONPATH": str(folder / "typings"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    return [line.removesuffix(" BROKEN") for line in done.stdout.splitlines() if line.endswith(" BROKEN")]
