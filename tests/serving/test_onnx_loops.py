# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs with loops, which may have no end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from traceback import walk_stack

import numpy as np
import pytest

import pydedup
from pydedup.errors import ArgumentError
from pydedup.serving.onnx_loops import run_with_loops

from .onnx_models import node, normal, onnx, save, value

RUN = run_with_loops.__code__
#: What ends the loop at once, and what never does: ten is added until all are negative.
ENDS, ENDLESS = -20 * np.ones(3, np.float32), np.ones(3, np.float32)


def loop(path: Path, *, within: bool = False) -> Path:
    """Save a model that adds ten while its values are more than 0, in an If if that is wanted."""
    make = onnx.helper
    scalar, values = make.make_tensor_value_info, value("s", 1, [None])
    steps = [
        node("Add", "s ten", "s_out"),
        node("ReduceMin", "s_out", "least", keepdims=0),
        node("Cast", "least", "whole", to=7),
        node("Greater", "whole zero", "c_out"),
    ]
    takes = [scalar("i", 7, []), scalar("c", 9, []), values]
    gives = [scalar("c_out", 9, []), value("s_out", 1, [None])]
    body = make.make_graph(steps, "body", takes, gives)
    nodes = [make.make_node("Loop", ["", "yes", "x"], ["y"], body=body)]
    if within:
        both = [make.make_graph(nodes, "then", [], [value("y", 1, [None])])] * 2
        nodes = [make.make_node("If", ["yes"], ["y"], then_branch=both[0], else_branch=both[1])]
    constants = {"yes": np.array(True), "ten": normal(1) * 0 + 10, "zero": np.array(0)}
    return save(path, nodes, constants, [value("x", 1, [None])])


@pytest.mark.parametrize("within", [False, True])
def test_ctrl_c_ends_a_loop(store: pydedup.Store, tmp_path: Path, within: bool) -> None:
    """Nothing but SIGKILL did."""
    store.add("m", loop(tmp_path / "m.onnx", within=within))
    np.testing.assert_array_equal(store.predict("m", ENDS), ENDS + 10)
    over = threading.Event()

    def interrupt() -> None:
        while not over.is_set() and not is_running():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    def is_running() -> bool:
        frames = (walk_stack(frame) for frame in sys._current_frames().values())
        return any(one.f_code is RUN for stack in frames for one, _ in stack)

    thread = threading.Thread(target=interrupt)
    # What a shell starts in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            store.predict("m", ENDLESS)
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert not is_running()
    np.testing.assert_array_equal(store.predict("m", ENDS), ENDS + 10)


def test_a_limit_ends_a_loop(store: pydedup.Store, tmp_path: Path) -> None:
    store.add("m", loop(tmp_path / "m.onnx"))
    store._loop_seconds = 0.05
    with pytest.raises(ArgumentError, match=r"m@1 did not end within 0\.05 seconds: .* a loop of"):
        store.predict("m", ENDLESS)
    store._loop_seconds = None
    np.testing.assert_array_equal(store.predict("m", ENDS), ENDS + 10)


def test_errors_within_a_loop_are_those_of_the_runtime(
    store: pydedup.Store, tmp_path: Path
) -> None:
    store.add("m", loop(tmp_path / "m.onnx"))
    with pytest.raises(ArgumentError, match="ONNX Runtime cannot run m@1: "):
        store.predict("m", ENDS[:, None])
