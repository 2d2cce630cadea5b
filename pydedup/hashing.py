# SPDX-License-Identifier: Apache-2.0
"""128-bit block hashing (docs/format.md, "Block hash").

The digest is the same from every kernel and on every machine. It is not cryptographic: pydedup
compares bytes before it shares a block. Deliberately not here: what is done with equal digests.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pydedup import _core
from pydedup.arguments import as_block_shape, as_count, check_array
from pydedup.blocks import MatrixView
from pydedup.errors import ArgumentError

__all__ = [
    "HASH_VERSION",
    "digest_bytes",
    "digests_of",
    "hash_blocks",
    "hash_buffer",
    "hash_keys",
    "hash_view",
]

#: Version of the digest, recorded with each store.
HASH_VERSION = 1


def hash_blocks(
    matrix: NDArray[np.generic], block_shape: tuple[int, int], *, seed: int = 0, threads: int = 0
) -> NDArray[np.uint64]:
    """Return the 128-bit digest of each block of a matrix.

    Parameters
    ----------
    matrix
        2-D array of any storable dtype. Row-major arrays are read in place.
    block_shape
        (rows, cols) of an inner block; edge blocks have their true size.
    seed
        Digests of different seeds are unrelated.
    threads
        0 chooses by size.

    Returns
    -------
    numpy.ndarray
        uint64 of shape (n_blocks, 2): low and high half, blocks row-major. Bit-stable across
        machines and kernels.

    Raises
    ------
    ArgumentError
        When it is no array, not 2-D or has masked elements, its dtype cannot be stored, the block
        shape is not positive, or seed or threads is out of range.
    """
    check_array(matrix, "matrix")
    if matrix.ndim != 2:
        raise ArgumentError(f"hash_blocks takes a 2-D array, got {matrix.ndim}-D")
    return hash_view(MatrixView.of(matrix, as_block_shape(block_shape)), seed=seed, threads=threads)


def hash_view(view: MatrixView, *, seed: int = 0, threads: int = 0) -> NDArray[np.uint64]:
    """Return the digests of a matrix view's blocks, as `hash_blocks` does."""
    return _core.hash_blocks(
        *view.for_core, as_count("seed", seed, most=2**64 - 1), as_count("threads", threads)
    )


def digest_bytes(digests: NDArray[np.uint64]) -> bytes:
    """Return digests of shape (n, 2) as they are stored: 16 bytes each, little-endian."""
    return np.ascontiguousarray(digests, "<u8").tobytes()


def digests_of(payload: bytes) -> NDArray[np.uint64]:
    """Return stored digests as an array of shape (n, 2): `digest_bytes` undone."""
    return np.frombuffer(payload, "<u8").reshape(-1, 2).astype(np.uint64, copy=False)


def hash_keys(digests: NDArray[np.uint64]) -> list[bytes]:
    """Return each digest of an array (n, 2) as its 16 bytes."""
    flat = digest_bytes(digests)
    return [flat[i : i + 16] for i in range(0, len(flat), 16)]


#: Return the 16-byte digest of contiguous bytes (``help(hash_buffer)``). The native function as it
#: is: a Python function around it would cost more than the hash of a small piece.
hash_buffer = _core.hash_buffer
