# SPDX-License-Identifier: Apache-2.0
"""Lists of numbers in JSON: long ones are cut, and give what short ones would."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydedup.http import numbers
from pydedup.http.datatypes import DATATYPES
from pydedup.http.problems import HttpError
from pydedup.http.requests import parse_infer


def body_of(
    data: Any, shape: list[int], datatype: str = "FP64", indent: int | None = None
) -> bytes:
    entry = {"name": "x", "datatype": datatype, "shape": shape, "data": data}
    return json.dumps({"id": "a", "inputs": [entry]}, indent=indent).encode()


def read(body: bytes) -> Any:
    return parse_infer(body, None).inputs["x"]


@pytest.fixture(params=[64, 1024, 65536])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Pieces so small that short documents are cut too."""
    size: int = request.param
    monkeypatch.setattr(numbers, "PIECE_BYTES", size)
    return size


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "shape", [(5000,), (50, 100), (2, 2500), (4000, 1), (10, 20, 20), (3, 1, 999)]
)
def test_what_is_cut_gives_the_same(piece: int, shape: tuple[int, ...], indent: int | None) -> None:
    wanted = np.random.default_rng(0).standard_normal(shape)
    for data in (wanted.tolist(), wanted.reshape(-1).tolist()):
        np.testing.assert_array_equal(read(body_of(data, list(shape), indent=indent)), wanted)


@pytest.mark.parametrize("name", sorted(set(DATATYPES) - {"BF16"}))
def test_every_datatype(piece: int, name: str) -> None:
    dtype = DATATYPES[name]
    rng = np.random.default_rng(0)
    if dtype.kind == "f":
        wanted = rng.standard_normal(3000).astype(dtype)
    elif dtype.kind == "b":
        wanted = rng.integers(0, 2, 3000).astype(bool)
    else:
        info = np.iinfo(dtype)
        wanted = rng.integers(info.min, info.max, 3000, dtype, endpoint=True)
        wanted[:2] = info.min, info.max
    found = read(body_of(wanted.tolist(), [3000], name))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, wanted)


