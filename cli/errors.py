"""The error that means bad input, and how a program ends with it."""

import os
import sys
from collections.abc import Callable


class UsageError(ValueError):
    """Bad input: a setting, a file or a row. The message names it and says what to do.

    Programs print the message alone and exit with status 2; every other exception is a fault of ours, with its
    traceback.
    """


class PeerFailure(RuntimeError):
    """Another process of this run has failed, and this one cannot go on alone; the other's message says why."""


def first_line(error: BaseException) -> str:
    """What an error of another library says in its first line."""
    return str(error).strip().split("\n")[0]


def run(main: Callable[[], None]) -> None:
    """Run a program's `main`, and turn bad input into one message on stderr and exit status 2.

    As one of several processes that a launcher started, see `cli.processes`.
    """
    _forget_bare_names()
    if "RANK" in os.environ:
        # Programs of one process need no torch.
        from tieback.cli.processes import run_as_one_of_several

        run_as_one_of_several(main)
    try:
        main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _forget_bare_names() -> None:
    """Drop the folders that `python -m classic_rl.pong` imported by their bare names to find the program.

    They are imported as `tieback.classic_rl` and so on everywhere else, and nothing is to be there twice.
    """
    spec = sys.modules["__main__"].__spec__
    package = spec.parent if spec is not None else None
    while package and package.partition(".")[0] in ("classic_rl", "pipeline"):
        sys.modules.pop(package, None)
        package = package.rpartition(".")[0]
