"""One of the several processes of a run: how it ends, and that a failure is said once and last."""

import atexit
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch

from tieback.cli.errors import PeerFailure, UsageError

# So long a process that may not be the only one to fail waits for the one whose message is to be shown: the launcher,
# which looks every tenth of a second, ends the others as soon as one has left.
SECONDS_BEHIND_ANOTHER = 2.0


def run_as_one_of_several(main: Callable[[], None]) -> NoReturn:
    """Run `main` in a process that a distributed launcher started, and leave with an exit status.

    Where it fails, the message goes to the launcher (torchrun's error file), which shows it below all that it says by
    itself, and the process leaves at once, with status 2 for bad input and 1 for a fault: whatever still waits for
    another process would keep it.
    """
    status: Any = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    except KeyboardInterrupt:
        leave(130)
    except Exception as error:
        if lost_another(error) or os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(SECONDS_BEHIND_ANOTHER * (2 if isinstance(error, PeerFailure) else 1))
        tell_launcher(message_of(error))
        leave(2 if isinstance(error, UsageError) else 1)
    # As the processes of multiprocessing end. Threads of torch and gloo have aborted interpreters that were torn down
    # around them, with all the work done.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    # After them: vLLM's own takes its groups out of this one.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    leave(status if isinstance(status, int) else int(status is not None))


def message_of(error: Exception) -> str:
    """What is to be said of an error: one line on bad input and on other processes, the traceback of a fault."""
    if isinstance(error, UsageError):
        return f"error: {error}"
    if not lost_another(error):
        return "".join(traceback.format_exception(error)).rstrip()
    if any(words in str(error).lower() for words in ("timed out", "timeout")):
        return (
            f"error: another process of this run did not come within ddp_timeout ({error}). Raise --ddp_timeout (in "
            "seconds) if a reward function or a judge takes so long."
        )
    return "error: another process of this run has ended; its own message says why."


def lost_another(error: Exception) -> bool:
    """Whether an error says no more than that another process is not there, or not in time."""
    # gloo raises plain RuntimeErrors.
    of_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return of_gloo or isinstance(error, torch.distributed.DistError | PeerFailure)


def tell_launcher(message: str) -> None:
    """Leave a message for torchrun to end with; print it where another launcher started this process."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        print(message, file=sys.stderr)
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def leave(status: int) -> NoReturn:
    """End this process now, whatever its threads and destructors wait for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def peers_on_this_machine() -> list[psutil.Process]:
    """The other processes of this run that the launcher of this one started."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    this = psutil.Process()
    siblings = psutil.Process(os.getppid()).children()
    return [other for other in siblings if other != this and other.cmdline() == this.cmdline()]


def has_ended(process: psutil.Process) -> bool:
    """Whether a process is no longer there."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