def test_not_finite(piece: int) -> None:
    data = [1.5, float("nan"), float("inf"), float("-inf"), None] * 500
    found = read(body_of(data, [2500]))
    np.testing.assert_array_equal(found[:5], [1.5, np.nan, np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(found.reshape(500, 5), np.tile(found[:5], (500, 1)))


def test_true_among_numbers_is_refused(piece: int) -> None:
    """It became 1."""
    data: list[float] = [1.5, 0.0, 2.0] * 1000
    data[2000] = True
    with pytest.raises(HttpError, match=r"inputs\[0\].data: numbers are needed, not true or false"):
        read(body_of(data, [3000]))
    assert read(body_of([True, 0, 1, False] * 1000, [4000], "BOOL"))[:4].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(("name", "number"), [("FP16", 65520), ("FP32", -3.5e38), ("FP32", 10**39)])
def test_numbers_beyond_a_datatype_are_refused(piece: int, name: str, number: float) -> None:
    """They became infinite."""
    data = [1.5, float("inf"), None] * 1000
    assert np.isinf(read(body_of(data, [3000], name))).sum() == 1000
    data[2000] = number
    with pytest.raises(HttpError, match=r"inputs\[0\]\.data: .* is no float.*: the largest is"):
        read(body_of(data, [3000], name))


BROKEN = {
    "a row is short": lambda rows: [*rows[:-1], rows[-1][:-1]],
    "a number moved to the row before": lambda rows: [
        *rows[:7],
        [*rows[7], rows[8][0]],
        rows[8][1:],
        *rows[9:],
    ],
    "a row is missing": lambda rows: rows[:-1],
    "a row too many": lambda rows: [*rows, rows[0]],
    "nested deeper in one place": lambda rows: [*rows[:30], [rows[30]], *rows[31:]],
    "a number beside rows": lambda rows: [*rows[:30], 5.0, *rows[30:]],
    "nested deeper everywhere": lambda rows: [[row] for row in rows],
    "text": lambda rows: [*rows[:30], ["a"] * 40, *rows[31:]],
    "null in whole numbers": lambda rows: [*rows[:30], [None] * 40, *rows[31:]],
    "an object": lambda rows: [*rows[:30], [{}] * 40, *rows[31:]],
    "a fraction in whole numbers": lambda rows: [*rows[:30], [0.5] * 40, *rows[31:]],
    "too large": lambda rows: [*rows[:30], [2**40] * 40, *rows[31:]],
    "far too large": lambda rows: [*rows[:30], [2**80] * 40, *rows[31:]],
    "an empty row": lambda rows: [*rows[:30], [], *rows[31:]],
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_refused_cut_or_not(piece: int, name: str) -> None:
    rows = np.arange(4000).reshape(100, 40).tolist()
    assert read(body_of(rows, [100, 40], "INT32")).shape == (100, 40)
    with pytest.raises(HttpError) as caught:
        read(body_of(BROKEN[name](rows), [100, 40], "INT32"))
    assert caught.value.status == 400
    assert caught.value.message.startswith(("inputs[0].data: ", "body: "))


def test_lists_that_are_uneven_where_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "PIECE_BYTES", 16)
    a, b, c = 1.234567890123456, 2.345678901234567, 3.456789012345678  # each is a piece
    np.testing.assert_array_equal(
        read(body_of([[[a]], [[b]], [[c]]], [3, 1, 1])).reshape(-1), [a, b, c]
    )
    for text in (b"[%r],[%r]", b"[%r]],[[%r]", b"[[%r]],[[%r]]"):
        for shape in ([2], [2, 1]):
            body = body_of([], shape).replace(b"[]", text.replace(b"%r", b"1.234567890123456"))
            with pytest.raises(HttpError):
                read(body)
    for data in ([[[a]], [b], [[c]]], [[[a]], [[b]], [c]], [[[a]], b, [[c]]]):
        with pytest.raises(HttpError):
            read(body_of(data, [3, 1, 1]))


EDITS = [bytes([c]) for c in b'[],0.e-"{}: NtI\\\xff'] + [b"", b"[[", b"]]", b"],[", b"]],[["]


@settings(max_examples=500)
@given(
    commas=st.lists(st.tuples(st.integers(0, 298), st.sampled_from(EDITS)), max_size=2),
    places=st.lists(st.tuples(st.floats(0, 1), st.sampled_from(EDITS)), max_size=2),
    nested=st.sampled_from([(300,), (15, 20), (5, 3, 20), (300, 1)]),
    cut=st.sampled_from([64, 100]),
)
def test_changed_bytes_are_judged_as_in_uncut_json(
    commas: list[tuple[int, bytes]],
    places: list[tuple[float, bytes]],
    nested: tuple[int, ...],
    cut: int,
) -> None:
    shape = nested if len(nested) > 1 else (15, 20)
    data = json.dumps(np.arange(300.0).reshape(nested).tolist()).encode()
    parts = data.split(b", ")
    between = [b", "] * (len(parts) - 1)
    for number, edit in commas:
        between[number] = edit
    data = b"".join(part + mark for part, mark in zip(parts, [*between, b""], strict=True))
    text = body_of([], list(shape)).replace(b"[]", data)
    for share, edit in places:
        at = int(share * len(text))
        text = text[:at] + edit + text[at + 1 :]

    def outcome(size: int) -> Any:
        patch = pytest.MonkeyPatch()
        with patch.context() as patched:
            patched.setattr(numbers, "PIECE_BYTES", size)
            try:
                return read(text).tobytes()
            except HttpError as error:
                return error.status
            except KeyError:  # the name of the input was changed
                return "other name"

    assert outcome(cut) == outcome(1 << 30)


def test_a_list_that_is_an_answer_of_ours_comes_back() -> None:
    array = np.random.default_rng(0).standard_normal(30_000).astype(np.float32)
    text = b"[" + b"".join(numbers.json_numbers(array)) + b"]"
    np.testing.assert_array_equal(np.array(json.loads(text), np.float32), array)
    assert b"".join(numbers.json_numbers(np.empty(0, np.float32))) == b""


def test_much_json_beside_data_is_refused() -> None:
    body = b'{"id":"%s","inputs":[]}' % (b"a" * 2_000_000)
    with pytest.raises(HttpError) as caught:
        parse_infer(body, None)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"inputs":' * 50_000,
        b'{"inputs":[{"data":' + b"[" * 200_000,
        b'{"a":' + b"[" * 900,
    ],
)
def test_deep_json_is_refused(text: bytes) -> None:
    for body in (text, text + b"NaN"):
        with pytest.raises(HttpError) as caught:
            parse_infer(body, None)
        assert caught.value.status == 400


def test_others_run_while_a_long_list_is_read() -> None:
    data = np.random.default_rng(0).standard_normal(1_000_000)
    body = body_of(data.tolist(), [1_000_000], "FP32")
    # In one piece nobody else would run for nearly all of the time, each time; a busy machine takes
    # its share now and then.
    shares = [longest_pause(body) for _ in range(5)]
    assert min(shares) < 1 / 3, f"nobody else ran for these shares of the time: {shares}"


def longest_pause(body: bytes) -> float:
    """Return for which share of the time that a body is read another thread cannot run."""
    longest, stop = 0.0, threading.Event()

    def watch() -> None:
        nonlocal longest
        last = time.monotonic()
        while not stop.is_set():
            time.sleep(0.001)
            now = time.monotonic()
            longest, last = max(longest, now - last), now

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    read(body)
    took = time.monotonic() - started
    stop.set()
    watcher.join()
    return longest / took
