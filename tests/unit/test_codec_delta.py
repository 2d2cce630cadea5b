# SPDX-License-Identifier: Apache-2.0
"""Deltas: the golden page, a second reader from docs/format.md, arguments, bounds, sizes."""

from __future__ import annotations

import runpy
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pydedup import codec
from pydedup.blocks import MatrixView
from pydedup.errors import ArgumentError, CorruptStoreError
from pydedup.testing.kernels import RUNNABLE, run_with_kernel
from pydedup.types import DType

GOLDEN = Path(__file__).parents[1] / "golden"
MAKER = runpy.run_path(str(GOLDEN / "make_delta_golden.py"))
READER = runpy.run_path(str(Path(__file__).with_name("delta_reader.py")))
PLANES, DTYPES, FIELDS = READER["PLANES"], READER["DTYPES"], READER["FIELDS"]
decode_delta = READER["decode_delta"]

# ---- the golden page ----------------------------------------------------------------------------


GOLDEN_PAGES = [
    ("page_v2.page", "golden_blocks"),
    ("page_v2_extended.page", "extended_blocks"),
    ("page_v3_factors.page", "factored_blocks"),
    ("page_v4_transposed.page", "transposed_blocks"),
    ("page_v5_listed.page", "listed_blocks"),
]
# Slots of pages that are older than the version that they would have now: floats of a narrower
# dtype and a pruned block, and what has few differences. Or within a bound where they would be
# exact.
SINCE_THEN = {
    "page_v2.page": {4: 5, 8: 2, 9: 2, 15: 2},
    "page_v2_extended.page": {6: 5, 15: 5, 18: 5},
    "page_v3_factors.page": {15: 3, 16: 3},
}


def slots_of(payload: bytes) -> list[tuple[Any, ...]]:
    slots = []
    assert struct.unpack_from("<H", payload, 4) == (2,)
    for slot in codec.Page(payload).slots:
        start = int(slot["offset"])
        slots.append(
            (
                int(slot["encoding"]),
                DTYPES[int(slot["dtype"])],
                int(slot["rows"]),
                int(slot["cols"]),
                payload[start : start + int(slot["length"])],
                int(slot["base"]),
                payload[:start],
            )
        )
    return slots


@pytest.mark.parametrize(("name", "blocks"), GOLDEN_PAGES)
def test_golden_page_says_what_the_format_document_says(name: str, blocks: str) -> None:
    slots = slots_of((GOLDEN / name).read_bytes())
    assert {slot[0] for slot in slots} == {1, 2, 3}
    contents: list[bytes] = []
    for *slot, base, before in slots:
        if base:
            of_base = slots[base - 1][:5], contents[base - 1]
            contents.append(decode_delta(tuple(slot), *of_base, before))
        else:
            contents.append(PLANES["decode"](*slot))
    assert b"".join(contents) == MAKER["read_golden"]((GOLDEN / name).read_bytes())
    for content, (block, _, bound) in zip(contents, MAKER[blocks](), strict=True):
        if bound is None:
            assert content == block.tobytes()
        else:
            back = np.frombuffer(content, block.dtype).reshape(block.shape)
            assert relative_error(block, back) <= bound
            assert (back[block == 0] == 0).all()


def test_golden_page_of_factors_has_all_that_there_is() -> None:
    slots = slots_of((GOLDEN / "page_v3_factors.page").read_bytes())
    deltas = [(slot[0], slot[4]) for slot in slots if slot[5]]
    assert {data[0] for _, data in deltas} == {3}
    assert {(encoding, data[1]) for encoding, data in deltas} >= {(2, 0), (2, 1), (2, 2), (3, 0)}
    at = [24 if encoding == 3 else 16 for encoding, _ in deltas]
    behind = [data[where] for where, (_, data) in zip(at, deltas, strict=True)]
    assert behind.count(0) < len(behind) / 2  # all others name the factor of another block


def test_golden_page_of_transposed_bases_has_all_that_there_is() -> None:
    slots = slots_of((GOLDEN / "page_v4_transposed.page").read_bytes())
    deltas = [(slot[0], slot[4]) for slot in slots if slot[5]]
    assert {data[0] for _, data in deltas} == {4}
    at_rank = {2: 13, 3: 21}
    forms = {(encoding, data[1], data[at_rank[encoding]] > 0) for encoding, data in deltas}
    assert forms >= {(2, 0, False), (2, 0, True), (2, 1, False), (2, 2, True)}
    assert forms >= {(3, 1, False), (3, 1, True)}
    assert any(slot[2] != slot[3] for slot in slots if slot[5])


