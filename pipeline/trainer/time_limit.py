"""A limit of time for what may never answer: a generation engine, a judge."""

import faulthandler
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from tieback.cli.errors import UsageError

# Sent by a thread of ours. Not SIGALRM, whose timer reward functions set for limits of their own.
_SIGNAL = getattr(signal, "SIGVTALRM", None)  # which Windows has not
# After that long the main thread is taken to hang in foreign code, where no exception can be raised.
_GRACE_SECONDS = 60.0


class _TimeIsUp(BaseException):
    """Raised within the block; no `Exception`, so that nothing that tries again after errors goes on."""


@contextmanager
def time_limit(seconds: float | None, what: str, setting: str) -> Iterator[None]:
    """Break off a block of the main thread that takes longer than `seconds`.

    A block that cannot be broken off within another minute, as foreign code has it that never returns, ends the process, with a
    traceback of all threads. In another thread than the main one, and on Windows, there is no limit.

    Args:
        seconds: None for no limit.
        what: does not answer, as the message begins.
        setting: that `seconds` is the value of.

    Raises:
        UsageError: it took longer; says where it stood.
    """
    if seconds is None or _SIGNAL is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TimeIsUp

    main_thread = threading.get_ident()
    timer = threading.Timer(seconds, signal.pthread_kill, (main_thread, _SIGNAL))
    timer.daemon = True
    before = signal.signal(_SIGNAL, ring)
    try:
        faulthandler.dump_traceback_later(seconds + _GRACE_SECONDS, exit=True, file=sys.__stderr__ or 2)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()  # a signal on its way comes here, not into the code behind the block
    except _TimeIsUp as error:
        raise UsageError(
            f"{what} did not answer within {setting}={seconds:g} seconds; it stood at {_place(error.__traceback__)}. "
            f"If that is how long it takes, raise {setting}."
        ) from None
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.signal(_SIGNAL, before)


def _place(trace: TracebackType | None) -> str:
    """File, line and function that were interrupted: the last but the handler's own frame."""
    frames = traceback.extract_tb(trace)
    at = frames[-2] if len(frames) > 1 else frames[-1]
    return f"{at.filename}:{at.lineno} in {at.name}"
