# SPDX-License-Identifier: Apache-2.0
"""What the core refuses by itself, whoever calls it: to its kernels an array is a pointer.

The facades make arrays fit, or name them; their tests never come to these checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pydedup import _core
from pydedup.errors import ArgumentError, CorruptStoreError, PydedupError
from pydedup.types import DType

F32 = DType.of(np.dtype(np.float32)).code


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


def u32(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.uint32)


def i64(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


def misaligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
    memory[:] = array.reshape(-1).view(np.uint8)
    return memory.view(array.dtype).reshape(array.shape)


def read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array


def page_of(**changes: Any) -> bytes:
    """Return a page of six blocks of 2 x 2, ones."""
    columns = {
        "arena": floats(24).view(np.uint8),
        "offsets": np.arange(6) * 16,
        "lengths": np.full(6, 16),
        "encodings": np.zeros(6, np.uint8),
        "dtypes": np.full(6, F32, np.uint8),
        "rows": np.full(6, 2, np.uint32),
        "cols": np.full(6, 2, np.uint32),
        "bases": np.zeros(6, np.uint64),
    }
    return _core.build_page(**(columns | changes))


PAGE = _core.Page(page_of())
ALL = np.arange(6, dtype=np.uint32)
NONE = np.zeros(6, np.uint32)


def product(**changes: Any) -> _core.Matmul:
    """Return ``ones(3, 4) @ W.T`` to be, of a W of 6 x 4."""
    arguments: dict[str, Any] = {"rows": 6, "cols": 4, "block_rows": 2, "block_cols": 2}
    arguments |= {"dtype": F32, "x": floats(3, 4), "bias": None, "activation": "none"}
    arguments |= {"transpose": False, "y": floats(3, 6)}
    return _core.Matmul(**(arguments | changes))


def table() -> _core.RowTable:
    return _core.RowTable(6, 4, 2, 2, F32, np.zeros(6, np.int64), ALL)


def huge_product(rows: int, cols: int, *, transpose: bool = False) -> _core.Matmul:
    none = floats(16, 0)
    return product(rows=rows, cols=cols, x=none, y=none, transpose=transpose, activation="relu")


def huge_table(rows: int, cols: int) -> None:
    places = np.zeros(rows, np.int64)
    of = _core.RowTable(rows, cols, 1, cols, F32, places, places.astype(np.uint32))
    none = i64().astype(np.uint32)
    bags = _core.Bags(i64(), np.zeros(17, np.int64))
    of.bag_blocks(i64(), [], none, none, None, bags, "sum", floats(0))


def take(out: np.ndarray[Any, Any]) -> None:
    table().take_from(i64(0), [PAGE], i64(5, 0), out)


def bag(
    edges: np.ndarray[Any, Any], out: np.ndarray[Any, Any], weights: Any = None, mode: str = "sum"
) -> None:
    of, numbers = table(), np.arange(6)
    bags = _core.Bags(i64(5, 0), edges, weights)
    of.bag_blocks(numbers, [PAGE], NONE, ALL, None, bags, mode, out)


def magnitudes(blocks: np.ndarray[Any, Any], *, whole: bool = False) -> np.ndarray[Any, Any]:
    return _core.block_magnitudes(blocks, F32, 2, 2, whole)


def stack(windows: Any) -> np.ndarray[Any, Any] | None:
    pool = _core.BufferPool(1 << 20)
    pool.insert(0, page_of())
    layer = (6, 4, 2, 2, F32, None, "none", False, windows)
    return _core.Stack([layer], i64(0)).run(pool, floats(3, 4))


def adopt(checksum: bytes) -> _core.Page:
    payload = page_of()
    memory = _core.PageMemory(len(payload))
    memoryview(memory)[:] = payload
    return _core.BufferPool(1 << 20).adopt(0, memory, checksum)


def window(*blocks: int) -> _core.BlockWindow:
    return _core.BlockWindow(i64(0), np.zeros(len(blocks), np.uint32), u32(*blocks))


def deltas(limits: np.ndarray[Any, Any], factors: Any = None) -> Any:
    w = floats(6, 4).view(np.uint8)
    return _core.encode_deltas(w, F32, 2, 2, i64(0), w, F32, 2, 2, i64(1), limits, None, factors)


def with_factors(**changes: Any) -> Any:
    """Encode a block of 2 x 2 with factors of rank 1."""
    two = np.zeros(2, np.int32)
    factors = {"rank": 1, "exponent": 0, "of_rows": two, "of_cols": two}
    factors |= {"row_of": i64(0), "col_of": i64(0)}
    return deltas(i64(100), tuple((factors | changes).values()))


def test_what_fits_is_taken() -> None:
    y = floats(3, 6)
    fed = product(y=y)
    fed.feed([PAGE], NONE, ALL)
    assert (y == 4).all()
    out = np.zeros((2, 16), np.uint8)
    take(out)
    assert (out.view(np.float32) == 1).all()
    sums = np.zeros((1, 4), np.float32)
    bag(i64(0, 2), sums, np.ones(2))
    assert (sums == 2).all()
    assert (magnitudes(floats(3, 2, 2)) == 1).all()
    assert (magnitudes(floats(4, 6), whole=True) == 1).all()
    result = stack([window(0, 1, 2), window(3, 4, 5)])
    assert result is not None
    assert (result == 4).all()
    assert adopt(PAGE.checksum).n_slots == 6
    assert deltas(i64(100))[1].tolist() == [0]
    assert with_factors()[2].tolist() == [0]  # it would be no smaller than the block


_X = "x must be a C-contiguous float32 array of 12 elements"
_REFUSED: list[tuple[str, Callable[[], object]]] = [
    (_X, lambda: product(x=floats(3, 8)[:, ::2])),
    (_X, lambda: product(x=np.ones((3, 4)))),
    (_X, lambda: product(x=np.ones((3, 4), ">f4"))),
    ("x is misaligned", lambda: product(x=misaligned(floats(3, 4)))),
    ("y must be .* of 18 elements", lambda: product(y=floats(3, 5))),
    ("y is misaligned", lambda: product(y=misaligned(floats(3, 6)))),
    ("y is read-only", lambda: product(y=read_only(floats(3, 6)))),
    ("bias must be .* of 6 elements", lambda: product(bias=floats(5))),
    ("block shape must be", lambda: product(block_rows=0)),
    ("too large", lambda: product(rows=1 << 40, cols=1 << 40)),
    # 2**60 times 16 are 0 elements, for who counts them in 64 bits.
    ("y of 16 x 1152921504606846976 is", lambda: huge_product(1 << 60, 0)),
    ("y of 16 x 1152921504606846976 is", lambda: huge_product(0, 1 << 60, transpose=True)),
    ("x of 16 x 1152921504606846976 is", lambda: huge_product(0, 1 << 60)),
    ("out of 16 x 1152921504606846976 is", lambda: huge_table(0, 1 << 60)),
    ("a matrix of 1 x 2305843009213693952 is", lambda: huge_table(1, 1 << 61)),
    ("unknown dtype code", lambda: product(dtype=256 + F32)),
    ("differ in length", lambda: product().feed([PAGE], NONE, ALL[:5])),
    ("must be a 1-D array", lambda: product().feed([PAGE], NONE[None], ALL[None])),
    ("pages holds a str", lambda: product().feed(["page"], NONE, ALL)),
    (
        "5 slots of bases",
        lambda: product().feed([PAGE], NONE, ALL, ([PAGE], np.zeros(6, int), ALL[:5])),
    ),
    (
        "impossible value -2",
        lambda: product().feed([PAGE], NONE, ALL, ([PAGE], i64(-2, 0, 0, 0, 0, 0), ALL)),
    ),
    ("out must be uint8", lambda: take(np.zeros((1, 16), np.uint8))),
    ("out must be uint8", lambda: take(np.zeros((2, 15), np.uint8))),
    ("edges of bags must ascend from 0 to the 2 ids", lambda: bag(i64(), floats(0, 4))),
    ("edges of bags must ascend from 0 to the 2 ids", lambda: bag(i64(0, 3), floats(1, 4))),
    ("edges of bags must ascend from 0 to the 2 ids", lambda: bag(i64(0, 2, 1), floats(2, 4))),
    ("edges of bags must ascend from 0 to the 2 ids", lambda: bag(i64(1, 2), floats(1, 4))),
    ("unknown bag mode 'mean'", lambda: bag(i64(0, 2), floats(1, 4), mode="mean")),
    ("weights are for sums", lambda: bag(i64(0, 2), floats(1, 4), np.ones(2), mode="max")),
    ("out must be .* of 4 elements", lambda: bag(i64(0, 2), floats(1, 3))),
    ("1 weights were given for 2 ids", lambda: bag(i64(0, 2), floats(1, 4), np.ones(1))),
    ("0 weights were given for 2 ids", lambda: bag(i64(0, 2), floats(1, 4), np.ones(0))),
    ("outside of the arena", lambda: page_of(offsets=np.arange(6) * 16 + 1)),
    ("outside of the arena", lambda: page_of(offsets=np.arange(6) * 16 - 1)),
    ("outside of the arena", lambda: page_of(arena=floats(23).view(np.uint8))),
    ("columns of a new page differ", lambda: page_of(bases=np.zeros(5, np.uint64))),
    ("columns of a new page differ", lambda: page_of(cols=np.full(5, 2, np.uint32))),
    ("limits must not be negative", lambda: deltas(i64(-1))),
    (r"nor 2\*\*62 bytes in all, got 4611686018427387904", lambda: deltas(i64(1 << 62))),
    (
        "a matrix is passed as uint8",
        lambda: _core.hash_blocks(np.zeros((2, 6), np.uint8), F32, 2, 2),
    ),
    ("elements of 8 bytes instead of 4", lambda: magnitudes(np.ones((3, 2, 2)))),
    ("not dense in its last axis", lambda: magnitudes(floats(3, 2, 4)[..., ::2])),
    ("not dense in its last axis", lambda: magnitudes(floats(4, 8)[:, ::2], whole=True)),
    ("negative stride", lambda: magnitudes(floats(3, 2, 2)[:, ::-1])),
    ("negative stride", lambda: magnitudes(floats(4, 4)[::-1], whole=True)),
    ("must have the shape", lambda: magnitudes(floats(3, 2, 1))),
    ("must have the shape", lambda: magnitudes(floats(3, 3))),
    ("must be a 2-D array", lambda: magnitudes(floats(16), whole=True)),
    ("have 3 numbers where each has 2", lambda: with_factors(of_rows=np.zeros(3, np.int32))),
    (
        "have 0 numbers where each has 0",
        lambda: with_factors(
            rank=0, of_rows=floats(0).astype("i4"), of_cols=floats(0).astype("i4")
        ),
    ),
    (
        "rank 1 to 64",
        lambda: with_factors(
            rank=65, of_rows=np.zeros(130, np.int32), of_cols=np.zeros(130, np.int32)
        ),
    ),
    ("-900 to 900, got 901", lambda: with_factors(exponent=901)),
    ("no number 1 of 1", lambda: with_factors(row_of=i64(1))),
    ("no number -1 of 1", lambda: with_factors(col_of=i64(-1))),
    ("for each of 1 blocks", lambda: with_factors(col_of=i64(0, 0))),
    ("a window is None", lambda: stack([None])),
    ("miss blocks", lambda: stack([window(0, 1, 2)])),
]


@pytest.mark.parametrize(("says", "call"), _REFUSED)
def test_what_does_not_fit_is_refused(says: str, call: Callable[[], object]) -> None:
    with pytest.raises(ArgumentError, match=says):
        call()


@pytest.mark.parametrize("exponent", [None, "0", 0.0, 2**40, ()])
def test_factors_that_are_no_numbers_are_refused(exponent: Any) -> None:
    with pytest.raises(TypeError):
        with_factors(exponent=exponent)
    with pytest.raises(TypeError):
        deltas(i64(100), exponent if exponent is not None else (1, 2))


def test_a_page_that_was_read_is_the_one_that_was_asked_for() -> None:
    for checksum in (b"", PAGE.checksum[:15], b"\0" * 16):
        with pytest.raises(CorruptStoreError, match="another page"):
            adopt(checksum)


@pytest.mark.parametrize("dtype", [np.int32, np.uint64, ">u4", np.float32])
def test_numbers_of_another_type_are_no_numbers(dtype: Any) -> None:
    """They are neither converted, which takes a copy, nor read as what they are not."""
    with pytest.raises((TypeError, PydedupError)):
        with_factors(row_of=i64(0).astype(dtype))
    with pytest.raises((TypeError, PydedupError)):
        product().feed([PAGE], NONE.astype(dtype), ALL)
