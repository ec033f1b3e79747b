"""The stages on two CPU processes (gloo), as `accelerate launch` starts them."""

import json
import sys
from pathlib import Path

import launching
import pytest
import toy
from safetensors.torch import load_file

from tieback.pipeline import collect

pytestmark = pytest.mark.backends

RECIPES = launching.ROOT / "pipeline" / "recipes"
STAGES = ("sft", "collect", "reward", "ppo", "evaluate")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


# One launch for all three stages, as most of a launch is the import of the libraries.
DRIVER = """
import importlib, sys
from tieback.cli.errors import run
recipes, run_dir = sys.argv[1:]
more = {"reward": ["--train_sampling_strategy", "batch_rebalance", "--gradient_accumulation_steps", "2"]}

def main():
    for stage in ("sft", "collect", "reward"):
        sys.argv = [stage, "--config", f"{recipes}/{stage}.yaml", "--run_dir", run_dir, *more.get(stage, [])]
        importlib.import_module(f"tieback.pipeline.{stage}").main()

run(main)
"""


@pytest.fixture(scope="module")
def printed(run_dir):
    """What the stages of the smoke recipe print on two processes."""
    (run_dir / "driver.py").write_text(DRIVER)
    config = launching.write_config(run_dir, "multi_gpu")
    done = launching.launch(config, run_dir / "driver.py", str(RECIPES / "smoke"), str(run_dir), cwd=run_dir)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@pytest.mark.slow
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


@pytest.mark.slow
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


# All stages under each backend, script by script.


def metrics_of(folder: Path, backend: str) -> dict[str, float]:
    """What the five stages of the smoke recipe measured under a backend, `<stage>: <metric>`, but for times."""
    run = folder / backend
    run.mkdir()
    metrics = {}
    for stage in STAGES:
        script = launching.ROOT / "pipeline" / f"{stage}.py"
        config = launching.write_config(folder, backend)
        done = launching.launch(config, script, "--config", "smoke", "--run_dir", str(run))
        assert done.returncode == 0, f"{stage}: {done.stderr[-3000:]}"
        measured = json.loads((run / stage / "metrics.json").read_text())
        same = toy.without_measurements(measured)
        metrics |= {f"{stage}: {name}": value for name, value in same.items()}
    return metrics


@pytest.fixture(scope="module")
def replicated(tmp_path_factory):
    """Those of DDP."""
    return metrics_of(tmp_path_factory.mktemp("replicated"), "multi_gpu")


@pytest.mark.slow
@pytest.mark.parametrize("backend", [name for name in launching.BACKENDS if name != "multi_gpu"])
def test_the_five_stages_measure_the_same_under_each_backend(tmp_path, replicated, backend):
    metrics = metrics_of(tmp_path, backend)
    assert len(metrics) > 50
    assert metrics == pytest.approx(replicated, rel=1e-3, abs=1e-4)
