# SPDX-License-Identifier: Apache-2.0
"""The first singular values and vectors of a matrix of which there are products alone.

By a randomised decomposition (Halko, Martinsson and Tropp, *Finding structure with randomness*,
SIAM Review 2011, algorithms 4.4 and 5.1). It takes little more memory than its result.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Multiplied", "decomposed", "one_thread"]

# Rows that are made orthonormal at a time, as of more there is a copy.
_ROWS_OF_QR = 4096
# Of setting how many threads numpy uses, which is said for all of a process.
_threads = threading.Lock()


class Multiplied(Protocol):
    """A matrix (m, n) that is known by its products."""

    def times(self, right: NDArray[np.float64], /) -> NDArray[np.float64]:
        """Return its product with a matrix (n, k)."""

    def transposed_times(self, right: NDArray[np.float64], /) -> NDArray[np.float64]:
        """Return the product of its columns, as rows, with a matrix (m, k)."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Let numpy multiply matrices on this thread alone.

    So the result does not depend on the number of cores; and where others want these too, threads
    that wait for each other take ten times as long.
    """
    with _threads, _libraries().limit(limits=1, user_api="blas"):
        yield


@functools.cache
def _libraries() -> Any:
    """Return what sets the threads of the libraries that are loaded; to find these takes 1 ms."""
    import threadpoolctl  # type: ignore[import-untyped]  # not before it is wanted

    return threadpoolctl.ThreadpoolController()


def _restart_in_child() -> None:
    global _threads
    _threads = threading.Lock()  # whoever had it is not there


os.register_at_fork(after_in_child=_restart_in_child)


def decomposed(
    matrix: Multiplied, cols: int, width: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the first singular values, so many, between their left and right vectors.

    Parameters
    ----------
    cols
        Of the matrix.
    width
        How many, at most its rows and columns; the last of them are not exact.
    """
    basis = _orthonormal(matrix.times(_drawn(cols, width)))
    for _ in range(2):
        basis = _orthonormal(matrix.transposed_times(basis))
        basis = _orthonormal(matrix.times(basis))
    inner, values, right = np.linalg.svd(matrix.transposed_times(basis).T, full_matrices=False)
    return basis @ inner, values, right


def _orthonormal(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Make columns orthonormal, in place: the first factor of QR.

    By some rows at a time, as LAPACK has several copies of what it is given (TSQR: Demmel et al.,
    *Communication-optimal parallel and sequential QR and LU factorizations*, 2012, section 2).
    """
    strips = [columns[start : start + _ROWS_OF_QR] for start in range(0, len(columns), _ROWS_OF_QR)]
    inner = []
    for strip in strips:
        basis, rest = np.linalg.qr(strip)
        strip[:, : basis.shape[1]] = basis
        inner.append(rest)
    joint, at = np.linalg.qr(np.concatenate(inner))[0], 0
    for strip, rest in zip(strips, inner, strict=True):
        strip[:] = strip[:, : len(rest)] @ joint[at : at + len(rest)]
        at += len(rest)
    return columns


def _drawn(rows: int, cols: int) -> NDArray[np.float64]:
    """Return numbers from -1 to 1 as if drawn at random, the same ones each time (SplitMix64).

    Not by `numpy.random`: to load it takes 8 MB, and its numbers change between releases.
    """
    z = np.arange(1, rows * cols + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z >>= np.uint64(11)
    drawn = np.asarray(z * 2.0**-52, np.float64)
    drawn -= 1
    return drawn.reshape(rows, cols)
