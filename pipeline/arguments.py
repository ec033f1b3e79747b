"""Settings of a stage: a YAML recipe, of which any key can be overridden on the command line."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from transformers.hf_argparser import string_to_bool

from tieback.cli.arguments import RecipeParser, check_settings, instances, nearest
from tieback.cli.devices import choose_device, has_fast_bf16
from tieback.cli.errors import UsageError

AUTO = "auto"
RECIPES = Path(__file__).resolve().parent / "recipes"
# Of no consequence for what a stage makes, or a secret.
_NOT_WRITTEN_DOWN = ("overwrite", "hub_token")


@dataclass
class RunArguments:
    """Where a run keeps its stages."""

    run_dir: str = field(
        default="runs/helpdesk",
        metadata={"help": "Folder of the run, with one sub-folder a stage: <run_dir>/<stage>."},
    )

    round: int = field(
        default=1,
        metadata={
            "help": "Round of collecting, ranking, refitting and tuning, from 1 (see docs/human_feedback.md); the stages of a later round write into <run_dir>/round<n>, except sft, which comes before all rounds."
        },
    )

    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Run the stage anew where it has come to its end already, in the place of what it left. Otherwise a stage that is finished with the same settings and inputs is left as it is, and one of other settings is refused."
        },
    )

    # What the recipe and the command line set, with the values they came to (filled in by `parse_stage`).
    recipe: dict[str, Any] = field(default_factory=dict, init=False)
    # File of the recipe (also filled in).
    config_path: Path | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.round < 1:
            raise UsageError(f"round counts from 1; it is {self.round}.")

    def stage_dir(self, stage: str, round: int | None = None) -> Path:
        """Folder of `stage` in this run, of this round or another."""
        round = self.round if round is None else round
        first = stage == "sft" or round == 1
        return Path(self.run_dir) / (stage if first else f"round{round}/{stage}")

    def within(self, name: str) -> str:
        """The name of a model, with the folder of this round in the place of `{run_dir}`."""
        return name.replace("{run_dir}", str(self.stage_dir("reward").parent))

    def require(self, stage: str, wanted: str, round: int | None = None) -> Path:
        """Return `<stage_dir>/<wanted>`, or stop with the command that makes it.

        Raises:
            UsageError: the file is missing.
        """
        round = self.round if round is None else round
        path = self.stage_dir(stage, round) / wanted
        if not path.exists():
            flag, variable = (
                (f" --round {round}", f" ROUND={round}") if round > 1 and stage != "sft" else ("", "")
            )
            raise UsageError(
                f"{path} does not exist. Make it with `accelerate launch pipeline/{stage}.py --run_dir "
                f"{self.run_dir}{flag}` (or `make {stage} RUN={self.run_dir}{variable}`)."
            )
        return path


class StageParser(RecipeParser):
    """Reads the settings of a stage; the process group is made with those of it, before dataclasses ask for the device.

    `bf16` may be `auto`: true where the device is faster with it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for action in self._actions:
            if action.dest == "bf16":
                action.type = _bool_or_auto
                action.help = f"{action.help} `auto`: where the device is faster with it."

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse what the recipe and the command line set, and choose the device.

        Raises:
            UsageError: a setting is unknown or of a wrong type, or `ddp_timeout` is no time.
        """
        namespace, unknown = super().parse_known_args(args, namespace)
        seconds = namespace.ddp_timeout
        if not isinstance(seconds, int | float) or not seconds > 0:
            raise UsageError(f"ddp_timeout must be a number of seconds above 0, but is {seconds!r}.")
        use_cpu = getattr(namespace, "use_cpu", False)
        choose_device(use_cpu, seconds)
        if getattr(namespace, "bf16", None) == AUTO:
            namespace.bf16 = has_fast_bf16(use_cpu)
        return namespace, unknown


def parse_stage(
    stage: str,
    dataclass_types: tuple[type, ...],
    argv: list[str] | None = None,
    *,
    writes: bool = True,
    program: str | None = None,
) -> tuple[Any, ...]:
    """Read `--config` and the command line.

    `--config` is a YAML file, or the name of a built-in recipe: where it is not given, `lora` for a model that the command
    line names, else `helpdesk`. Chooses the device, and makes the process group, as soon as the settings are read.
    A chat template that is not found by its path is looked for beside the recipe.
    `output_dir` is `<run_dir>/<stage>` unless the recipe or the command line names another, and `run_dir` a folder of the
    model's own where the recipe names a model, or the command line another one (see `_folder_of_own`).

    Args:
        stage: name of the stage, which is also the name of its recipe file.
        dataclass_types: what to fill; one of them is a `RunArguments`.
        argv: command line without the program; `sys.argv[1:]` when None.
        writes: whether the program writes into the run's folder, and so is to say which it is.
        program: name of the script, where it is not the stage's.

    Returns:
        One instance for each of `dataclass_types`.

    Raises:
        UsageError: the recipe cannot be read, a setting is unknown, or its value is of a wrong type or out of range.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = [
        part for item in argv for part in (item.split("=", 1) if item.startswith("--config=") else [item])
    ]
    if "--config" not in argv:
        own_model = _value_of("model_name_or_path", argv)
        argv = ["--config", "helpdesk" if own_model is None else "lora", *argv]
    if argv[-1] == "--config":
        raise UsageError("--config: name a recipe or its file.")
    at = argv.index("--config") + 1
    config_path = recipe_path(argv[at], stage)
    argv[at] = str(config_path)
    parser = StageParser(dataclass_types, prog=f"pipeline/{program or stage}.py")
    known = {action.dest for action in parser._actions}
    recipe = _read_recipe(config_path, known)
    if "disable_tqdm" in known:
        # Transformers would infer from the quietened log level that no bar is wanted.
        parser.set_defaults(disable_tqdm=False)
    if "use_cpu" in known and not torch.accelerator.is_available():
        # Transformers would refuse bf16 on a machine without an accelerator unless it is told so.
        parser.set_defaults(use_cpu=True)

    parsed = instances(parser.parse_args_and_config, argv, f"{config_path} and the command line: ")
    run = next(item for item in parsed if isinstance(item, RunArguments))
    run.config_path = config_path
    own_folder = _folder_of_own(argv, config_path, recipe)
    if own_folder is not None:
        run.run_dir = own_folder
        if writes:
            PartialState().print(f"This run is kept in {own_folder} (--run_dir names another folder).")
    for item in parsed:
        if own_folder is not None and hasattr(item, "output_dir"):
            item.output_dir = None
        if run.overwrite and hasattr(item, "resume_from_checkpoint"):
            if item.resume_from_checkpoint is not None:
                raise UsageError("overwrite starts anew: leave it out, or resume_from_checkpoint.")
            item.resume_from_checkpoint = "false"
        template = getattr(item, "chat_template_path", None)
        if template is not None and not Path(template).exists() and (config_path.parent / template).is_file():
            item.chat_template_path = str(config_path.parent / template)
        # Transformers fills in "trainer_output" where nobody named a folder.
        if getattr(item, "output_dir", "") in (None, "trainer_output"):
            item.output_dir = str(run.stage_dir(stage))
        if getattr(item, "run_name", "") is None:
            item.run_name = _name_for_trackers(run.run_dir, item.output_dir)
            # Transformers' own is "huggingface"; W&B is told by the environment alone.
            item.project = "tieback" if item.project == "huggingface" else item.project
            os.environ.setdefault("WANDB_PROJECT", item.project)
    check_settings(*parsed)
    named = [*recipe, *_flags(argv)]
    run.recipe = {
        name: getattr(item, name)
        for name in dict.fromkeys(named)
        for item in parsed
        if hasattr(item, name) and name not in _NOT_WRITTEN_DOWN
    }
    return parsed


