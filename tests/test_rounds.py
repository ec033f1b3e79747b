"""Rounds: where their stages lie, whose responses they collect, and which pairs their reward model learns from."""

import json
import subprocess
from pathlib import Path

import pytest

from tieback.pipeline.arguments import RunArguments, UsageError
from tieback.pipeline.collect import newest_policy
from tieback.pipeline.reward import RewardArguments, collected_pairs, load_pairs

ROOT = Path(__file__).parents[1]


def touch(path, text="{}"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def pair(question):
    return json.dumps({"prompt": question, "chosen": "yes", "rejected": "no"}) + "\n"


def test_stages_of_later_rounds_lie_beside_those_of_the_first_but_for_sft(tmp_path):
    first, second = RunArguments(run_dir="r"), RunArguments(run_dir="r", round=2)
    assert [str(first.stage_dir(stage)) for stage in ("sft", "collect", "ppo")] == [
        "r/sft",
        "r/collect",
        "r/ppo",
    ]
    assert [str(second.stage_dir(stage)) for stage in ("sft", "collect", "ppo")] == [
        "r/sft",
        "r/round2/collect",
        "r/round2/ppo",
    ]
    with pytest.raises(UsageError, match="round counts from 1"):
        RunArguments(round=0)
    with pytest.raises(UsageError, match=r"collect\.py --run_dir r --round 2.*ROUND=2"):
        second.require("collect", "responses.jsonl")


def test_responses_are_the_newest_policys(tmp_path):
    touch(tmp_path / "sft" / "metrics.json")
    touch(tmp_path / "ppo" / "metrics.json")
    run = str(tmp_path)
    assert newest_policy(RunArguments(run_dir=run)) == tmp_path / "sft"
    assert newest_policy(RunArguments(run_dir=run, round=2)) == tmp_path / "ppo"
    with pytest.raises(UsageError, match=r"round2/ppo"):
        newest_policy(RunArguments(run_dir=run, round=3))
    touch(tmp_path / "round2" / "ppo" / "metrics.json")
    assert newest_policy(RunArguments(run_dir=run, round=3)) == tmp_path / "round2" / "ppo"


def test_the_reward_model_learns_from_the_pairs_of_all_rounds_whoever_ranked_them(tmp_path):
    simulated = touch(tmp_path / "collect" / "preferences.jsonl", pair("Is it?") + pair("Is it now?"))
    touch(tmp_path / "collect" / "responses.jsonl")
    touch(tmp_path / "round2" / "collect" / "responses.jsonl")
    second = RunArguments(run_dir=str(tmp_path), round=2)
    with pytest.raises(UsageError, match=r"round2/collect are not ranked.*pipeline\.label"):
        collected_pairs(second)
    by_people = touch(tmp_path / "round2" / "label" / "preferences.jsonl", pair("And then?"))
    assert collected_pairs(second) == [str(simulated), str(by_people)]
    assert collected_pairs(RunArguments(run_dir=str(tmp_path))) == [str(simulated)]
    rows = load_pairs(collected_pairs(second), RewardArguments(), seed=0)
    assert rows.dataset["prompt"] == ["Is it?", "Is it now?", "And then?"]


def what_make_runs(*variables):
    command = ["make", "--dry-run", "--no-print-directory", "rlhf", "RUN=r", *variables]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [line for line in printed.splitlines() if "--run_dir" in line or "pipeline.label" in line]


def test_make_runs_the_rounds_in_order():
    lines = what_make_runs("ROUNDS=2", "ARGS=--seed 3")
    stages = ["sft", *["collect", "reward", "ppo", "evaluate"] * 2]
    assert [line.split("pipeline/")[1].split(".py")[0] for line in lines] == stages
    assert ["--round 2" in line for line in lines] == [False] * 5 + [True] * 4
    assert all(line.endswith("--seed 3") for line in lines)
    assert not any("--annotator" in line for line in lines)


def test_make_waits_for_people_after_each_collect():
    lines = what_make_runs("ROUNDS=2", "RANKED_BY=people")
    assert [number for number, line in enumerate(lines) if "--annotator none" in line] == [1, 6]
    assert [number for number, line in enumerate(lines) if "pipeline.label" in line] == [2, 7]
    assert (
        "--responses r/collect/responses.jsonl --output r/label/preferences.jsonl --until_finished"
        in lines[2]
    )
    assert (
        "--responses r/round2/collect/responses.jsonl --output r/round2/label/preferences.jsonl" in lines[7]
    )
