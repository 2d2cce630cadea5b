# SPDX-License-Identifier: Apache-2.0
# Types of the native module. Private: only the facades import it. One part per area, in the order
# of csrc/bindings/bind_<area>.cpp.

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

# ---- cpu ----

def version() -> str: ...
def active_kernel() -> str: ...
def active_kernel_reason() -> str: ...
def default_threads() -> int: ...
def limit_threads(most: int, /) -> int: ...
def kernel_infos() -> list[tuple[str, bool, bool, str]]: ...

# ---- hash ----

def hash_blocks(
    data: NDArray[np.uint8],
    dtype: int,
    block_rows: int,
    block_cols: int,
    seed: int = 0,
    threads: int = 0,
) -> NDArray[np.uint64]: ...
def hash_buffer(buffer: Buffer, /, *, seed: int = 0) -> bytes: ...

# ---- codec and pages ----

PAGE_VERSION: int
DELTA_PAGE_VERSION: int
PAGE_HEADER_BYTES: int
SLOT_BYTES: int
BLOCK_ALIGNMENT: int
SLOT_DTYPE: np.dtype[np.void]

class Page:
    def __init__(self, payload: bytes) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def n_slots(self) -> int: ...
    @property
    def has_factors(self) -> bool: ...
    @property
    def checksum(self) -> bytes: ...
    @property
    def slots(self) -> NDArray[np.void]: ...
    @property
    def payload(self) -> bytes: ...

def encode_blocks(
    data: NDArray[np.uint8],
    dtype: int,
    block_rows: int,
    block_cols: int,
    indices: NDArray[np.int64],
    planes: bool,
    threads: int = 0,
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]: ...
def have_factors(
    arena: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    lengths: NDArray[np.int64],
    encodings: NDArray[np.uint8],
) -> NDArray[np.bool_]: ...

#: Rank, exponent, factors of rows and of columns, and for each block the numbers of its own.
Factors: TypeAlias = tuple[
    int,
    int,
    NDArray[np.int32],
    NDArray[np.int32],
    NDArray[np.int64],
    NDArray[np.int64],
]

def encode_deltas(
    data: NDArray[np.uint8],
    dtype: int,
    block_rows: int,
    block_cols: int,
    indices: NDArray[np.int64],
    base_data: NDArray[np.uint8],
    base_dtype: int,
    base_block_rows: int,
    base_block_cols: int,
    base_indices: NDArray[np.int64],
    limits: NDArray[np.int64],
    max_rel_error: float | None,
    factors: Factors | None = None,
    is_transposed: bool = False,
    threads: int = 0,
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]: ...
def estimate_deltas(
    data: NDArray[np.uint8],
    dtype: int,
    block_rows: int,
    block_cols: int,
    indices: NDArray[np.int64],
    base_data: NDArray[np.uint8],
    base_dtype: int,
    base_block_rows: int,
    base_block_cols: int,
    base_indices: NDArray[np.int64],
    max_rel_error: float | None,
    threads: int = 0,
) -> NDArray[np.int64]: ...
def build_page(
    arena: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    lengths: NDArray[np.int64],
    encodings: NDArray[np.uint8],
    dtypes: NDArray[np.uint8],
    rows: NDArray[np.uint32],
    cols: NDArray[np.uint32],
    bases: NDArray[np.uint64],
) -> bytes: ...
def gather_page(
    pages: Sequence[Page], page_index: NDArray[np.uint32], slots: NDArray[np.uint32]
) -> bytes: ...
def encoded_blocks(
    pages: Sequence[Page], page_index: NDArray[np.uint32], slots: NDArray[np.uint32]
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]: ...
def page_checksum(payload: bytes) -> bytes: ...

#: Pages, index of each block's base among them (-1 for none), slot on it.
Bases: TypeAlias = tuple[Sequence[Page], NDArray[np.int64], NDArray[np.uint32]]

def page_digests(page: Page, threads: int = 0) -> NDArray[np.uint64]: ...
def block_digests(
    pages: Sequence[Page],
    page_index: NDArray[np.uint32],
    slots: NDArray[np.uint32],
    bases: Bases | None = None,
    threads: int = 0,
) -> NDArray[np.uint64]: ...
def read_blocks(
    pages: Sequence[Page],
    page_index: NDArray[np.uint32],
    slots: NDArray[np.uint32],
    indices: NDArray[np.int64],
    out: NDArray[np.uint8],
    dtype: int,
    block_rows: int,
    block_cols: int,
    bases: Bases | None = None,
    threads: int = 0,
) -> None: ...
def blocks_equal(
    data: NDArray[np.uint8],
    dtype: int,
    block_rows: int,
    block_cols: int,
    indices: NDArray[np.int64],
    pages: Sequence[Page],
    page_index: NDArray[np.uint32],
    slots: NDArray[np.uint32],
    bases: Bases | None = None,
    threads: int = 0,
) -> NDArray[np.bool_]: ...
def same_block(
    page_a: Page,
    slot_a: int,
    page_b: Page,
    slot_b: int,
    base_a: tuple[Page, int] | None = None,
    base_b: tuple[Page, int] | None = None,
) -> bool: ...

