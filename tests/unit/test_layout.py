# SPDX-License-Identifier: Apache-2.0
"""Blocks of pages by their kind."""

from __future__ import annotations

import itertools
import sys
from types import FrameType

import numpy as np

from pydedup import codec
from pydedup.layout import by_kind
from pydedup.types import DType


def slots() -> np.ndarray:
    table = np.zeros(6, codec.SLOT_DTYPE)
    table["dtype"] = [DType.F32.code, DType.F16.code, *[DType.F32.code] * 4]
    table["rows"] = [2, 2, 2, 1, (1 << 32) - 1, 2]
    table["cols"] = [3, 3, 3, 3, (1 << 32) - 1, 4]
    return table


def test_each_slot_is_of_one_kind() -> None:
    table = slots()
    found = [(dtype, shape, at.tolist()) for dtype, shape, at in by_kind(table)]
    wanted = [
        (DType.F32, (1, 3), [3]),
        (DType.F32, (2, 3), [0, 2]),
        (DType.F32, (2, 4), [5]),
        (DType.F32, ((1 << 32) - 1, (1 << 32) - 1), [4]),
        (DType.F16, (2, 3), [1]),
    ]
    assert found == sorted(wanted, key=lambda kind: (kind[0].code, kind[1]))
    assert list(by_kind(table[:0])) == []


def test_an_interrupt_within_stays_one() -> None:
    """Numpy makes a TypeError of it where it compares rows: an add ended in that, and went on."""
    table = slots()
    for number in itertools.count():
        calls = 0

        def interrupt(frame: FrameType, event: str, argument: object, at: int = number) -> None:
            nonlocal calls
            if event != "call" or "numpy" not in frame.f_code.co_filename:
                return
            calls += 1
            if calls == at + 1:
                sys.setprofile(None)
                raise KeyboardInterrupt

        sys.setprofile(interrupt)
        try:
            list(by_kind(table))
        except KeyboardInterrupt:
            continue
        finally:
            sys.setprofile(None)
        break
    assert number > 2
