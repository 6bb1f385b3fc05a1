"""Print what each asyncio task of a program waits for, on SIGUSR2: with this folder on PYTHONPATH."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import traceback
from collections.abc import Iterator
from types import AsyncGeneratorType, FrameType


def _frames(awaited: object) -> Iterator[FrameType]:
    """Yield the frames of a coroutine, outermost first, along all that it awaits."""
    while awaited is not None:
        frame = _first(awaited, "cr_frame", "ag_frame", "gi_frame")
        if isinstance(frame, FrameType):
            yield frame
        following = _first(awaited, "cr_await", "ag_await", "gi_yieldfrom")
        if following is None and frame is None:  # a step of an asynchronous generator only refers to it
            following = next((one for one in gc.get_referents(awaited) if isinstance(one, AsyncGeneratorType)), None)
        awaited = following


def _first(awaited: object, *names: str) -> object:
    return next((one for name in names if (one := getattr(awaited, name, None)) is not None), None)


def _print_tasks(number: int, frame: FrameType | None) -> None:
    for task in asyncio.all_tasks(asyncio.get_running_loop()):
        sys.stderr.write(f"task {task.get_name()}\n")
        for one in _frames(task.get_coro()):
            summary = traceback.FrameSummary(one.f_code.co_filename, one.f_lineno, one.f_code.co_name)
            sys.stderr.writelines(traceback.format_list([summary]))
    sys.stderr.flush()


signal.signal(signal.SIGUSR2, _print_tasks)