# ---- storage: the buffer pool ----

class Reservation:
    def release(self) -> None: ...

class PageMemory:
    def __init__(self, size: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class BufferPool:
    def __init__(self, budget_bytes: int, policy: str = "reuse") -> None: ...
    def pin(self, ids: NDArray[np.int64], ahead: bool = False) -> list[Page | None]: ...
    def insert(self, id: int, payload: bytes, ahead: bool = False) -> Page: ...
    def adopt(self, id: int, memory: PageMemory, checksum: bytes, ahead: bool = False) -> Page: ...
    def reserve(self, bytes: int) -> Reservation: ...
    def owns(self, owner: int, pages: NDArray[np.int64]) -> None: ...
    def call(self, owner: int) -> bool: ...
    def record(self, max_uses: int) -> None: ...
    def recorded(
        self,
    ) -> tuple[
        NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint32], NDArray[np.int64], bool
    ]: ...
    def count_resident(self, ids: NDArray[np.int64]) -> int: ...
    def drop(self, ids: NDArray[np.int64]) -> None: ...
    def clear(self) -> None: ...
    def stats(self) -> dict[str, int]: ...

def replay(
    pages: NDArray[np.int64],
    bytes: NDArray[np.uint32],
    calls: NDArray[np.uint32],
    owners: NDArray[np.int64],
    budget_bytes: int,
    policy: str | None,
) -> tuple[int, int, int, int]: ...

# ---- gemm: products, rows, bags ----

class BlockWindow:
    def __init__(
        self,
        page_ids: NDArray[np.int64],
        page_index: NDArray[np.uint32],
        slots: NDArray[np.uint32],
        bases: tuple[NDArray[np.int64], NDArray[np.uint32]] | None = None,
    ) -> None: ...
    @property
    def remembers(self) -> bool: ...

class Matmul:
    def __init__(
        self,
        rows: int,
        cols: int,
        block_rows: int,
        block_cols: int,
        dtype: int,
        x: NDArray[Any],
        bias: NDArray[Any] | None,
        activation: str,
        transpose: bool,
        y: NDArray[Any],
        threads: int = 0,
        variants: NDArray[np.uint8] | None = None,
        places: NDArray[np.uint32] | None = None,
    ) -> None: ...
    def feed(
        self,
        pages: Sequence[Page],
        page_index: NDArray[np.uint32],
        slots: NDArray[np.uint32],
        bases: Bases | None = None,
        members: NDArray[np.uint64] | None = None,
    ) -> None: ...
    def feed_resident(
        self,
        pool: BufferPool,
        window: BlockWindow,
        members: NDArray[np.uint64] | None = None,
    ) -> bool: ...
    @property
    def fed(self) -> int: ...

class Stack:
    def __init__(
        self,
        # rows, cols, block_rows, block_cols, dtype, bias, activation, transpose, windows
        layers: Sequence[
            tuple[int, int, int, int, int, NDArray[Any] | None, str, bool, Sequence[BlockWindow]]
        ],
        page_ids: NDArray[np.int64],
    ) -> None: ...
    def run(
        self, pool: BufferPool, x: NDArray[Any], threads: int = 0, as_bf16: bool = False
    ) -> NDArray[Any] | None: ...

def compute_dtype(dtype: int) -> int: ...
def activate(values: NDArray[Any], activation: str, threads: int = 0) -> None: ...

# ---- rows: gather and bags ----

