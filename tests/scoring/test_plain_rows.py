# SPDX-License-Identifier: Apache-2.0
"""Rows that become features all at once are what they are one by one, or are left to that."""

from __future__ import annotations

import datetime
import re
import struct
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pydedup.errors import ArgumentError
from pydedup.serving.features import InputKind, features_of, plain_rows
from pydedup.text import row_key

NUMBERS = st.one_of(
    st.floats(width=32),
    st.floats(),
    st.integers(-(2**66), 2**66),
    st.booleans(),
    st.none(),
    st.sampled_from(["1.5", 10**400]),
)
EASY = st.one_of(st.floats(-1e6, 1e6), st.integers(-1000, 1000))
KINDS = st.builds(
    InputKind, ids=st.booleans(), width=st.sampled_from([None, 1, 2, 3]), as_given=st.booleans()
)


@st.composite
def tables(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    width = draw(st.integers(1, 3))
    cell = draw(st.sampled_from([NUMBERS, EASY, st.floats(width=32), st.integers(-5, 5)]))
    return draw(st.lists(st.tuples(*[cell] * width), max_size=4))


def one_by_one(rows: list[tuple[Any, ...]], kind: InputKind) -> list[Any] | None:
    try:
        return [features_of(row, [f"f{i}" for i in range(len(row))], kind) for row in rows]
    except ArgumentError:
        return None


class _Float(float):
    """A number that is looked at by itself, as all of a subclass are."""


@given(row=st.lists(st.one_of(NUMBERS, EASY, st.sampled_from([2.0**128, -(2**128)])), min_size=1))
def test_numbers_of_one_row_are_looked_at_together(row: list[Any]) -> None:
    def told(values: list[Any]) -> Any:
        try:
            return features_of(values, names, InputKind(ids=False, width=None))
        except ArgumentError as error:
            return str(error)

    names = [f"f{i}" for i in range(len(row))]
    singly = told([_Float(value) if isinstance(value, float) else value for value in row])
    np.testing.assert_array_equal(told(row), singly, strict=True)


@given(rows=tables(), kind=KINDS)
def test_numbers(rows: list[tuple[Any, ...]], kind: InputKind) -> None:
    at_once = plain_rows(rows, kind)
    if at_once is None:
        return
    expected = one_by_one(rows, kind)
    assert expected is not None
    assert at_once.dtype == expected[0].dtype
    np.testing.assert_array_equal(at_once, np.stack(expected))


@given(
    values=st.lists(st.binary(max_size=12), min_size=1, max_size=3),
    width=st.sampled_from([None, 1, 2]),
)
def test_vectors_of_bytes(values: list[bytes], width: int | None) -> None:
    rows, kind = [(value,) for value in values], InputKind(ids=False, width=width)
    at_once = plain_rows(rows, kind)
    if at_once is None:
        return
    expected = one_by_one(rows, kind)
    assert expected is not None
    np.testing.assert_array_equal(at_once, np.stack(expected))


@pytest.mark.parametrize(
    ("rows", "kind", "dtype"),
    [
        ([(1.5, 2), (3, -4.25)], InputKind(ids=False, width=2), np.float32),
        ([(1, 2), (3, 4)], InputKind(ids=True, width=None), np.int64),
        ([(1, 2), (3, 4)], InputKind(ids=False, width=None, as_given=True), np.int64),
        ([(1.0,), (0.5,)], InputKind(ids=False, width=None, as_given=True), np.float32),
        ([(struct.pack("<2f", 1, 2),)] * 2, InputKind(ids=False, width=2), np.float32),
    ],
)
def test_what_is_plain_is_seen(rows: list[tuple[Any, ...]], kind: InputKind, dtype: type) -> None:
    """Otherwise the tests above would say nothing."""
    found = plain_rows(rows, kind)
    assert found is not None
    assert found.dtype == dtype
    assert found.shape[0] == len(rows)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [(1.0, None)],
        [(1.0, "2")],
        [(1.0, float("nan"))],
        [(1.0, 1e39)],
        [(1.0, 10**400)],
        [(True, 2.0)],
        [(b"",)],
        [(b"abc",)],
        [(struct.pack("<f", 1),), (struct.pack("<2f", 1, 2),)],
        # As many bytes as three of the first have: numbers of one row would be another's.
        [(struct.pack("<2f", 1, 2),), (struct.pack("<f", 3),), (struct.pack("<3f", 4, 5, 6),)],
        [(struct.pack("<f", float("inf")),)],
        [(struct.pack("<f", 1), struct.pack("<f", 2))],
    ],
)
def test_what_may_be_wrong_is_left(rows: list[tuple[Any, ...]]) -> None:
    assert plain_rows(rows, InputKind(ids=False, width=None)) is None


