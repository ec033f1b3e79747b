"""Asynchronous functions, called from synchronous code: several together, in one event loop that outlives the calls."""

import asyncio
import atexit
from collections.abc import Coroutine, Sequence
from functools import cache
from typing import Any, TypeVar

from tieback.pipeline.trl_internals import shutdown_event_loop_in_daemon, start_event_loop_in_daemon

T = TypeVar("T")


def run_together(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines at the same time and wait for all of them; also from within a running loop, as in a notebook.

    Returns:
        What each returned, in their order.

    Raises:
        Exception: that of the first to fail; the others are cancelled.
    """
    future = asyncio.run_coroutine_threadsafe(_gather(coroutines), _event_loop())
    try:
        return future.result()
    finally:
        future.cancel()  # where the wait was broken off; nothing where it is done


async def _gather(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for all calls, in a thread of its own: an HTTP client belongs to the loop that it was first used in."""
    thread, loop, ready = start_event_loop_in_daemon("tieback-async")
    ready.wait()
    atexit.register(shutdown_event_loop_in_daemon, thread, loop)
    return loop