class RowTable:
    def __init__(
        self,
        rows: int,
        cols: int,
        block_rows: int,
        block_cols: int,
        dtype: int,
        page_ids: NDArray[np.int64],
        slots: NDArray[np.uint32],
        base_page_ids: NDArray[np.int64] | None = None,
        base_slots: NDArray[np.uint32] | None = None,
    ) -> None: ...
    def take(
        self,
        pool: BufferPool,
        ids: NDArray[np.int64],
        out: NDArray[np.uint8],
        threads: int = 0,
    ) -> NDArray[np.int64] | None: ...
    def take_from(
        self,
        page_ids: NDArray[np.int64],
        pages: Sequence[Page],
        ids: NDArray[np.int64],
        out: NDArray[np.uint8],
        threads: int = 0,
    ) -> None: ...
    def bag(
        self,
        pool: BufferPool,
        bags: Bags,
        mode: str,
        out: NDArray[Any],
        threads: int = 0,
    ) -> NDArray[np.int64] | None: ...
    def take_blocks(
        self,
        numbers: NDArray[np.int64],
        pages: Sequence[Page],
        page_index: NDArray[np.uint32],
        slots: NDArray[np.uint32],
        bases: Bases | None,
        ids: NDArray[np.int64],
        out: NDArray[np.uint8],
        threads: int = 0,
    ) -> None: ...
    def bag_blocks(
        self,
        numbers: NDArray[np.int64],
        pages: Sequence[Page],
        page_index: NDArray[np.uint32],
        slots: NDArray[np.uint32],
        bases: Bases | None,
        bags: Bags,
        mode: str,
        out: NDArray[Any],
        threads: int = 0,
    ) -> None: ...

class Bags:
    def __init__(
        self,
        ids: NDArray[np.int64],
        edges: NDArray[np.int64],
        weights: NDArray[np.float64] | None = None,
    ) -> None: ...

# ---- conv ----

class Conv2d:
    def __init__(
        self,
        rows: int,
        cols: int,
        block_rows: int,
        block_cols: int,
        dtype: int,
        x: NDArray[Any],
        bias: NDArray[Any] | None,
        activation: str,
        y: NDArray[Any],
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        threads: int = 0,
    ) -> None: ...
    def feed(
        self,
        pages: Sequence[Page],
        page_index: NDArray[np.uint32],
        slots: NDArray[np.uint32],
        bases: Bases | None = None,
    ) -> None: ...
    def feed_resident(
        self,
        pool: BufferPool,
        window: BlockWindow,
    ) -> bool: ...
    @property
    def fed(self) -> int: ...

# ---- packing ----

def pack_pages(
    owner_indptr: NDArray[np.int64],
    owner_ids: NDArray[np.int64],
    capacity: int,
    sizes: NDArray[np.int64] | None,
    existing_indptr: NDArray[np.int64],
    existing_ids: NDArray[np.int64],
    weights: NDArray[np.float64] | None,
    algorithm: str,
) -> tuple[
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int64],
    int,
    bool,
]: ...
def check_layout(
    owner_indptr: NDArray[np.int64],
    owner_ids: NDArray[np.int64],
    capacity: int,
    sizes: NDArray[np.int64] | None,
    existing_indptr: NDArray[np.int64],
    existing_ids: NDArray[np.int64],
    algorithm: str,
    page_indptr: NDArray[np.int64],
    page_ids: NDArray[np.int64],
    read_indptr: NDArray[np.int64],
    read_pages: NDArray[np.int64],
) -> None: ...

# ---- similarity ----

class L2Index:
    def __init__(
        self,
        dtype: int,
        rows: int,
        cols: int,
        r: float,
        bands: int,
        band_rows: int,
        seed: int,
    ) -> None: ...
    def add(
        self, blocks: NDArray[Any], ids: NDArray[np.int64], whole: bool, threads: int = 0
    ) -> None: ...
    def remove(self, ids: NDArray[np.int64]) -> None: ...
    def merge(self, other: L2Index, threads: int = 0) -> None: ...
    def select(self, ids: NDArray[np.int64], new_ids: NDArray[np.int64]) -> L2Index: ...
    def query(
        self, blocks: NDArray[Any], k: int, whole: bool, threads: int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]: ...
    def hashes(self, blocks: NDArray[Any], whole: bool, threads: int = 0) -> NDArray[np.int32]: ...
    def contains(self, id: int) -> bool: ...
    def ids(self) -> NDArray[np.int64]: ...
    def save(self) -> bytes: ...
    @staticmethod
    def load(payload: bytes, threads: int = 0) -> L2Index: ...
    @property
    def size(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def parameters(self) -> tuple[int, int, int, float, int, int, int]: ...

def compare_blocks(
    a: NDArray[Any],
    b: NDArray[Any],
    dtype: int,
    rows: int,
    cols: int,
    left: NDArray[np.int64],
    right: NDArray[np.int64],
    eps: float,
    limit: float,
    threads: int = 0,
) -> NDArray[np.float64]: ...
def block_magnitudes(
    blocks: NDArray[Any], dtype: int, rows: int, cols: int, whole: bool, threads: int = 0
) -> NDArray[np.float64]: ...
