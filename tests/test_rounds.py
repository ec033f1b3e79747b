"""Rounds: where their stages lie, whose responses they collect, and which pairs their reward model learns from."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from trl import RewardConfig

from tieback.cli.arguments import parse_flags
from tieback.cli.errors import UsageError
from tieback.pipeline import rlhf
from tieback.pipeline.arguments import RECIPES, RunArguments, parse_stage
from tieback.pipeline.collect import newest_policy
from tieback.pipeline.preference_pairs import PairArguments, collected_pairs, load_pairs
from tieback.pipeline.rlhf import RlhfArguments, commands, launcher

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
    rows = load_pairs(collected_pairs(second), PairArguments(), seed=0)
    assert rows.dataset["prompt"] == ["Is it?", "Is it now?", "And then?"]


def planned(*flags, stage_settings=()):
    (arguments,) = parse_flags(RlhfArguments, "tieback rlhf", ["--run_dir", "r", *flags])
    return commands(arguments, list(stage_settings))


def test_the_rounds_run_in_order_and_every_stage_gets_the_settings():
    lines = planned("--rounds", "2", stage_settings=["--seed", "3"])
    stages = ["sft", *["collect", "reward", "ppo", "evaluate"] * 2]
    assert [Path(line[0]).stem for line in lines] == stages
    for line in lines:
        assert Path(line[0]).is_file()
        assert line[1:5] == [
            "--config",
            str(RECIPES / "helpdesk" / f"{Path(line[0]).stem}.yaml"),
            "--run_dir",
            "r",
        ]
        assert line[-2:] == ["--seed", "3"]
    assert ["--round" in line for line in lines] == [False] * 5 + [True] * 4
    assert lines[5][5:7] == ["--round", "2"]
    assert not any("--annotator" in line or "--dataset_name" in line for line in lines)


def test_people_are_waited_for_after_each_collect():
    lines = planned("--rounds", "2", "--ranked_by", "people")
    assert [number for number, line in enumerate(lines) if line[-2:] == ["--annotator", "none"]] == [1, 6]
    assert [number for number, line in enumerate(lines) if Path(line[0]).stem == "label"] == [2, 7]
    first = ["--responses", "r/collect/responses.jsonl", "--output", "r/label/preferences.jsonl"]
    assert lines[2][1:] == [*first, "--until_finished"]
    assert lines[7][1:5] == [part.replace("r/", "r/round2/") for part in first]


def test_data_of_ones_own_and_a_recipe_of_ones_own_reach_every_stage(tmp_path):
    for stage in ("sft", "collect", "reward", "ppo", "evaluate"):
        (tmp_path / f"{stage}.yaml").write_text("seed: 1\n")
    lines = planned("--recipe", str(tmp_path), "--dataset_name", "pairs.jsonl", "--ranked_by", "simulated")
    for line in lines:
        assert line[2] == str(tmp_path / f"{Path(line[0]).stem}.yaml")
        assert line[5:7] == ["--dataset_name", "pairs.jsonl"]
    assert lines[1][-2:] == ["--annotator", "simulated"]


def test_a_launcher_is_a_command_with_variables_before_it(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    own = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
    words, environment = launcher("A=1 B='2 3' accelerate launch --config_file my.yaml")
    assert (words, environment) == ([*own, "launch", "--config_file", "my.yaml"], {"A": "1", "B": "2 3"})
    words, environment = launcher(None)
    assert words[:3] == own
    assert Path(words[-1]).is_file()
    assert int(environment["OMP_NUM_THREADS"]) >= 1
    for launch in ("", "A=1", "accelerate 'launch"):
        with pytest.raises(UsageError, match="launch: "):
            launcher(launch)


def test_the_first_stage_that_fails_ends_the_run_with_its_status(tmp_path):
    script = tmp_path / "stage.py"
    script.write_text(
        "import sys, pathlib\n"
        "stage = pathlib.Path(sys.argv[1]).stem\n"
        f"open({str(tmp_path / 'ran')!r}, 'a').write(stage + ' ')\n"
        "sys.exit(7 if stage == 'reward' else 0)\n"
    )
    with pytest.raises(SystemExit) as end:
        rlhf.main(["--run_dir", str(tmp_path / "run"), "--launch", f"{sys.executable} {script}"])
    assert end.value.code == 7
    assert (tmp_path / "ran").read_text().split() == ["sft", "collect", "reward"]


@pytest.mark.parametrize(("own", "seconds"), [("", "600"), ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=5 ", "5")])
def test_torchrun_leaves_a_stage_time_to_save_after_ctrl_c(tmp_path, monkeypatch, own, seconds):
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    script = tmp_path / "stage.py"
    script.write_text(
        "import os, pathlib, sys\n"
        f"pathlib.Path({str(tmp_path / 'seconds')!r}).write_text(os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'])\n"
        "sys.exit(1)\n"
    )
    with pytest.raises(SystemExit):
        rlhf.main(["--run_dir", str(tmp_path / "run"), "--launch", f"{own}{sys.executable} {script}"])
    assert (tmp_path / "seconds").read_text() == seconds


@pytest.mark.slow
def test_a_stage_that_refuses_its_input_leaves_one_line(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3, "completion": "c"}\n')
    command = [sys.executable, str(ROOT / "pipeline" / "rlhf.py"), "--recipe", "smoke"]
    done = subprocess.run(
        [*command, "--run_dir", str(tmp_path / "run"), "--dataset_name", str(rows)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr == f"error: {rows}, line 2, column `prompt`: text is wanted, not a number.\n"


def test_make_hands_its_variables_over():
    command = ["make", "--dry-run", "--no-print-directory", "rlhf", "RUN=r", "ROUNDS=2", "DATA=d.jsonl"]
    printed = subprocess.run(
        [*command, "RANKED_BY=people", "ARGS=--seed 3", "LAUNCH=accelerate launch"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    (line,) = [line for line in printed.splitlines() if "tieback rlhf" in line]
    assert shlex.split(line)[2:] == [
        *("--recipe", "helpdesk", "--run_dir", "r", "--rounds", "2", "--launch", "accelerate launch"),
        *("--dataset_name", "d.jsonl", "--ranked_by", "people", "--", "--seed", "3"),
    ]


def test_a_model_of_ones_own_is_where_the_first_stage_starts_with_the_recipe_for_pretrained_models():
    (arguments,) = parse_flags(RlhfArguments, "tieback rlhf", ["--model_name_or_path", "me/mine"])
    first, *others = commands(arguments, [])
    assert first[1:5] == ["--config", str(RECIPES / "lora" / "sft.yaml"), "--run_dir", "runs/me-mine"]
    assert first[-2:] == ["--model_name_or_path", "me/mine"]
    assert [Path(line[0]).stem for line in others] == ["collect", "reward", "ppo", "evaluate"]
    assert not any("--model_name_or_path" in line for line in others)


def test_a_recipe_may_leave_stages_out(tmp_path):
    for stage in ("evaluate", "ppo"):
        (tmp_path / f"{stage}.yaml").write_text("seed: 1\n")
    lines = planned("--recipe", str(tmp_path), "--model_name_or_path", "me/mine")
    assert [Path(line[0]).stem for line in lines] == ["ppo", "evaluate"]
    assert lines[0][-2:] == ["--model_name_or_path", "me/mine"]
    assert lines[1][-2:] == ["--sft_model_path", "me/mine"]


def test_a_recipe_may_have_further_reward_models_which_lie_beside_the_first(tmp_path):
    for stage in ("reward", "reward_minilm", "ppo"):
        (tmp_path / f"{stage}.yaml").write_text("seed: 1\n")
    lines = planned("--recipe", str(tmp_path), "--rounds", "2")
    assert [Path(line[0]).stem for line in lines] == ["reward", "reward", "ppo"] * 2
    for line, folder in ((lines[1], "r"), (lines[4], "r/round2")):
        assert line[2] == str(tmp_path / "reward_minilm.yaml")
        assert line[-2:] == ["--output_dir", f"{folder}/reward_minilm"]
    assert "--output_dir" not in lines[0]


def test_a_recipe_names_a_model_within_the_folder_of_its_round():
    assert RunArguments(run_dir="r", round=2).within("{run_dir}/reward_minilm") == "r/round2/reward_minilm"
    assert RunArguments(run_dir="r").within("{run_dir}/reward_minilm") == "r/reward_minilm"
    assert RunArguments(run_dir="r").within("me/mine") == "me/mine"


def test_a_chat_template_is_looked_for_beside_the_recipe_too(tmp_path, monkeypatch):
    beside = touch(tmp_path / "recipe" / "short.jinja")
    config = touch(tmp_path / "recipe" / "reward.yaml", "chat_template_path: short.jinja\n")

    def template():
        argv = ["--config", str(config), "--run_dir", "r", "--use_cpu"]
        return parse_stage("reward", (RunArguments, RewardConfig), argv)[1].chat_template_path

    monkeypatch.chdir(tmp_path)
    assert template() == str(beside)
    touch(tmp_path / "short.jinja")
    assert template() == "short.jinja"
