"""Two processes (gloo, CPU) against one: the same global batches give the same figures and weights."""

import json
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
import toy
from safetensors.torch import load_file
from workers import ppo_cases

WORKER = Path(ppo_cases.__file__)

Results = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("distributed")
    toy.write_ppo_home(home, max_steps=2, save_total_limit=1)
    return home


@pytest.fixture(scope="module", params=launching.SHARDED)
def backend(request: pytest.FixtureRequest) -> str:
    """A shipped configuration."""
    return request.param


@pytest.fixture(scope="module")
def two(folder: Path, backend: str) -> list[Results]:
    """What each of two processes came to."""
    results = folder / backend
    results.mkdir()
    done = launching.launch(launching.write_config(folder, backend), WORKER, str(results))
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "[rank" in line)
    return [torch.load(results / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def one(folder: Path) -> Results:
    """What one process comes to."""
    original = ppo_cases.TransformersSampler.sample
    try:
        return ppo_cases.run(folder / "one", 1)
    finally:
        ppo_cases.TransformersSampler.sample = original


@pytest.mark.parametrize("case", ppo_cases.CASES)
def test_weights_are_those_of_one_process_to_rounding(one: Results, two: list[Results], case: str) -> None:
    for rank in range(2):
        torch.testing.assert_close(two[rank][case]["weights"], one[case]["weights"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", ppo_cases.CASES)
def test_every_figure_is_that_of_one_process_to_rounding(one: Results, two: list[Results], case: str) -> None:
    logs, expected = two[0][case]["logs"], one[case]["logs"]
    assert len(logs) == len(expected) >= 1
    assert "policy/loss" in logs[0]
    assert any("eval_reward/mean" in entry for entry in logs) == (case == "everything")
    for entry, other in zip(logs, expected, strict=True):
        for timing in ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second"):
            entry.pop(timing, None), other.pop(timing, None)
        assert entry == pytest.approx(other, rel=2e-4, abs=1e-5)


def test_the_kl_coefficient_and_the_reward_statistics_are_those_of_one_process_on_both(
    one: Results, two: list[Results]
) -> None:
    assert one["everything"]["kl"]["value"] != 0.05
    assert one["everything"]["moments"]["count"] == 24
    for rank in range(2):
        assert two[rank]["everything"]["kl"] == pytest.approx(one["everything"]["kl"], rel=1e-5)
        assert two[rank]["everything"]["moments"] == pytest.approx(one["everything"]["moments"], rel=1e-5)


def test_evaluation_before_training_is_that_of_one_process(one: Results, two: list[Results]) -> None:
    (entry,), (other,) = two[0]["evaluation"], one["evaluation"]
    assert entry == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_two_processes_save_what_they_trained(folder: Path, two: list[Results]) -> None:
    weights = two[0]["everything"]["weights"]
    last = folder / "two" / "everything" / "checkpoint-3"
    for prefix, file in (("policy.", last), ("critic.", last / "value_model")):
        saved = load_file(file / "model.safetensors")
        assert len(saved) == sum(name.startswith(prefix) for name in weights)
        for name, tensor in saved.items():
            assert torch.equal(tensor, weights[prefix + name]), name


def test_two_processes_resume_bit_for_bit(folder: Path, two: list[Results]) -> None:
    for rank in range(2):
        assert (folder / "two" / "everything" / "checkpoint-2" / f"rng_state_{rank}.pth").is_file()
        resumed, straight = two[rank]["resumed"], two[rank]["everything"]
        torch.testing.assert_close(resumed["weights"], straight["weights"], rtol=0, atol=0)
        assert resumed["kl"] == straight["kl"]
        assert resumed["moments"] == straight["moments"]


def test_a_signal_to_one_process_stops_both_after_the_same_iteration(two: list[Results]) -> None:
    for rank in range(2):
        assert two[rank]["interrupted"] == (2, True, ["checkpoint-2"])


def test_the_stage_gives_the_models_and_metrics_of_one_process(
    folder: Path, one: Results, two: list[Results]
) -> None:
    assert one
    assert two
    for name in ("model.safetensors", "value_model/model.safetensors"):
        saved, expected = (load_file(folder / run / "ppo" / name) for run in ("two", "one"))
        torch.testing.assert_close(saved, expected, rtol=0, atol=2e-6)
    metrics, expected = (
        json.loads((folder / run / "ppo" / "metrics.json").read_text()) for run in ("two", "one")
    )
    metrics.pop("train/seconds"), expected.pop("train/seconds")
    assert metrics == pytest.approx(expected, rel=2e-4, abs=1e-5)
    assert metrics["train/iterations"] == 2
