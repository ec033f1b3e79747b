"""The stages with vLLM as sampler, on two CPU processes, each with an engine of its own."""

import json
import shutil
from pathlib import Path
from typing import Any

import launching
import pytest
import yaml

from benchmarks.side_by_side import ours, take_turns

RECIPE = launching.ROOT / "pipeline" / "recipes" / "smoke"
SAMPLER = ("--sampler", "vllm", "--max_prompt_length", "64")


def run_stage(stage: str, backend: str, folder: Path, run: Path, *flags: str) -> None:
    """Run a stage of the smoke recipe in `folder`, or fail with what it said."""
    config = launching.write_config(folder, backend)
    script = launching.ROOT / "pipeline" / f"{stage}.py"
    recipe = run.parent / "recipe" / f"{stage}.yaml"
    given = ("--config", str(recipe), "--run_dir", str(run), *flags)
    done = launching.launch(config, script, *given, cwd=folder)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "Error" not in done.stderr, done.stderr[-5000:]


def figures(stage: Path) -> dict[str, Any]:
    return json.loads((stage / "metrics.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages, those that sample by vLLM."""
    folder = tmp_path_factory.mktemp("vllm")
    shutil.copytree(RECIPE, folder / "recipe")
    sft = yaml.safe_load((RECIPE / "sft.yaml").read_text())
    sft["model_config"]["num_attention_heads"] = 1  # vLLM's attention on a CPU wants heads of 32
    (folder / "recipe" / "sft.yaml").write_text(yaml.safe_dump(sft))
    for stage in ("sft", "collect", "reward", "ppo", "evaluate"):
        flags = SAMPLER if stage in ("collect", "ppo", "evaluate") else ()
        run_stage(stage, "multi_gpu", folder, folder / "run", *flags)
    return folder / "run"


@pytest.mark.vllm
def test_every_stage_that_samples_does_so_by_vllm_on_two_processes(run: Path) -> None:
    metrics = figures(run / "ppo")
    assert metrics["rollout/logprob_gap_max"] < 1e-4
    assert metrics["train/iterations"] == 2
    rows = [json.loads(line) for line in (run / "collect" / "responses.jsonl").read_text().splitlines()]
    assert [row["prompt_id"] for row in rows] == [f"{number:06d}" for number in range(12)]
    assert all(len(row["responses"]) == 3 for row in rows)
    assert 0 <= figures(run / "evaluate")["win_rate/ppo_vs_sft"] <= 1


@pytest.mark.vllm
@pytest.mark.parametrize("flags", [(), ("--use_peft", "true")], ids=["whole", "LoRA"])
@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_a_policy_that_is_sharded_is_handed_over_whole(
    run: Path, tmp_path: Path, backend: str, flags: tuple[str, ...]
) -> None:
    """After a step that moves it, what the engine draws from is still what scoring computes."""
    given = ("--output_dir", str(tmp_path / "ppo"), "--learning_rate", "0.01", *SAMPLER, *flags)
    run_stage("ppo", backend, tmp_path, run, *given)
    metrics = figures(tmp_path / "ppo")
    assert metrics["train/iterations"] == 2
    assert metrics["kl/ref"] > 1e-3
    assert metrics["rollout/logprob_gap_max"] < 1e-4


@pytest.mark.vllm
def test_the_benchmarks_worker_does_an_iteration_with_vllm_as_its_sampler() -> None:
    world = json.dumps({"rows": 16, "num_layers": 2})

    def worker(sampler: str) -> list[str]:
        return ours("tieback_ppo.py", world, "fp32", 1, "separate", sampler)

    found = take_turns({"vllm": worker("vllm")}, rounds=1)["vllm"]
    phases = [value for name, value in found.items() if name.startswith("time/")]
    assert 0.9 < sum(phases) / found["wall"] < 1.01
    with pytest.raises(RuntimeError, match="sampler must be transformers or vllm, got 'another'"):
        take_turns({"another": worker("another")}, rounds=1)
