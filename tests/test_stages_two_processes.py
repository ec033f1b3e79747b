"""SFT, collect and reward on two CPU processes (gloo), as `accelerate launch` starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tieback.pipeline import collect

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "pipeline" / "recipes"
CONFIG = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",
    "use_cpu": True,
    "num_processes": 2,
    "num_machines": 1,
    "machine_rank": 0,
    "main_process_port": 0,
    "mixed_precision": "no",
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


# One launch for all three stages, as most of a launch is the import of the libraries.
DRIVER = """
import importlib, sys
recipes, run_dir = sys.argv[1:]
for stage in ("sft", "collect", "reward"):
    sys.argv = [stage, "--config", f"{recipes}/{stage}.yaml", "--run_dir", run_dir]
    importlib.import_module(f"tieback.pipeline.{stage}").main()
"""


@pytest.fixture(scope="module")
def printed(run_dir):
    """What the stages of the smoke recipe print on two processes."""
    (run_dir / "two.yaml").write_text(yaml.safe_dump(CONFIG))
    (run_dir / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(run_dir / "two.yaml")]
    done = subprocess.run(
        [*command, str(run_dir / "driver.py"), str(RECIPES / "smoke"), str(run_dir)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        cwd=run_dir,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def test_every_stage_writes_once(run_dir, printed):
    for stage in ("sft", "collect", "reward"):
        assert printed.count(f"{stage} → ") == 1
        assert json.loads((run_dir / stage / "metrics.json").read_text())
    rows = [json.loads(line) for line in (run_dir / "collect" / "responses.jsonl").read_text().splitlines()]
    assert [row["prompt_id"] for row in rows] == [f"{number:06d}" for number in range(12)]
    assert not list((run_dir / "collect").glob("responses.process*"))
    reward = json.loads((run_dir / "reward" / "metrics.json").read_text())
    assert reward["num_pairs/held_out"] == 9
    assert {"model.norm.weight", "score.weight"} <= load_file(run_dir / "reward" / "model.safetensors").keys()


@pytest.mark.usefixtures("printed")
def test_the_responses_are_those_of_one_process(run_dir, monkeypatch):
    recipe = str(RECIPES / "smoke" / "collect.yaml")
    output = run_dir / "alone"
    arguments = ["--config", recipe, "--run_dir", str(run_dir), "--output_dir", str(output)]
    monkeypatch.setattr(sys, "argv", ["collect.py", *arguments])
    collect.main()
    assert (output / "responses.jsonl").read_bytes() == (run_dir / "collect" / "responses.jsonl").read_bytes()
    assert (output / "preferences.jsonl").read_bytes() == (
        run_dir / "collect" / "preferences.jsonl"
    ).read_bytes()
