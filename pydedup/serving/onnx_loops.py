# SPDX-License-Identifier: Apache-2.0
"""Runs of ONNX Runtime that may never end: those of graphs with a loop.

Whether a loop ends, its own condition says, in general as it runs. So another thread runs it, and
what interrupts this one, such as Ctrl-C, ends it: the runtime looks between the nodes of a graph
whether it is to go on. Deliberately not here: nodes that take long by themselves, which nothing
ends.
"""

from __future__ import annotations

import math
import time
from _thread import allocate_lock, start_new_thread
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydedup.serving.onnx_values import import_onnxruntime

__all__ = ["run_with_loops"]

#: How often it is looked for signals, and whether what is to end has ended.
_LOOK_SECONDS: Final = 0.05


def run_with_loops(
    runtime: Any, outputs: Sequence[str], given: Mapping[str, Any], seconds: float | None
) -> list[Any]:
    """Return the outputs of a session. Raises TimeoutError when it takes longer than this."""
    options = import_onnxruntime().RunOptions()
    # The runtime reads the arrays where they are, whatever the caller does.
    feed = dict(given)
    begun: list[bool] = []
    found: list[list[Any] | BaseException] = []
    # No thread or future of Python's: what interrupts those as they lock may leave them locked.
    over = allocate_lock()
    over.acquire()

    def work() -> None:
        begun.append(True)
        try:
            result: list[Any] | BaseException = runtime.run(list(outputs), feed, options)
        except BaseException as exc:
            result = exc
        feed.clear()
        found.append(result)
        over.release()

    try:
        start_new_thread(work, ())
        # In parts: a signal just before a thread begins to wait does not wake it.
        end = math.inf if seconds is None else time.monotonic() + seconds
        while not over.acquire(timeout=max(min(_LOOK_SECONDS, end - time.monotonic()), 0)):
            if time.monotonic() >= end:
                raise TimeoutError
    finally:
        options.terminate = True  # of no effect where it has ended
        while begun and not found:
            over.acquire(timeout=_LOOK_SECONDS)
    result = found.pop()
    if isinstance(result, BaseException):
        raise result
    return result
