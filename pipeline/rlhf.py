"""All stages one after the other: sft, then in each round collect, (label,) reward, ppo and evaluate.

    tieback rlhf
    tieback rlhf --recipe hh --dataset_name pairs.jsonl.gz
    tieback rlhf --model_name_or_path Qwen/Qwen3-0.6B --dataset_name pairs.jsonl
    tieback rlhf --rounds 2 --ranked_by people --run_dir runs/people -- --seed 1

Each stage is a program of its own, started by `launch`; settings after `--` go to each of them. In a round after the
first, the newest policy answers, the reward model is fitted to all rankings so far, and PPO starts again from the SFT
model. With `ranked_by people` it waits for the rankings in a browser.
"""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tieback.cli.arguments import parse_flags
from tieback.cli.errors import UsageError, run
from tieback.pipeline.arguments import RECIPES, RunArguments, run_folder_of

PIPELINE = Path(__file__).resolve().parent
STAGES = ("sft", "collect", "reward", "ppo", "evaluate")
ACCELERATE_CONFIGS = PIPELINE.parent / "accelerate_configs"
# torchrun would kill its processes 30 seconds after ctrl-C, while they may still be finishing an iteration.
PATIENCE = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}


@dataclass
class RlhfArguments:
    """What is run, and how it is started."""

    recipe: str | None = field(
        default=None,
        metadata={
            "help": "Built-in recipe, or a folder with one YAML file a stage; helpdesk if not given, or lora where a model is."
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model that the first stage starts from, in place of the recipe's."},
    )
    run_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the run; runs/<recipe>, or one of the model's own, if not given."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Data of every stage that reads data, in place of the recipe's."}
    )
    rounds: int = field(default=1, metadata={"help": "Rounds of collect, reward, ppo and evaluate."})
    ranked_by: str | None = field(
        default=None,
        metadata={
            "help": "Annotators: people, in a browser, or the simulated annotators of the help desk; as the recipe "
            "says if not given.",
            "choices": ["people", "simulated"],
        },
    )
    launch: str | None = field(
        default=None,
        metadata={
            "help": "Command that starts a stage, e.g. 'accelerate launch --config_file my.yaml'; one process on the "
            "CPU if not given."
        },
    )

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UsageError(f"rounds must be at least 1, but is {self.rounds}.")
        own_model = self.model_name_or_path
        self.recipe = self.recipe or ("helpdesk" if own_model is None else "lora")
        if not (RECIPES / self.recipe).is_dir() and not Path(self.recipe).is_dir():
            names = ", ".join(sorted(folder.name for folder in RECIPES.iterdir()))
            raise UsageError(f"recipe: {self.recipe} is neither a built-in recipe ({names}) nor a folder.")
        own_folder = f"runs/{Path(self.recipe).name}" if own_model is None else run_folder_of(own_model)
        self.run_dir = self.run_dir or own_folder


def stages_of(recipe: str) -> list[str]:
    """Stages that a recipe has a file for, in their order: one that starts from an instructed model needs no sft, say."""
    return [stage for stage in STAGES if (_folder(recipe) / f"{stage}.yaml").is_file()]


def _folder(recipe: str) -> Path:
    return Path(recipe) if Path(recipe).is_dir() else RECIPES / recipe


def commands(arguments: RlhfArguments, stage_settings: list[str]) -> list[list[str]]:
    """The programs of a run, in their order, each with its settings; the launcher is left out.

    Args:
        arguments: what is run.
        stage_settings: flags that every stage but label gets.
    """
    stages = stages_of(str(arguments.recipe))
    planned = [_stage("sft", arguments, 1, stage_settings)] if "sft" in stages else []
    for number in range(1, arguments.rounds + 1):
        for stage in (stage for stage in stages if stage != "sft"):
            planned.append(_stage(stage, arguments, number, stage_settings))
            if stage == "reward":
                planned += _further_reward_models(arguments, number, stage_settings)
            if stage == "collect" and arguments.ranked_by == "people":
                planned.append(_label(arguments, number))
    return planned