def test_golden_page_of_lists_has_all_that_there_is() -> None:
    slots = slots_of((GOLDEN / "page_v5_listed.page").read_bytes())
    deltas = [(slot[0], slot[1], slot[4]) for slot in slots if slot[5]]
    assert {data[:2] for *_, data in deltas} == {bytes([5, 3])}
    assert {encoding for encoding, *_ in deltas} == {2, 3}
    behind = [data[20 if encoding == 3 else 12 :] for encoding, _, data in deltas]
    dtypes = [DTYPES[data[0]] for data in behind]
    assert any(dtype != of for dtype, (_, of, _) in zip(dtypes, deltas, strict=True))
    assert {data[1] for data in behind} >= {0, 2}  # without a mask, and with one
    assert {data[2] for data in behind if not data[1]} >= {2, 16}  # lists


def test_numbers_that_are_not_finite_stay_where_factors_move() -> None:
    """But for the bits of a NaN of f16 or bf16, which goes by way of f32."""
    rng = np.random.default_rng(2)
    for dtype in (DType.F64, DType.F32, DType.F16, DType.BF16):
        size, (exponent_bits, mantissa_bits) = dtype.itemsize, FIELDS[dtype]
        words = rng.integers(0, 1 << 15, (8, 9)).astype(f"u{size}") << 8 * (size - 2)
        top = ((1 << exponent_bits) - 1) << mantissa_bits
        words.reshape(-1)[:6] = [top, top + 1, top + 77, top | 1 << (8 * size - 1), 0, 1]
        words[2, :3] = words[0, :3] | np.array(1 << (8 * size - 1), words.dtype)
        base = words.view(dtype.numpy)
        numbers = rng.integers(-900, 900, (2, 1, 2, 9), np.int32)
        numbers[1, :, :, 3:] = 0  # all elements of f16 that moved would take as much as they do
        at = np.zeros(1, np.int64)
        factors = codec.LowRankFactors(-9, numbers[0, :, :, :8].copy(), numbers[1], at, at)
        view = MatrixView.of(base, base.shape)
        encoded = codec.encode_deltas(view, [0], view, [0], factors=factors)
        assert encoded.lengths[0] > 0
        slot = (2, dtype, 8, 9, encoded.arena.tobytes())
        assert decode_delta(slot, (0, dtype, 8, 9), base.tobytes(), b"") == base.tobytes()


@pytest.mark.parametrize(("name", "blocks"), GOLDEN_PAGES)
def test_golden_page_is_written(name: str, blocks: str) -> None:
    is_transposed = blocks == "transposed_blocks"
    maker = {"factored_blocks": "golden_factors", "transposed_blocks": "transposed_factors"}
    factors = MAKER[maker[blocks]]() if blocks in maker else None
    built = MAKER["build_golden"](MAKER[blocks](), factors, is_transposed=is_transposed)
    golden = (GOLDEN / name).read_bytes()
    if name not in SINCE_THEN:
        assert built == golden
        return
    slots, before = slots_of(built), slots_of(golden)
    versions = {}
    for number, (now, then) in enumerate(zip(slots, before, strict=True)):
        if now[:6] != then[:6]:
            versions[number] = now[4][0]
            assert now[4][0] > then[4][0] or (now[0], then[0]) == (2, 3)
            assert len(now[4]) <= len(then[4]) + 2
    assert versions == SINCE_THEN[name]


@pytest.mark.parametrize("kernel", RUNNABLE)
def test_every_kernel_reads_and_writes_the_golden_page(kernel: str) -> None:
    script = (
        "import runpy, sys\n"
        "tests = runpy.run_path(sys.argv[1])\n"
        "for page in tests['GOLDEN_PAGES']:\n"
        "    tests['test_golden_page_says_what_the_format_document_says'](*page)\n"
        "    tests['test_golden_page_is_written'](*page)\n"
        "print('read and written')\n"
    )
    assert run_with_kernel(kernel, script, __file__) == "read and written\n"


# ---- behaviour ----------------------------------------------------------------------------------


