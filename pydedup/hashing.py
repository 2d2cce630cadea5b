# SPDX-License-Identifier: Apache-2.0
"""128-bit block hashing (docs/format.md, "Block hash").

The digest is the same from every kernel and on every machine. It is not cryptographic: pydedup
compares bytes before it shares a block. Deliberately not here: what is done with equal digests.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pydedup import _core
from pydedup.blocks import MatrixView, as_block_shape, as_unsigned
from pydedup.errors import ArgumentError

__all__ = ["HASH_VERSION", "hash_blocks", "hash_buffer", "hash_view"]

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
        When it is no array or not 2-D, its dtype cannot be stored, the block shape is not positive,
        or seed or threads is out of range.
    """
    if not isinstance(matrix, np.ndarray):
        raise ArgumentError(f"hash_blocks takes a numpy array, not a {type(matrix).__name__}")
    if matrix.ndim != 2:
        raise ArgumentError(f"hash_blocks takes a 2-D array, got {matrix.ndim}-D")
    return hash_view(MatrixView.of(matrix, as_block_shape(block_shape)), seed=seed, threads=threads)


def hash_view(view: MatrixView, *, seed: int = 0, threads: int = 0) -> NDArray[np.uint64]:
    """Return the digests of a matrix view's blocks, as `hash_blocks` does."""
    grid = view.grid
    return _core.hash_blocks(
        view.data,
        view.dtype.code,
        grid.block_rows,
        grid.block_cols,
        as_unsigned("seed", seed, 64),
        as_unsigned("threads", threads, 31),
    )


#: Return the 16-byte digest of contiguous bytes (``help(hash_buffer)``). The native function as it
#: is: a Python function around it would cost more than the hash of a small piece.
hash_buffer = _core.hash_buffer