def _stage(
    stage: str, arguments: RlhfArguments, number: int, stage_settings: list[str], file: Path | None = None
) -> list[str]:
    """The command of a stage, with the recipe's file of its name, or another one."""
    recipe = str(arguments.recipe)
    config = file or _folder(recipe) / f"{stage}.yaml"
    command = [str(PIPELINE / f"{stage}.py"), "--config", str(config), "--run_dir", str(arguments.run_dir)]
    if number > 1:
        command += ["--round", str(number)]
    if arguments.dataset_name is not None:
        command += ["--dataset_name", arguments.dataset_name]
    if stage == "collect" and arguments.ranked_by is not None:
        command += ["--annotator", "none" if arguments.ranked_by == "people" else "simulated"]
    if arguments.model_name_or_path is not None:
        # A recipe without sft starts PPO from the model itself, and evaluate compares with that.
        without_sft = {"ppo": "--model_name_or_path", "evaluate": "--sft_model_path"}
        started_by = {"sft": "--model_name_or_path"} if "sft" in stages_of(recipe) else without_sft
        if stage in started_by:
            command += [started_by[stage], arguments.model_name_or_path]
    return [*command, *stage_settings]


def _further_reward_models(
    arguments: RlhfArguments, number: int, stage_settings: list[str]
) -> list[list[str]]:
    """One for each `reward_<name>.yaml` of the recipe, into the folder of that name beside `reward`."""
    beside = RunArguments(run_dir=str(arguments.run_dir), round=number).stage_dir("reward")
    return [
        [
            *_stage("reward", arguments, number, stage_settings, file),
            *("--output_dir", str(beside.with_name(file.stem))),
        ]
        for file in sorted(_folder(str(arguments.recipe)).glob("reward_*.yaml"))
    ]


def _label(arguments: RlhfArguments, number: int) -> list[str]:
    run_arguments = RunArguments(run_dir=str(arguments.run_dir), round=number)
    responses = run_arguments.stage_dir("collect") / "responses.jsonl"
    output = run_arguments.stage_dir("label") / "preferences.jsonl"
    return [
        *(str(PIPELINE / "label.py"), "--responses", str(responses), "--output", str(output)),
        "--until_finished",
    ]


def launcher(launch: str | None) -> tuple[list[str], dict[str, str]]:
    """Words that a stage's command begins with, and what they add to the environment.

    Raises:
        UsageError: `launch` is empty or its quotation marks do not close.
    """
    if launch is None:
        config = str(ACCELERATE_CONFIGS / "cpu.yaml")
        # Accelerate would choose as many threads by itself, but say so at length.
        threads = os.environ.get("OMP_NUM_THREADS", str(psutil.cpu_count(logical=False) or 1))
        # Quiet: a stage's message of one line would be buried under the launcher's own traceback.
        words = ["accelerate", "launch", "--quiet", "--config_file", config]
        environment = {"OMP_NUM_THREADS": threads}
    else:
        try:
            words = shlex.split(launch)
        except ValueError as error:
            raise UsageError(f"launch: {launch!r} is no command ({error}).") from error
        environment = {}
        while words and "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        if not words:
            raise UsageError(f"launch: {launch!r} names no program, such as accelerate launch.")
    if words[0] == "accelerate":
        # The one of this environment, which need not be on the path.
        words[:1] = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
    return words, environment


def main(argv: list[str]) -> None:
    """Run all stages; the first that fails ends the run with its exit status."""
    own, stage_settings = argv, []
    if "--" in argv:
        own, stage_settings = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    (arguments,) = parse_flags(RlhfArguments, "tieback rlhf", own)
    words, environment = launcher(arguments.launch)
    for command in commands(arguments, stage_settings):
        start = [sys.executable] if Path(command[0]).stem == "label" else words
        status = _wait_for([*start, *command], {**PATIENCE, **os.environ, **environment})
        if status:
            raise SystemExit(status if status > 0 else 128 - status)


def _wait_for(command: list[str], environment: dict[str, str]) -> int:
    """Run a stage to its end, and return its exit status.

    Ctrl-C reaches the stage, too, which saves what it has: that is waited for.
    """
    try:
        process = subprocess.Popen(command, env=environment)
    except FileNotFoundError as error:
        raise UsageError(f"launch: {command[0]} is not there to be run.") from error
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