def relative_error(block: NDArray[Any], back: NDArray[Any]) -> float:
    want, got = block.astype(np.float64), back.astype(np.float64)
    return float(np.linalg.norm(want - got) / np.linalg.norm(want))


def pair(shape: tuple[int, int] = (150, 130)) -> tuple[MatrixView, MatrixView]:
    rng = np.random.default_rng(1)
    base = rng.normal(0, 0.02, shape).astype(np.float32)
    moved = (base + rng.normal(0, 2e-4, shape)).astype(np.float32)
    return MatrixView.of(moved, (32, 48)), MatrixView.of(base, (32, 48))


def read_back(
    view: MatrixView, base: MatrixView, encoded: codec.EncodedBlocks
) -> NDArray[np.uint8]:
    grid, every = view.grid, np.arange(view.grid.count)
    pages = []
    for arena, ids in ((codec.encode_blocks(base, every, planes=True), None), (encoded, every + 1)):
        pages.append(
            codec.Page(
                codec.build_page(
                    arena.arena,
                    arena.offsets,
                    arena.lengths,
                    arena.encodings,
                    np.full(grid.count, view.dtype.code),
                    *grid.all_shapes(),
                    ids,
                )
            )
        )
    out = MatrixView(np.zeros_like(view.data), view.dtype, grid)
    bases = codec.StoredBases([pages[0]], np.zeros(grid.count, np.int64), every)
    codec.read_blocks(out, every, [pages[1]], np.zeros(grid.count, int), every, bases=bases)
    with pytest.raises(CorruptStoreError, match="without its base"):
        codec.read_blocks(out, [0], [pages[1]], [0], [0])
    for reason, wrong in (
        ("without its base", codec.StoredBases([], [-1], [0])),
        ("not the base that it was made from", codec.StoredBases([pages[0]], [0], [1])),
        ("base is a delta itself", codec.StoredBases([pages[1]], [0], [0])),
    ):
        with pytest.raises(CorruptStoreError, match=reason):
            codec.read_blocks(out, [0], [pages[1]], [0], [0], bases=wrong)
    return out.data


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_exact_deltas_come_back(threads: int) -> None:
    view, base = pair()
    every = np.arange(view.grid.count)
    encoded = codec.encode_deltas(view, every, base, every, threads=threads)
    assert set(encoded.encodings.tolist()) == {codec.Encoding.DELTA}
    assert codec.Encoding.DELTA.is_delta
    assert not codec.Encoding.PLANES.is_delta
    assert len(encoded.arena) < 0.67 * view.data.nbytes
    assert read_back(view, base, encoded).tobytes() == view.data.tobytes()
    estimates = codec.estimate_deltas(view, every, base, every, threads=threads)
    assert abs(estimates.sum() / len(encoded.arena) - 1) < 0.1


def test_bounded_deltas_keep_their_bound() -> None:
    view, base = pair((128, 96))
    every = np.arange(view.grid.count)
    encoded = codec.encode_deltas(view, every, base, every, max_rel_error=0.001)
    assert set(encoded.encodings.tolist()) == {codec.Encoding.QUANTISED}
    assert len(encoded.arena) < 0.15 * view.data.nbytes
    back = read_back(view, base, encoded).view(np.float32)
    for top in range(0, 128, 32):
        for left in range(0, 96, 48):
            block = np.s_[top : top + 32, left : left + 48]
            assert relative_error(view.data.view(np.float32)[block], back[block]) <= 0.001


def test_a_limit_that_is_too_small_gives_no_delta() -> None:
    view, base = pair()
    limits = np.full(view.grid.count, 10**4)
    limits[::2] = 100
    every = np.arange(view.grid.count)
    encoded = codec.encode_deltas(view, every, base, every, limits=limits)
    assert (encoded.lengths[::2] == 0).all()
    assert (encoded.lengths[1::2] > 0).all()
    assert (encoded.lengths <= limits).all()
    assert encoded.lengths.sum() == len(encoded.arena)
    some = encoded.select(every[1::3])
    assert some.encodings.tolist() == encoded.encodings[1::3].tolist()
    for number, of_all in enumerate(every[1::3].tolist()):
        parts = [
            one.arena[one.offsets[at] :][: one.lengths[at]].tobytes()
            for one, at in ((some, number), (encoded, of_all))
        ]
        assert parts[0] == parts[1]
    none = codec.encode_deltas(view, [], base, [])
    assert len(none.lengths) == len(none.arena) == len(encoded.select(every[:0]).arena) == 0