def _bool_or_auto(word: str | bool) -> str | bool:
    return word if word == AUTO else string_to_bool(word)


def recipe_path(name: str, stage: str) -> Path:
    """File of a recipe: the one named, or a stage's of the built-in recipe of that name."""
    built_in = RECIPES / name / f"{stage}.yaml"
    return built_in if built_in.is_file() and not Path(name).is_file() else Path(name)


def _value_of(name: str, argv: list[str]) -> str | None:
    """Value of a flag on a command line; None where it is not given."""
    for place, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            return value if equals else (argv[place + 1] if place + 1 < len(argv) else "")
    return None


def _folder_of_own(argv: list[str], config_path: Path, recipe: dict[str, Any]) -> str | None:
    """Run folder for a model that the command line or a recipe names without one.

    A folder that a recipe names is that of the recipe's model, if it names one, and of built-in recipes in any case:
    another model on the command line would write into a run that is not its own.

    Returns:
        As `run_folder_of` says; None where the folder that is named, or the default, is right.
    """
    if any(_value_of(name, argv) is not None for name in ("run_dir", "output_dir")):
        return None
    in_recipe = recipe.get("model_name_or_path")
    model = _value_of("model_name_or_path", argv) or in_recipe
    has_folder = bool({"run_dir", "output_dir"} & recipe.keys())
    own_template = in_recipe is None and RECIPES not in config_path.resolve().parents
    if model is None or (has_folder and (model == in_recipe or own_template)):
        return None
    return run_folder_of(model)


def run_folder_of(model: str) -> str:
    """Run folder of a model: `runs/<owner>-<name>` for one of the hub, the last two parts of its path for a folder."""
    path = Path(model).expanduser()
    parts = (path.resolve() if path.exists() else path).parts
    return str(Path("runs", "-".join(parts[-2:]).replace(os.sep, "").replace(":", "-")))


def _name_for_trackers(run_dir: str, output_dir: str) -> str:
    """Name of a run for W&B, Trackio and the like: `helpdesk/ppo`, `helpdesk/round2/ppo`."""
    run, output = Path(run_dir).resolve(), Path(output_dir).resolve()
    inside = output.is_relative_to(run) and output != run
    return "/".join((run.name, *output.relative_to(run).parts) if inside else output.parts[-2:])


def _flags(argv: list[str]) -> list[str]:
    """Names of the settings that a command line sets."""
    return [item.removeprefix("--").split("=")[0].replace("-", "_") for item in argv if item.startswith("--")]


def _read_recipe(path: Path, known: set[str]) -> dict[str, Any]:
    """Settings of a recipe, all of which something reads."""
    if not path.is_file():
        names = ", ".join(sorted(folder.name for folder in RECIPES.iterdir()))
        raise UsageError(f"--config {path}: no such file. The built-in recipes ({names}) are in {RECIPES}.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise UsageError(f"{path} must be a mapping of settings, one `key: value` a line.")
    for key in recipe:
        if key not in known and key != "env":
            raise UsageError(
                f"{path}: nothing reads the key `{key}`.{nearest(str(key), known)} Remove it, or correct its name."
            )
    return recipe
