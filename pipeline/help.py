"""`--help` of a stage, by its settings alone: all that a run imports takes more than twice as long to load."""

import importlib
import sys

from tieback.cli.errors import run


def print_help_if_asked(program: str, stage: str | None = None) -> None:
    """Print the help of a program of the pipeline and end it, where the command line asks for that.

    A script calls it before its other imports.

    Args:
        program: name of the script, and of the module of its settings.
        stage: the stage whose recipes it reads; `program` when None.
    """
    if not {"-h", "--help"} & set(sys.argv[1:]):
        return
    _leave_peft_out()
    from tieback.pipeline.arguments import parse_stage

    settings = importlib.import_module(f"tieback.pipeline.settings.{program}")

    def print_help() -> None:
        parse_stage(stage or program, settings.DATACLASS_TYPES, program=program)

    run(print_help)


def _leave_peft_out() -> None:
    """Tell Transformers that there is no PEFT.

    Its TrainingArguments would import PEFT for the Trainer, and PEFT imports torch's compiler and FSDP: about two
    seconds, and no setting depends on it.
    """
    import transformers.utils

    transformers.utils.is_peft_available = lambda: False