def test_bad_arguments() -> None:
    view, base = pair()
    for index in (-view.grid.count - 1, -1, view.grid.count):
        with pytest.raises(ArgumentError, match="outside of a grid of 15 blocks"):
            codec.encode_deltas(view, [index], base, [0])
        with pytest.raises(ArgumentError, match="outside of a grid of 15 blocks"):
            codec.encode_deltas(view, [3, index], base, [3, 0])
        with pytest.raises(ArgumentError, match="outside of a grid of 15 blocks"):
            codec.encode_deltas(view, [0], base, [index])
        with pytest.raises(ArgumentError, match="outside of a grid of 15 blocks"):
            codec.estimate_deltas(view, [index], base, [0])
    with pytest.raises(ArgumentError, match="1 block indices came with 2 bases"):
        codec.encode_deltas(view, [0], base, [0, 1])
    with pytest.raises(ArgumentError, match="shape of its base"):
        codec.encode_deltas(view, [0], base, [14])
    for bound in (0.0, 1.0, -0.5, float("nan"), True):
        with pytest.raises(ArgumentError, match="max_rel_error"):
            codec.encode_deltas(view, [0], base, [0], max_rel_error=bound)
    with pytest.raises(ArgumentError, match="max_rel_error"):
        codec.encode_deltas(view, [0], base, [0], max_rel_error="0.1")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="limit"):
        codec.encode_deltas(view, [0], base, [0], limits=[-1])
    with pytest.raises(ArgumentError, match="limits"):
        codec.encode_deltas(view, [0], base, [0], limits=[5, 5])
    ints = MatrixView(base.data, DType.I32, base.grid)
    with pytest.raises(ArgumentError, match="only f64, f32, f16 and bf16 are converted"):
        codec.encode_deltas(view, [0], ints, [0])


def test_bad_factors() -> None:
    view = MatrixView.of(np.ones((8, 8), np.float32), (8, 8))
    of, at = np.ones((1, 2, 8), np.int32), np.zeros(1, np.int64)

    def encoded(**changes: Any) -> codec.EncodedBlocks:
        sound = {"exponent": -20, "of_rows": of, "of_cols": of, "row_of": at, "col_of": at}
        factors = codec.LowRankFactors(**(sound | changes))
        return codec.encode_deltas(view, [0], view, [0], factors=factors)

    assert encoded().have_factors().tolist() == [True]
    assert encoded(exponent=np.int64(-20)).arena.tobytes() == encoded().arena.tobytes()
    for exponent in (901, -901, 10**30, 1.5, "1", True, None):
        with pytest.raises(ArgumentError, match=r"factors\.exponent must be"):
            encoded(exponent=exponent)
    for shape in ((2, 8), (16,), (1, 1, 2, 8)):
        with pytest.raises(ArgumentError, match=r"factors\.of_cols must be an array"):
            encoded(of_cols=np.ones(shape, np.int32))
    for bad, says in (
        ([[[1] * 8] * 2], "must be a numpy array"),
        (of.astype(np.float32), "must hold integers"),
        (of.astype(np.int64) << 40, "must hold integers of int32"),
        (of << 23, r"numbers below 2\^23"),
        (np.ones((1, 3, 8), np.int32), "has rank 3, and factors.of_cols 2"),
        (np.ones((1, 2, 7), np.int32), "14 numbers where each has 16"),
        (of[:0], "no number 0 of 0"),
    ):
        with pytest.raises(ArgumentError, match=says):
            encoded(of_rows=bad)
    for rank in (0, 65):
        wrong = np.ones((1, rank, 8), np.int32)
        with pytest.raises(ArgumentError, match=r"where each has 0|rank 1 to 64"):
            encoded(of_rows=wrong, of_cols=wrong)
    for which in ([1], [-1], [], [0, 0], 0, [0.5]):
        with pytest.raises(ArgumentError, match="factors"):
            encoded(row_of=which)
    for factors in (3, "x", (1, 2)):
        with pytest.raises(ArgumentError, match="must be LowRankFactors or None"):
            codec.encode_deltas(view, [0], view, [0], factors=factors)  # type: ignore[arg-type]
    ints = MatrixView.of(np.ones((8, 8), np.int32), (8, 8))
    sound = codec.LowRankFactors(-20, of, of, at, at)
    with pytest.raises(ArgumentError, match="only f64, f32, f16 and bf16 have deltas with factors"):
        codec.encode_deltas(ints, [0], ints, [0], factors=sound)
    none = codec.encode_deltas(view, [0], view, [0], limits=[5], factors=sound)
    assert none.have_factors().tolist() == [False]


