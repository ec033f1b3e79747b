"""The course: each notebook is shipped with its outputs, and runs from its first cell to its last."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parents[1] / "notebooks"
# What stands in the place of the cell tagged `parameters`: the same course in seconds.
SMALL = {
    "1_gridworld": "EPISODES = 300",
    "2_cartpole": "TOTAL_STEPS, EVALUATION_EPISODES = 6_000, 4",
    "3_pong": "TOTAL_STEPS, EVALUATION_GAMES, CARTPOLE_STEPS = 6_000, 2, 8_192",
    "4_rlhf": 'RECIPE, RUN = "smoke", "run"',
}


def code_cells(name: str) -> list[Any]:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_notebook_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_it_is_shipped_as_it_ran_in_order_and_without_a_warning(name: str) -> None:
    cells = code_cells(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    # Of pictures and videos the letters are chance.
    said = re.sub(r"[A-Za-z0-9+/=\\n]{200,}", "", " ".join(str(output) for output in outputs))
    assert not re.search(r"/(home|root|work|tmp)/", said), (
        "an output names a folder of the machine that made it"
    )
    assert any("image/" in " ".join(output.get("data", {})) for output in outputs)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 600_000


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name: str, tmp_path: Path) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    before = set(re.findall(r"^([A-Z_]+) =", parameters.source, re.M))
    assert before == set(re.findall(r"[A-Z_]{2,}", SMALL[name]))
    parameters.source = SMALL[name]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    if name == "4_rlhf" and shutil.which("chromium"):
        take_pictures(tmp_path / "run", tmp_path)


def take_pictures(run_dir: Path, images: Path) -> None:
    """The pictures of the documents, of the run that the notebook leaves behind."""
    script = FOLDER.parent / "docs" / "take_pictures.py"
    subprocess.run([sys.executable, str(script), str(run_dir), str(images)], check=True)
    for picture in ("report", "replay", "label", "compare"):
        with (
            Image.open(images / f"{picture}.png") as taken,
            Image.open(script.parent / "images" / f"{picture}.png") as shown,
        ):
            assert abs(taken.width - shown.width) < 30
            assert len(taken.getcolors()) > 5
