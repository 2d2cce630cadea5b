# SPDX-License-Identifier: Apache-2.0
"""Mappings of arrays and tensors."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from pydedup.errors import ArgumentError, BudgetError, UnsupportedFormatError
from pydedup.formats.registry import open_source
from pydedup.types import DType

BASE = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.mark.parametrize(
    "array",
    [
        BASE,
        BASE.T,
        BASE[::2, ::-3],
        np.asfortranarray(BASE),
        BASE.astype(">f4"),
        np.broadcast_to(BASE[0], (5, 6)),
        np.float64(3.5),
        np.zeros((0, 3), np.int8),
        np.array(True),
        np.ones(3, ml_dtypes.bfloat16),
        np.ones((2, 3), ml_dtypes.float8_e4m3fn).T,
        [[1, 2], [3, 4]],
        memoryview(b"abc"),
    ],
    ids=str,
)
def test_any_array_is_read_contiguous_and_native(array: Any) -> None:
    expected = np.asarray(array)
    with open_source({"wörter": array}) as source:
        (entry,) = source.entries
        read = source.read("wörter")
    assert read.shape == entry.shape == expected.shape
    assert read.flags.c_contiguous
    assert read.dtype.isnative
    assert not read.flags.writeable
    native = expected.astype(expected.dtype.newbyteorder("="))
    assert read.tobytes() == native.tobytes(order="C")


def test_nothing_is_copied_that_need_not_be() -> None:
    tensor = torch.arange(6.0)
    array = BASE.copy()
    with open_source({"t": tensor, "a": array}) as source:
        assert np.shares_memory(source.read("a"), array)
        assert np.shares_memory(source.read("t"), tensor.numpy())
    assert array.flags.writeable  # the caller's array stays as it was


def test_arrays_and_tensors_may_be_mixed() -> None:
    with open_source({"a": BASE, "t": torch.ones(2).bfloat16()}) as source:
        assert [entry.dtype for entry in source.entries] == [DType.F32, DType.BF16]


def test_only_the_same_view_is_tied() -> None:
    given = {
        "a": BASE,
        "again": BASE[:],
        "part": BASE[:2],
        "transposed": BASE.T,
        "as-ints": BASE.view(np.int32),
        "equal": BASE.copy(),
        "empty": BASE[:0],
        "also-empty": BASE[:0],
    }
    with open_source(given) as source:
        keys = {entry.name: entry.key for entry in source.entries}
    assert keys["a"] == keys["again"]
    assert len(set(keys.values())) == len(keys) - 1


def test_conversions_that_make_new_memory_do_not_look_tied() -> None:
    given = {f"l{index}": [float(index)] * 4 for index in range(20)}
    with open_source(given) as source:
        assert len({entry.key for entry in source.entries}) == 20
        for index in range(20):
            assert source.read(f"l{index}").tolist() == [index] * 4


class Broken:
    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise RuntimeError("on another machine")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "NoneType, which is no array"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), "masked elements"),
        ("text", "cannot be stored"),
        ({"x": 1}, r"dict, which is no array of numbers; .* give it alone: \['w'\] of what"),
        (np.array([object()]), "of dtype object, which is no array of numbers"),
        (np.ones(2, np.complex64), r"complex64 cannot .* imaginary parts \(torch.*array\.imag\)$"),
        (np.array(["2020-01-01"], "M8[D]"), "cannot be stored"),
        (np.zeros(2, "V2"), "cannot be stored"),
        ([[1], [1, 2]], "does not make an array"),
        (Broken(), "on another machine"),
    ],
    ids=repr,
)
def test_other_values_are_refused_by_name(value: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=f"'w'.*{says}"):
        open_source({"fine": BASE, "w": value})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "is empty"),
        (3, "is no text"),
        ("a\0", "control"),
        ("\ud800", "Unicode"),
        ("x" * 2000, "1024"),
    ],
)
def test_names_that_cannot_be_stored(name: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        open_source({name: BASE})


def test_names_with_quotes_are_fine() -> None:
    for name in ("it's", 'say "x"', "a;b--", "日本", "e\u0301", " outer "):
        with open_source({name: BASE}) as source:
            assert source.read(name).tobytes() == BASE.tobytes()


def test_tensors_that_numpy_lacks_are_refused_by_name() -> None:
    with pytest.raises(
        UnsupportedFormatError, match=r"'w' has dtype torch\.float8_e8m0fnu.* one of: f64,"
    ):
        open_source({"w": torch.ones(2, dtype=torch.float8_e8m0fnu)})


@pytest.mark.parametrize(
    "large",
    [np.broadcast_to(np.float32(1), (1 << 45,)), torch.ones(1).expand(1 << 45)],
    ids=["numpy", "torch"],
)
def test_what_claims_more_than_there_is_memory_for_is_named(large: Any) -> None:
    """torch's own RuntimeError was shown, which names no tensor."""
    with (
        open_source({"w": large}) as source,
        pytest.raises(BudgetError, match="no memory for the 140737488355328 bytes of tensor 'w'"),
    ):
        source.read("w")
