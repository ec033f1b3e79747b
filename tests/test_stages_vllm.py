"""The stages with vLLM as sampler, on two CPU processes, each with an engine of its own."""

import json
import shutil
from pathlib import Path

import launching
import pytest
import yaml

RECIPE = launching.ROOT / "pipeline" / "recipes" / "smoke"
SAMPLER = ("--sampler", "vllm", "--max_prompt_length", "64")


@pytest.mark.vllm
def test_every_stage_that_samples_does_so_by_vllm_on_two_processes(tmp_path: Path) -> None:
    config = launching.write_config(tmp_path, "multi_gpu")
    shutil.copytree(RECIPE, tmp_path / "recipe")
    sft = yaml.safe_load((RECIPE / "sft.yaml").read_text())
    sft["model_config"]["num_attention_heads"] = 1  # vLLM's attention on a CPU wants heads of 32
    (tmp_path / "recipe" / "sft.yaml").write_text(yaml.safe_dump(sft))
    for stage in ("sft", "collect", "reward", "ppo", "evaluate"):
        script = launching.ROOT / "pipeline" / f"{stage}.py"
        flags = SAMPLER if stage in ("collect", "ppo", "evaluate") else ()
        given = (
            "--config",
            str(tmp_path / "recipe" / f"{stage}.yaml"),
            "--run_dir",
            str(tmp_path / "run"),
            *flags,
        )
        done = launching.launch(config, script, *given, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-5000:]
        assert "Error" not in done.stderr, done.stderr[-5000:]
    run = tmp_path / "run"
    metrics = json.loads((run / "ppo" / "metrics.json").read_text())
    assert metrics["rollout/logprob_gap_max"] < 1e-4
    assert metrics["train/iterations"] == 2
    rows = [json.loads(line) for line in (run / "collect" / "responses.jsonl").read_text().splitlines()]
    assert [row["prompt_id"] for row in rows] == [f"{number:06d}" for number in range(12)]
    assert all(len(row["responses"]) == 3 for row in rows)
    assert 0 <= json.loads((run / "evaluate" / "metrics.json").read_text())["win_rate/ppo_vs_sft"] <= 1
