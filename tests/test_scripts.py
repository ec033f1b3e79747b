"""The stage scripts from any folder: their own packages, their help, and what they say when a stage before is missing."""

import importlib
import json
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
import toy

from pipeline.arguments import UsageError

ROOT = Path(__file__).parents[1]
STAGES = ("sft", "collect", "reward", "ppo", "evaluate")
DECOYS = ("data", "reward_model", "ppo_core", "pipeline")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a user's own, with folders named like our packages."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in DECOYS:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise RuntimeError('imported the {name} of the user')\n")
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.fixture(scope="module")
def helps(elsewhere: Path) -> dict[str, Any]:
    done = run(elsewhere, str(ROOT / "tests" / "workers" / "every_help.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.parametrize("stage", STAGES)
def test_help_is_printed_from_any_folder(helps: dict[str, Any], stage: str) -> None:
    status, printed = helps["stages"][stage]
    assert status == 0
    assert printed.startswith(f"usage: pipeline/{stage}.py")
    for option in ("--run_dir", "--config", "--dataset_name", "--seed"):
        assert option in printed or option == "--config"


def test_our_packages_are_ours_and_no_file_of_the_pipeline_stands_for_a_library(
    helps: dict[str, Any],
) -> None:
    packages = {name: Path(file) for name, file in helps["packages"].items()}
    assert set(packages) == {*DECOYS, "trl", "datasets", "transformers", "peft", "accelerate"}
    for name, file in packages.items():
        ours = name in DECOYS
        assert (file.parent == ROOT / name) == ours, f"{name} was imported from {file}"
        assert ours or ROOT / "pipeline" not in file.parents


def test_no_file_in_the_pipeline_is_named_like_something_that_can_be_imported() -> None:
    names = {path.stem for path in (ROOT / "pipeline").iterdir() if path.suffix == ".py" or path.is_dir()}
    others = [path for path in sys.path if path and Path(path).resolve() != ROOT / "pipeline"]
    taken = {name for name in names if name.isidentifier() and PathFinder.find_spec(name, others) is not None}
    # What the package `evaluate` offers is used by nothing here.
    assert taken - {"evaluate", "__init__", "__pycache__"} == set()
    assert not names & set(sys.stdlib_module_names)


def test_a_missing_stage_is_one_line_and_status_2(elsewhere: Path) -> None:
    done = run(elsewhere, str(ROOT / "pipeline" / "ppo.py"), "--run_dir", "nothing")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        "error: nothing/sft/config.json does not exist. Make it with `accelerate launch pipeline/sft.py --run_dir "
        "nothing` (or `make sft RUN=nothing`)."
    )


def run_here(stage: str, folder: Path, *options: str) -> None:
    """A stage's main() in this process, with the smoke recipe."""
    config = ROOT / "pipeline" / "recipes" / "smoke" / f"{stage}.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [stage, "--config", str(config), "--run_dir", str(folder), *options])
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")
        patch.setenv("ACCELERATE_USE_CPU", "true")
        importlib.import_module(f"pipeline.{stage}").main()


@pytest.mark.parametrize(
    ("stage", "there", "missing"),
    [
        ("collect", [], "sft"),
        ("reward", [], "(sft|collect)"),
        ("reward", ["sft"], "collect"),
        ("ppo", [], "sft"),
        ("ppo", ["sft"], "reward"),
        ("evaluate", [], "sft"),
        ("evaluate", ["sft"], "ppo"),
    ],
)
def test_a_missing_stage_is_named_with_the_command_that_makes_it(
    tmp_path: Path, stage: str, there: list[str], missing: str
) -> None:
    for name in there:
        save_stage(tmp_path / name)
    message = rf"does not exist. Make it with `accelerate launch pipeline/{missing}\.py --run_dir {tmp_path}`"
    with pytest.raises(UsageError, match=message):
        run_here(stage, tmp_path)


def save_stage(folder: Path) -> None:
    tok = toy.tokenizer()
    toy.policy(tok).save_pretrained(folder)
    tok.save_pretrained(folder)
    (folder / "metrics.json").write_text("{}")


# What pipeline/ppo.py is given by name.


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an SFT model and a reward model."""
    folder = tmp_path_factory.mktemp("run")
    tok = toy.tokenizer()
    save_stage(folder / "sft")
    toy.reward_model(tok).save_pretrained(folder / "reward")
    toy.reward_model(tok, num_labels=2).save_pretrained(folder / "two_labels")
    for name in ("reward", "two_labels"):
        tok.save_pretrained(folder / name)
    (folder / "prompts.jsonl").write_text('{"prompt": "red cat"}\n' * 12)
    (folder / "empty.jsonl").write_text("")
    (folder / "questions.jsonl").write_text('{"question": "red cat"}\n' * 12)
    (folder / "blank.jsonl").write_text('{"prompt": "red cat"}\n' * 9 + '{"prompt": " "}\n')
    (folder / "long.jsonl").write_text(
        '{"prompt": "red cat"}\n' * 9 + json.dumps({"prompt": "red cat " * 60}) + "\n"
    )
    (folder / "few.jsonl").write_text('{"prompt": "red cat"}\n' * 10)
    return folder


PPO_FAULTS: dict[str, tuple[list[str], str]] = {
    "no such reward model": (
        ["--reward_funcs", "{run}/nowhere"],
        r"reward_funcs: no reward model can be loaded from .*nowhere: ",
    ),
    "no such function": (
        ["--reward_funcs", "json:nothing"],
        r"reward_funcs: json:nothing cannot be imported .*nothing.*Write module:function",
    ),
    "no such module": (["--reward_funcs", "not_there:f"], r"reward_funcs: not_there:f cannot be imported"),
    "a language model": (
        ["--reward_funcs", "{run}/sft"],
        r"reward_funcs: .*sft is a LlamaForCausalLM, not a reward model",
    ),
    "two labels": (["--reward_funcs", "{run}/two_labels"], r"two_labels has 2 labels \(LABEL_0, LABEL_1\)"),
    "no reward model for the critic": (
        ["--reward_funcs", "json:dumps"],
        r"critic_init is 'reward', but reward_funcs names no reward model: set critic_init to 'policy'",
    ),
    "weights": (["--reward_weights", "1", "2"], r"reward_weights has 2 entries for 1 reward functions"),
    "an empty file": (["--dataset_name", "{run}/empty.jsonl"], r"empty\.jsonl"),
    "no prompt column": (["--dataset_name", "{run}/questions.jsonl"], r"questions\.jsonl.*prompt"),
    "an empty prompt": (["--dataset_name", "{run}/blank.jsonl"], r"blank\.jsonl, line 10, column `prompt`"),
    "a prompt longer than the context": (
        ["--dataset_name", "{run}/long.jsonl"],
        r"prompt 10 has \d+ tokens .* context holds 64.*max_prompt_length",
    ),
    "no prompt left to train on": (
        ["--dataset_name", "{run}/few.jsonl", "--num_eval_prompts", "10"],
        r"num_eval_prompts=10 leaves none of 10 prompts to train on",
    ),
    "too few prompts": (
        ["--dataset_name", "{run}/few.jsonl", "--num_eval_prompts", "3"],
        r"has 7 prompts, but one iteration takes 8",
    ),
    "fp16": (["--fp16", "true"], r"fp16 is not supported"),
    "a reward function that raises": (
        ["--reward_funcs", "json:dumps", "--critic_init", "policy"],
        r"The reward function `dumps` raised TypeError",
    ),
}


@pytest.mark.parametrize("fault", PPO_FAULTS)
def test_what_ppo_cannot_use_is_refused_with_a_message(run_dir: Path, tmp_path: Path, fault: str) -> None:
    options, message = PPO_FAULTS[fault]
    options = [option.replace("{run}", str(run_dir)) for option in options]
    defaults = [
        "--dataset_name",
        str(run_dir / "prompts.jsonl"),
        "--num_eval_prompts",
        "0",
        "--report_to",
        "none",
    ]
    with pytest.raises(UsageError, match=f"(?s){message}"):
        run_catching_data_errors(run_dir, [*defaults, "--output_dir", str(tmp_path), "--use_cpu", *options])
    assert not list(tmp_path.glob("**/*.safetensors"))


def run_catching_data_errors(run_dir: Path, options: list[str]) -> None:
    """As run_stage does, which takes the data package's errors for a user's, too."""
    from data.errors import DataError

    try:
        run_here("ppo", run_dir, *options)
    except DataError as error:
        raise UsageError(str(error)) from error
