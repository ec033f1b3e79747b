"""Two processes under each backend against one: the same global batches give the same figures and weights."""

import json
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
import toy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from workers import ppo_cases

pytestmark = pytest.mark.backends

WORKER = Path(ppo_cases.__file__)
SHARDED = ("fsdp2", "zero3")

Results = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("distributed")
    toy.write_ppo_home(home, max_steps=2, save_total_limit=1)
    return home


@pytest.fixture(scope="module")
def one(folder: Path) -> Results:
    """What one process comes to."""
    original = ppo_cases.TransformersSampler.sample
    try:
        return ppo_cases.run(folder / "one", 1)
    finally:
        ppo_cases.TransformersSampler.sample = original


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) for name in launching.BACKENDS],
)
def backend(request: pytest.FixtureRequest) -> str:
    """A shipped configuration."""
    return request.param


@pytest.fixture(scope="module")
def two(folder: Path, backend: str) -> list[Results]:
    """What each of two processes came to."""
    results = folder / backend
    results.mkdir()
    done = launching.launch(launching.write_config(folder, backend), WORKER, str(results), timeout=500)
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(results / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


# The mathematics, in fp32.


@pytest.mark.parametrize("case", ppo_cases.CASES)
def test_weights_are_those_of_one_process_to_rounding(one: Results, two: list[Results], case: str) -> None:
    torch.testing.assert_close(two[0][case]["weights"], one[case]["weights"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ppo_cases.CASES)
def test_every_figure_is_that_of_one_process_to_rounding(one: Results, two: list[Results], case: str) -> None:
    logs, expected = two[0][case]["logs"], one[case]["logs"]
    assert len(logs) == len(expected) >= 1
    assert "policy/loss" in logs[0]
    assert any("eval_reward/mean" in entry for entry in logs) == (case == "everything")
    for entry, other in zip(logs, expected, strict=True):
        for timing in ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second"):
            entry.pop(timing, None), other.pop(timing, None)
        # Norms and variances are sums of squares of thousands of rounded numbers.
        assert entry == pytest.approx(other, rel=2e-5, abs=1e-5)


def test_the_kl_coefficient_and_the_reward_statistics_are_those_of_one_process_on_both(
    one: Results, two: list[Results]
) -> None:
    assert one["everything"]["kl"]["value"] != 0.05
    assert one["everything"]["moments"]["count"] == 24
    for rank in range(2):
        assert two[rank]["everything"]["kl"] == pytest.approx(one["everything"]["kl"], rel=1e-5)
        assert two[rank]["everything"]["moments"] == pytest.approx(one["everything"]["moments"], rel=1e-5)


def test_the_policy_stays_where_it_is_while_the_critic_warms_up(
    folder: Path, backend: str, two: list[Results]
) -> None:
    assert two
    first, last = (folder / backend / "warm-up" / f"checkpoint-{step}" for step in (1, 2))
    before = load_file(folder / "sft" / "model.safetensors")
    torch.testing.assert_close(load_file(first / "model.safetensors"), before, rtol=0, atol=0)
    assert not torch.equal(
        load_file(last / "model.safetensors")["model.norm.weight"], before["model.norm.weight"]
    )


def test_the_step_that_went_too_far_is_not_taken(one: Results, two: list[Results]) -> None:
    steps = [results["target KL"]["steps"] for results in (one, *two)]
    assert steps[0] == steps[1] == steps[2]
    assert 1 <= steps[0] < 6


def test_evaluation_before_training_is_that_of_one_process(one: Results, two: list[Results]) -> None:
    (entry,), (other,) = two[0]["evaluation"], one["evaluation"]
    assert entry == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_processes_sample_as_many_batches_until_each_has_prompts_that_are_scored_unlike(
    one: Results, two: list[Results]
) -> None:
    assert one["dynamic sampling"]["unlike"]
    assert all(results["dynamic sampling"]["unlike"] for results in two)
    logs = [results["dynamic sampling"]["logs"] for results in two]
    assert [log["rollout/batches"] for log in logs[0]] == [log["rollout/batches"] for log in logs[1]]
    assert max(log["rollout/batches"] for log in logs[0]) > 1


# Checkpoints.


def test_two_processes_save_what_they_trained_for_plain_transformers_to_load(
    folder: Path, backend: str, two: list[Results]
) -> None:
    weights = two[0]["everything"]["weights"]
    last = folder / backend / "everything" / "checkpoint-3"
    models = {
        "policy.": AutoModelForCausalLM.from_pretrained(last),
        "critic.": AutoModelForSequenceClassification.from_pretrained(last / "value_model"),
    }
    for prefix, model in models.items():
        state = model.state_dict()
        assert len(state) == sum(name.startswith(prefix) for name in weights)
        for name, tensor in state.items():
            assert torch.equal(tensor, weights[prefix + name]), name


@pytest.mark.parametrize("case", ppo_cases.RESUMED)
def test_two_processes_resume_bit_for_bit(folder: Path, backend: str, two: list[Results], case: str) -> None:
    checkpoint = folder / backend / case / f"checkpoint-{ppo_cases.RESUMED[case]}"
    for rank in range(2):
        assert (checkpoint / f"rng_state_{rank}.pth").is_file()
        resumed, straight = two[rank][f"{case} resumed"], two[rank][case]
        torch.testing.assert_close(resumed["weights"], straight["weights"], rtol=0, atol=0)
        assert resumed["kl"] == straight["kl"]
        assert resumed["moments"] == straight["moments"]
    assert two[0][case]["weights"]


def test_a_signal_to_one_process_stops_both_after_the_same_iteration(two: list[Results]) -> None:
    for rank in range(2):
        assert two[rank]["interrupted"] == (2, True, ["checkpoint-2"])


def test_the_stage_gives_the_models_and_metrics_of_one_process(
    folder: Path, backend: str, one: Results, two: list[Results]
) -> None:
    assert one
    assert two
    for name in ("model.safetensors", "value_model/model.safetensors"):
        saved, expected = (load_file(folder / run / "ppo" / name) for run in (backend, "one"))
        torch.testing.assert_close(saved, expected, rtol=0, atol=1e-6)
    metrics, expected = (
        toy.without_measurements(json.loads((folder / run / "ppo" / "metrics.json").read_text()))
        for run in (backend, "one")
    )
    assert metrics == pytest.approx(expected, rel=2e-5, abs=1e-5)
    assert metrics["train/iterations"] == 2


# bf16.


def test_in_bf16_log_ratios_and_values_are_on_a_fine_grid(two: list[Results]) -> None:
    for results in two:
        for changes in (results["bf16"]["log ratios"], results["bf16"]["value changes"]):
            assert len(changes) >= 12
            assert (changes != 0).all()
            assert len(set(changes.tolist())) == len(changes)
            # Rounded to bf16, log-probabilities of about 5 nats would change by 1/32 at least.
            assert changes.abs().min() < 0.01


def test_in_bf16_the_figures_are_those_of_fp32_within_two_hundredths(
    one: Results, two: list[Results]
) -> None:
    (entry,), (exact,) = two[0]["bf16"]["logs"], one["fp32"]["logs"]
    assert entry["value/loss"] == pytest.approx(exact["value/loss"], rel=0.02)
    assert entry["policy/entropy"] == pytest.approx(exact["policy/entropy"], rel=0.02)
    assert entry["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.02)


def test_in_bf16_policy_and_reference_are_the_same_at_first_and_the_reference_stays(
    two: list[Results],
) -> None:
    for results in two:
        assert results["bf16"]["logs"][0]["kl/ref"] == 0
        assert results["bf16"]["reference drift"] == 0


# Which process holds what.


def test_models_loaded_by_name_give_the_weights_of_one_process(one: Results, two: list[Results]) -> None:
    results, expected = two[0]["sharding"], one["sharding"]
    torch.testing.assert_close(results["weights"], expected["weights"], rtol=0, atol=1e-6)
    assert [entry.keys() for entry in results["logs"]] == [entry.keys() for entry in expected["logs"]]


def test_every_role_is_sharded_where_the_policy_is(backend: str, two: list[Results]) -> None:
    for results in two:
        shares = results["sharding"]["shares"]
        expected = 0.5 if backend in SHARDED else 1.0
        # But for the head, of a single row.
        assert shares == pytest.approx(dict.fromkeys(shares, expected), abs=2e-3)
        assert shares.keys() == {"policy", "critic", "reference", "reward"}


def test_frozen_models_are_whole_where_that_is_asked_for(backend: str, two: list[Results]) -> None:
    """With replicate_frozen_models, in workers/sharding_checks.py."""
    for results in two:
        replicated = results["sharding"]["replicated"]
        assert replicated["shares"]["reference"] == replicated["shares"]["reward"] == 1
        assert replicated["shares"]["policy"] == (0.5 if backend in SHARDED else 1)
        assert replicated["evaluation"] == pytest.approx(
            results["sharding"]["evaluation"], rel=1e-6, abs=1e-6
        )


def test_no_role_stays_gathered_after_an_iteration(backend: str, two: list[Results]) -> None:
    if backend != "fsdp2":
        pytest.skip("DDP and ZeRO-2 hold models whole; ZeRO-3 keeps parameters as small as these.")
    for results in two:
        shares = results["sharding"]["shares afterwards"]
        assert shares == pytest.approx(dict.fromkeys(shares, 0.5), abs=2e-3)


def test_a_process_holds_no_more_gradient_than_its_shard_in_fp32(backend: str, two: list[Results]) -> None:
    if backend != "fsdp2":
        pytest.skip("DDP holds whole gradients; DeepSpeed keeps its own.")
    for results in two:
        gradients = results["sharding"]["gradients"]
        assert len(gradients) > 4 * 2  # epochs, minibatches: of several micro-batches each
        for share, dtypes in gradients:
            assert share == pytest.approx(0.5, abs=2e-3)
            assert dtypes == ["torch.float32"]


def test_generation_gathers_the_policy_alone_and_processes_sample_as_long_as_they_like(
    backend: str, two: list[Results]
) -> None:
    lengths = [results["sharding"]["generation"]["lengths"] for results in two]
    assert lengths[0] != lengths[1]
    assert all(1 <= length <= 6 for rank in lengths for length in rank)
    for results in two:
        critic_too = backend not in SHARDED
        generation = results["sharding"]["generation"]
        assert set(generation["whole"]) == {(True, critic_too)}
        if backend == "fsdp2":  # ZeRO-3 keeps parameters as small as these
            assert generation["whole afterwards"] == [False]