@pytest.mark.parametrize("max_rel_error", [None, 0.001])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.F64, DType.I8, DType.U16])
def test_transposed_bases(dtype: DType, max_rel_error: float | None) -> None:
    """Blocks of all shapes at once: the grid of the bases is the transpose of theirs."""
    rng = np.random.default_rng(3)
    base = (rng.normal(0, 20, (150, 130))).astype(np.float32).astype(dtype.numpy)
    moved = np.ascontiguousarray(base.T)
    moved[::7, ::3] *= 2
    view, base_view = MatrixView.of(moved, (48, 32)), MatrixView.of(base, (32, 48))
    every = np.arange(view.grid.count)
    down, across = np.divmod(every, view.grid.grid_cols)
    bases = across * base_view.grid.grid_cols + down
    encoded = codec.encode_deltas(
        view, every, base_view, bases, max_rel_error=max_rel_error, is_transposed=True
    )
    assert (encoded.lengths > 0).all()
    assert len(encoded.arena) < 0.3 * view.data.nbytes
    assert not encoded.have_factors().any()
    pages = []
    for arena, grid, tags in (
        (codec.encode_blocks(base_view, every, planes=True), base_view.grid, None),
        (encoded, view.grid, every + 1),
    ):
        columns = arena.arena, arena.offsets, arena.lengths, arena.encodings
        dtypes = np.full(len(every), dtype.code)
        pages.append(codec.Page(codec.build_page(*columns, dtypes, *grid.all_shapes(), tags)))
    out = MatrixView(np.zeros_like(view.data), dtype, view.grid)
    none = np.zeros(len(every), np.int64)
    there = codec.StoredBases([pages[0]], none, bases)
    codec.read_blocks(out, every, [pages[1]], none, every, bases=there)
    back = out.data.view(dtype.numpy)
    if max_rel_error is None or not dtype.is_float:
        assert back.tobytes() == moved.tobytes()
    else:
        assert relative_error(moved, back) <= max_rel_error
    beside = codec.StoredBases([pages[0]], none, np.roll(bases, 1))
    with pytest.raises(CorruptStoreError, match=r"not the base that it was made from|its base has"):
        codec.read_blocks(out, every, [pages[1]], none, every, bases=beside)


def test_a_transposed_base_has_the_shape_of_a_transposed_block() -> None:
    view, base = pair((32, 48))
    with pytest.raises(ArgumentError, match="shape of its base, transposed: the block has 32 x 48"):
        codec.encode_deltas(view, [0], base, [0], is_transposed=True)


def test_a_page_names_the_bases_of_its_deltas() -> None:
    view, base = pair((32, 48))
    encoded = codec.encode_deltas(view, [0], base, [0])
    columns = ([0], encoded.lengths, encoded.encodings, [view.dtype.code], [32], [48])
    with pytest.raises(ArgumentError, match="names no base"):
        codec.build_page(encoded.arena, *columns)
    for tag in (7, 2**64 - 1):  # any digest there is
        page = codec.build_page(encoded.arena, *columns, [tag])
        assert page[4] == codec.DELTA_PAGE_VERSION == codec.PAGE_VERSION
        assert codec.Page(page).slots["base"].tolist() == [tag]


def test_on_a_page_with_deltas_only_raw_blocks_are_aligned() -> None:
    payload = (GOLDEN / "page_v2.page").read_bytes()
    (n_slots,) = struct.unpack_from("<I", payload, 24)
    end, gaps = 64 + 32 * n_slots, 0
    for slot in range(n_slots):
        encoding, _, _, _, _, length, offset, _ = struct.unpack_from(
            "<BBHIIIQQ", payload, 64 + 32 * slot
        )
        start = -(-end // 64) * 64 if encoding == 0 else end
        assert offset == start
        assert not any(payload[end:start])
        gaps += encoding != 0 and end % 64 != 0
        end = start + length
    assert end == len(payload)
    assert gaps > 3  # places where version 1 would have left a gap
