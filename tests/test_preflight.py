"""The preflight: a sound run passes, each fault that is put in is found, and nothing is written."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy
import yaml

from tieback.pipeline import preflight
from tieback.pipeline import preflight_checks as checks
from tieback.pipeline.preflight_checks import Verdict
from tieback.pipeline.rollout.sampler import TransformersSampler
from tieback.reward_model.scoring import RewardScorer

JUDGES = """
def two_alike(completions, **columns):
    return [1.0 for _ in completions]
"""


def verdicts_of(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict[str, Any]:
    """What main() finds in a folder of `toy.write_ppo_home`: verdicts by check, and its exit status."""
    written = folder / "findings.json"
    argv = ["preflight", "--config", str(folder / "ppo.yaml"), "--json", str(written), *flags]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.chdir(folder)
    status = 0
    try:
        preflight.main()
    except SystemExit as stop:
        status = int(str(stop.code))
    found = json.loads(written.read_text())
    written.unlink()
    return {"status": status, **{finding["check"]: finding["verdict"] for finding in found}}


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)


def test_a_sound_run_passes_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.write_ppo_home(tmp_path, learning_rate=1e-2)
    tok = toy.tokenizer()
    other = [{"prompt": tok.decode([5, 6, 7, 8])}]
    (tmp_path / "other.jsonl").write_text(json.dumps(other[0]) + "\n")
    (tmp_path / "evaluate.yaml").write_text(
        yaml.safe_dump({"dataset_name": str(tmp_path / "other.jsonl"), "dataset_test_split": "train"})
    )
    figures = {"accuracy/held_out": 0.8, "num_pairs/held_out": 100}
    (tmp_path / "reward" / "metrics.json").write_text(json.dumps(figures))
    before = files_of(tmp_path)
    found = verdicts_of(tmp_path, monkeypatch)
    assert found.pop("status") == 0
    assert Verdict.FAILED not in found.values()
    assert {name for name, verdict in found.items() if verdict == Verdict.PASSED} >= {
        "memory", "held-out prompts", f"preferences of {tmp_path / 'reward'}", "scores of reward_model",
        "scores of reward_model, alone and among others", "scores of slow, alone and among others",
        "sampling against scoring", "critic", "time",
    }  # fmt: skip
    assert files_of(tmp_path) == before
    assert "0 failed" in capsys.readouterr().out


def test_a_judge_to_whom_all_completions_are_alike_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.write_ppo_home(tmp_path)
    (tmp_path / "judges.py").write_text(JUDGES)
    found = verdicts_of(
        tmp_path, monkeypatch, "--reward_funcs", "judges:two_alike", "--critic_init", "policy"
    )
    assert (found["status"], found["scores of two_alike"]) == (1, Verdict.FAILED)
    assert "sampling against scoring" not in found


def test_a_sampler_with_another_temperature_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.write_ppo_home(tmp_path)
    make = TransformersSampler.__init__

    def warmer(self: TransformersSampler, *args: Any) -> None:
        make(self, *args)
        self.config.temperature = 1.1

    monkeypatch.setattr(TransformersSampler, "__init__", warmer)
    found = verdicts_of(tmp_path, monkeypatch, "--check_sampling", "false")
    assert (found["status"], found["sampling against scoring"]) == (1, Verdict.FAILED)
    assert "time" not in found


def test_a_reward_model_whose_scores_depend_on_company_and_prompts_that_evaluate_has_too_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.write_ppo_home(tmp_path)
    (tmp_path / "evaluate.yaml").write_text("dataset_test_split: train\n")  # of what ppo.yaml names
    score = RewardScorer._score_batch

    def padded(self: RewardScorer, sequences: list[list[int]]) -> list[float]:
        return [value + 0.5 * len(sequences) for value in score(self, sequences)]

    monkeypatch.setattr(RewardScorer, "_score_batch", padded)
    found = verdicts_of(tmp_path, monkeypatch)
    assert found["status"] == 1
    assert found["held-out prompts"] == Verdict.FAILED
    assert found["scores of reward_model, alone and among others"] == Verdict.FAILED
    assert found["scores of slow, alone and among others"] == Verdict.PASSED


def test_without_the_memory_nothing_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.write_ppo_home(tmp_path)
    monkeypatch.setattr(
        "tieback.pipeline.preflight.psutil.virtual_memory", lambda: SimpleNamespace(available=1000)
    )
    monkeypatch.setattr(preflight, "make_trainer", lambda *_: pytest.fail("a model was loaded"))
    found = verdicts_of(tmp_path, monkeypatch, "--max_prompt_length", "20")
    assert found == {"status": 1, "memory": Verdict.FAILED}


def test_a_critic_that_cannot_learn_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.write_ppo_home(tmp_path)
    found = verdicts_of(tmp_path, monkeypatch, "--critic_learning_rate", "1e-12")
    assert (found["status"], found["critic"]) == (0, Verdict.LOOK)


def test_what_the_figures_say() -> None:
    passed, look, failed = Verdict
    assert checks.prompts_of_training(list("abcdefghij"), 3).verdict == passed
    assert checks.prompts_of_training(list("aabbcdefgh"), 0).verdict == look
    assert checks.prompts_of_training(list("abcdefghij"), 4).verdict == look
    assert checks.prompts_of_evaluation("ab", "cdefghijklmnopqrstuvw").verdict == passed
    assert checks.prompts_of_evaluation("ab", "acdefghijklmnopqrstuv").verdict == look  # 1 of 21
    assert checks.prompts_of_evaluation("ab", "abcdefghijklmnopqrstu").verdict == failed  # 2 of 21
    texts = [str(number) for number in range(100)]
    for cut, penalty, verdict in ((50, 1, passed), (51, 1, look), (95, 1, look), (96, 1, failed), (100, 0, look)):  # fmt: skip
        assert checks.completions(texts, [row < cut for row in range(100)], 8, penalty).verdict == verdict
    assert checks.completions([*texts[:49], *["yes"] * 51], [False] * 100, 8, 1).verdict == look
    assert checks.spread_of_scores("f", [1.0, 2.0, float("nan")], [3, 3, 9]).verdict == passed
    assert checks.spread_of_scores("f", [float("nan")] * 3, [3, 3, 9]).verdict == failed
    longer = checks.spread_of_scores("f", [1.0, 2.0, 3.0], [10, 20, 31])
    assert (longer.verdict, "make completions longer" in longer.advice) == (look, True)
    assert "make completions shorter" in checks.spread_of_scores("f", [3.0, 2.0, 1.0], [10, 20, 31]).advice
    for difference, is_model, verdict in ((0.04, True, passed), (0.2, True, look), (0.4, True, failed), (0.4, False, look)):  # fmt: skip
        assert checks.same_in_any_company("f", [0.0], [difference], 1.0, is_model).verdict == verdict
    for accuracy, verdict in ((0.39, failed), (0.45, look), (0.59, look), (0.61, passed)):
        assert checks.preference_of("f", accuracy, 100).verdict == verdict  # 50 ± 9.8%
    for kl, verdict in ((0.0, look), (0.01, passed), (0.2, look)):
        assert checks.size_of_steps(kl, 0.1).verdict == verdict
    for before, after, verdict in ((0.0, 0.3, passed), (-0.5, -0.1, look), (0.6, 0.5, look), (torch.nan, torch.nan, look)):  # fmt: skip
        assert checks.fit_of_critic(before, after, 8).verdict == verdict
    for estimate, on_cpu, verdict in ((90, False, passed), (91, False, look), (101, False, failed), (41, True, passed), (42, True, look)):  # fmt: skip
        assert checks.memory_needed(estimate, 100, on_cpu).verdict == verdict
    assert "about 2.0 hours: 720 iterations of 10 seconds" in checks.time_needed(10, 720).found
    assert "about 12 minutes" in checks.time_needed(10, 72).found
