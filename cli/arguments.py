"""Settings from the command line: no abbreviations, errors of one line, and the checks that every program shares."""

import difflib
import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from trl import TrlParser

from tieback.cli.errors import UsageError

MAX_SEED = 2**32 - 1
# Settings that name a place to write to.
_FOLDERS, _FILES = ("run_dir", "output_dir", "logging_dir"), ("output",)


class _StrictParser:
    """Mixed into a parser: flags are written out, and what is wrong is a `UsageError` of one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Refuse what argparse cannot read (a wrong type, a missing value) without the pages of its usage."""
        raise UsageError(f"{message}.")

    def parse_known_args(self: Any, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse what is not known."""
        namespace, unknown = super().parse_known_args(args, namespace)  # type: ignore[misc]
        if unknown:
            raise UsageError(_unknown(unknown[0], self._option_string_actions))
        return namespace, unknown


class FlagParser(_StrictParser, HfArgumentParser):
    """Reads dataclasses from flags."""


class RecipeParser(_StrictParser, TrlParser):
    """Reads dataclasses from a YAML file (`--config`) and flags."""


def _unknown(word: str, flags: Iterable[str]) -> str:
    flag, _, _ = word.partition("=")
    if not flag.startswith("-"):
        return f"{flag!r} belongs to no setting; a setting is written --name value."
    return f"there is no setting `{flag}`.{nearest(flag, flags)}"


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a question after the name that is meant, with a space before it; "" where none is alike."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean `{close[0]}`?" if close else ""


def parse_flags(
    dataclass_types: type | tuple[type, ...],
    prog: str,
    argv: Sequence[str] | None = None,
    defaults: dict[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Read dataclasses from the flags of a command line.

    Args:
        dataclass_types: what to fill.
        prog: name of the program, for its help.
        argv: command line without the program; `sys.argv[1:]` when None.
        defaults: values in place of the dataclasses' own.

    Returns:
        One instance for each of `dataclass_types`.

    Raises:
        UsageError: a flag is unknown, or its value is of a wrong type or out of range.
    """
    parser = FlagParser(dataclass_types, prog=prog)
    parser.set_defaults(**(defaults or {}))
    parsed = instances(parser.parse_args_into_dataclasses, None if argv is None else list(argv))
    check_settings(*parsed)
    return parsed


def instances(parse: Any, argv: Any, where: str = "") -> tuple[Any, ...]:
    """Call a parser; a `ValueError`, by which a dataclass refuses a value, becomes a `UsageError` that says `where`."""
    try:
        return parse(argv)
    except ValueError as error:
        raise UsageError(f"{where}{error}") from error


def check_settings(*parsed: Any) -> None:
    """Check what has one meaning in every program: seeds, learning rates, and places to write to.

    Raises:
        UsageError: a seed is not between 0 and 2³² − 1, a learning rate is negative or not a number, or nothing can be
            written to a place.
    """
    for part in parsed:
        for name, value in vars(part).items():
            if value is None:
                continue
            if name == "seed" or name.endswith("_seed"):
                check_seed(name, value)
            elif name.endswith("learning_rate") and not (value >= 0 and math.isfinite(value)):
                raise UsageError(f"{name} must be a number of at least 0, but is {value}.")
            elif name in (*_FOLDERS, *_FILES) and value:
                check_writable(name, Path(value), is_folder=name in _FOLDERS)


def check_seed(name: str, seed: int) -> None:
    """Check that a seed is one that every library takes.

    Raises:
        UsageError: it is not between 0 and 2³² − 1.
    """
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"{name} must be a whole number from 0 to {MAX_SEED}, but is {seed}.")


def check_writable(name: str, path: Path, is_folder: bool) -> None:
    """Check that a file or a folder can be made at `path`, by writing beside it, and leave nothing behind.

    Raises:
        UsageError: it cannot.
    """
    folder = path if path.is_dir() else path.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if is_folder == path.is_file() and path.exists():
        raise UsageError(
            f"{name}: {path} cannot be written to: it is a {'file' if is_folder else 'folder'}. Name another place."
        )
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"{name}: {path} cannot be written to ({folder}: {error.strerror or error}). Name another place."
        ) from error
