"""The tests of the core notice when it is broken: each mutation of its source makes one of them fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What is broken, where, from what, to what, and the test file that must notice.
MUTATIONS = {
    "the ratio is not clipped": (
        "objective.py",
        "ratio.clamp(lower, upper) * advantages",
        "ratio * advantages",
        "test_ppo_core_objective.py",
    ),
    "the greater objective is taken": (
        "objective.py",
        "torch.minimum(ratio * advantages",
        "torch.maximum(ratio * advantages",
        "test_ppo_core_objective.py",
    ),
    "GAE forgets lambda": (
        "advantages.py",
        "(next_value + gae_lambda * next_advantage)",
        "(next_value + next_advantage)",
        "test_ppo_core_advantages.py",
    ),
    "GAE does not recur": (
        "advantages.py",
        "next_advantage = torch.where(mask[:, t], advantage, next_advantage)",
        "next_advantage = torch.zeros_like(next_advantage)",
        "test_ppo_core_advantages.py",
    ),
    "GAE steps on what is masked": (
        "advantages.py",
        "next_value = torch.where(mask[:, t], values[:, t], next_value)",
        "next_value = values[:, t]",
        "test_ppo_core_advantages.py",
    ),
    "the mask is left out of sums": (
        "advantages.py",
        "return torch.where(mask.bool(), x, 0.0).sum()",
        "return x.sum()",
        "test_ppo_core_advantages.py",
    ),
    "the value is not clipped": (
        "objective.py",
        "torch.clamp(values, old_values - value_clip_range, old_values + value_clip_range)",
        "values",
        "test_ppo_core_objective.py",
    ),
    "the smaller value loss is taken": (
        "objective.py",
        "torch.maximum(\n            _error_loss(values",
        "torch.minimum(\n            _error_loss(values",
        "test_ppo_core_objective.py",
    ),
    "the KL in the loss forgets that an older policy acted": (
        "objective.py",
        "torch.where(finite, ratio * estimate, torch.nan)",
        "torch.where(finite, estimate, torch.nan)",
        "test_ppo_core_objective.py",
    ),
    "a return belongs to the bin below it alone": (
        "value_bins.py",
        "(1 - share) * lower + share * upper",
        "lower",
        "test_ppo_core_value_bins.py",
    ),
    "importance weights are ignored": (
        "objective.py",
        "torch.where(finite, elements * safe, torch.nan)",
        "torch.where(finite, elements, torch.nan)",
        "test_ppo_core_update.py",
    ),
    "the coefficient of a term is ignored": (
        "step.py",
        "term.coefficient * sums[name]",
        "sums[name]",
        "test_ppo_core_update.py",
    ),
}


def copy_core(folder: Path) -> Path:
    """Make a package `tieback` in `folder` that has the core alone."""
    core = folder / "tieback" / "ppo_core"
    shutil.copytree(ROOT / "ppo_core", core, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "__init__.py", core.parent)
    return core


def run_tests(core: Path, file: str) -> subprocess.CompletedProcess[str]:
    """Run a test file against the copy of the core in `core`, a folder `tieback/ppo_core`."""
    probe = "import sys, tieback.ppo_core; sys.stdout.write(tieback.ppo_core.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(core.parents[1]), "OMP_NUM_THREADS": "1"}
    where = subprocess.run(
        [sys.executable, "-c", probe],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=core.parent,
    ).stdout
    assert Path(where).parent == core, "the mutated core must be the one that is tested"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests" / file),
    ]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=core.parent
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_core_is_noticed(name: str, tmp_path: Path) -> None:
    module, old, new, file = MUTATIONS[name]
    core = copy_core(tmp_path)
    source = (core / module).read_text(encoding="utf-8")
    assert source.count(old) == 1, "the line that this test breaks has changed: write the mutation anew"
    (core / module).write_text(source.replace(old, new), encoding="utf-8")
    result = run_tests(core, file)
    assert result.returncode == 1, result.stdout[-2000:] + result.stderr[-2000:]
    assert " failed" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted({mutation[3] for mutation in MUTATIONS.values()}))
def test_the_core_as_it_is_passes_in_the_same_way(file: str, tmp_path: Path) -> None:
    core = copy_core(tmp_path)
    result = run_tests(core, file)
    assert result.returncode == 0, result.stdout[-2000:]
