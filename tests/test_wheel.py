"""The wheel: one top-level name, with all that it needs, in a folder where the user's own files have our folders' names."""

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SNIPPET = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
DECOYS = ("data.py", "pipeline.py", "reward_model/__init__.py", "classic_rl/__init__.py", "cli.py")


def run(*command: str, cwd: Path, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a clean copy of the project, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        source, copy = ROOT / name, folder / "source" / name
        if source.is_file() and not name.startswith(("tests/", "docs/")):
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--wheel-dir", str(folder))
    done = run("-m", "pip", "wheel", *options, str(folder / "source"), cwd=folder)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the wheel installed into it, and nothing else."""
    site = tmp_path_factory.mktemp("site")
    done = run("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=site)
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture(scope="module")
def users_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    for name in DECOYS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"raise RuntimeError('imported {name} of the user')\n")
    return folder


def test_its_only_top_level_name_is_tieback(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"tieback"}


def test_it_holds_every_module_and_every_file_that_they_read(wheel: Path) -> None:
    names = {name.removeprefix("tieback/") for name in zipfile.ZipFile(wheel).namelist()}
    rooms = ("accelerate_configs", "classic_rl", "cli", "data", "pipeline", "ppo_core", "reward_model")
    ours = {
        path.relative_to(ROOT).as_posix()
        for room in rooms
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".yaml", ".js", ".css")
    }
    assert len(ours) > 100
    assert ours - names == set()
    assert {"__init__.py", "py.typed"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("source", ["wheel", "editable"])
def test_it_is_imported_beside_files_of_the_users_own(
    source: str, installed: Path, users_folder: Path
) -> None:
    assert SNIPPET is not None
    imports = next(line for line in SNIPPET[1].splitlines() if line.startswith("from tieback import"))
    program = (
        f"{imports}\nfrom tieback import RewardScorer\nimport tieback\n"
        "from tieback.data.helpdesk import make_split\nassert len(make_split('ppo', 3, 0)) == 3\n"
        "print(tieback.__file__, PPOTrainer.__module__, PPOConfig.__module__, RewardScorer.__module__)"
    )
    done = run("-c", program, cwd=users_folder, site=installed if source == "wheel" else None)
    assert done.returncode == 0, done.stderr
    file, *modules = done.stdout.split()
    expected = installed / "tieback" if source == "wheel" else ROOT
    assert Path(file).resolve() == (expected / "__init__.py").resolve()
    assert all(module.startswith("tieback.") for module in modules)


@pytest.mark.slow
def test_the_command_has_every_program_and_refuses_in_one_line(installed: Path, users_folder: Path) -> None:
    start = ("-c", "from tieback.cli.main import main; main()")
    done = run(*start, "gridworld", "--episodes", "300", cwd=users_folder, site=installed)
    assert done.returncode == 0, done.stderr
    assert (users_folder / "runs/gridworld/metrics.json").is_file()
    done = run(
        *start, "collect", "--config", "smoke", "--num_respones", "2", cwd=users_folder, site=installed
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.endswith("there is no setting `--num_respones`. Did you mean `--num_responses`?")
    done = run(*start, "collct", cwd=users_folder, site=installed)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "Did you mean `collect`?" in done.stderr