@pytest.mark.parametrize("ids", [False, True])
def test_a_number_of_many_digits_is_told_in_short(ids: bool) -> None:
    with pytest.raises(ArgumentError, match=r"^f is 10{24}\.\.\. \(4001 digits\), ") as told:
        features_of([f"[{10**4000}]"], ["f"], InputKind(ids, width=None))
    assert len(str(told.value)) < 100


@pytest.mark.parametrize("ids", [False, True])
def test_a_decimal_of_more_digits_than_python_writes_is_told(ids: bool) -> None:
    """PostgreSQL's have up to 131,072."""
    with pytest.raises(ArgumentError, match=r"^f is inf$"):
        features_of([Decimal("1e5000")], ["f"], InputKind(ids, width=None))


def test_ids_go_as_far_as_64_bits_do() -> None:
    kind = InputKind(ids=True, width=None)
    for end in (-(2**63), 2**63 - 1):
        assert features_of([end], ["f"], kind).tolist() == [end]
    for beyond in (-(2**63) - 1, 2**63):
        with pytest.raises(ArgumentError, match=f"f is {beyond}, and the model takes integer ids"):
            features_of([beyond], ["f"], kind)


def test_a_list_may_be_as_deep_as_arrays_are() -> None:
    kind = InputKind(ids=False, width=None)
    assert features_of(["[" * 31 + "1" + "]" * 31], ["f"], kind).shape == (1,) * 31
    with pytest.raises(ArgumentError, match="f is nested 32 deep; 31 is the most"):
        features_of(["[" * 32 + "1" + "]" * 32], ["f"], kind)
    with pytest.raises(ArgumentError, match="f is a text that is no JSON array of numbers"):
        features_of(["[" * 100_000 + "]" * 100_000], ["f"], kind)  # deeper than Python reads


@pytest.mark.parametrize("text", ["[[1, 2], [3]]", "[[1], [2, 3]]", "[[1], 2]", "[1, [2]]"])
def test_lists_that_differ_in_length_are_told(text: str) -> None:
    with pytest.raises(ArgumentError, match="the lists in f differ in length"):
        features_of([text], ["f"], InputKind(ids=False, width=None))


def test_keys_and_values_are_told_as_people_call_them() -> None:
    """Messages had the names of Python's types, and hundreds of digits of a key."""
    keys = {
        "1.50": Decimal("1.50"),
        "10:00:00": datetime.timedelta(hours=10),
        "2026-01-02 03:04:05": datetime.datetime(2026, 1, 2, 3, 4, 5),
        "00000000-0000-0000-0000-00000000000a": UUID(int=10),
        "0x00ff": b"\0\xff",
        "'a'": "a",
        "7": 7,
        f"{'1' * 80}... (300 characters)": Decimal("1" * 300),
    }
    assert [row_key(value) for value in keys.values()] == list(keys)
    kinds = {
        "a date": datetime.datetime(2026, 1, 2),
        "a span of time": datetime.timedelta(1),
        "the text '$0.00'": "$0.00",
        f"the text '{'x' * 25}'...": "x" * 100,
        "of type UUID": UUID(int=1),
    }
    for what, value in kinds.items():
        with pytest.raises(ArgumentError, match=rf"^f is no number but {re.escape(what)}$"):
            features_of([1, value], ["g", "f"], InputKind(ids=False, width=None))
