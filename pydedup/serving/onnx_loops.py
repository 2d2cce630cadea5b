# SPDX-License-Identifier: Apache-2.0
"""Runs of ONNX Runtime that may never end: those of graphs with a loop.

Whether a loop ends, its own condition says, in general as it runs. So another thread runs it, and
what interrupts this one, such as Ctrl-C, ends it: the runtime looks between the nodes of a graph
whether it is to go on. Deliberately not here: nodes that take long by themselves, which nothing
ends.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from pydedup.serving.onnx_values import run_options

__all__ = ["run_with_loops"]


def run_with_loops(
    runtime: Any, outputs: Sequence[str], given: Mapping[str, Any], seconds: float | None
) -> list[Any]:
    """Return the outputs of a session. Raises TimeoutError when it takes longer than this."""
    options = run_options()
    done: Future[list[Any]] = Future()
    # The runtime reads the arrays where they are, whatever the caller does.
    feed = dict(given)

    def work() -> None:
        try:
            done.set_result(runtime.run(list(outputs), feed, options))
        except BaseException as exc:
            done.set_exception(exc)
        finally:
            feed.clear()

    thread = threading.Thread(target=work, name="onnx-loop", daemon=True)
    thread.start()
    try:
        return done.result(seconds)
    finally:
        options.terminate = True  # of no effect where it has ended
        thread.join()
