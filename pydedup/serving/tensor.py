# SPDX-License-Identifier: Apache-2.0
"""One stored tensor to compute with where it lies.

Deliberately not here: graphs of layers (:mod:`pydedup.serving.engine`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numpy.typing import ArrayLike, NDArray

from pydedup import matmul
from pydedup.blocks import BlockMap
from pydedup.errors import ArgumentError, PageNotFoundError
from pydedup.pool import PagePool
from pydedup.types import DType, Progress, TensorInfo

__all__ = ["StoredTensor", "TensorsOnDemand"]

_T = TypeVar("_T")


class StoredTensor:
    """A tensor of a stored model. Its blocks stay on their pages; nothing is loaded up front.

    Safe between threads. A vacuum may move blocks to other pages meanwhile: a call that misses a
    page reads the block map again, once, and starts over.

    Parameters
    ----------
    info
        Name, dtype and shape.
    block_map
        Returns the current block map.
    pool
        Where pages come from.
    refresh
        Makes ``block_map`` read anew.
    """

    __slots__ = ("_block_map", "_info", "_pool", "_refresh")

    def __init__(
        self,
        info: TensorInfo,
        block_map: Callable[[], BlockMap],
        pool: PagePool,
        refresh: Callable[[], None],
    ) -> None:
        self._info = info
        self._block_map = block_map
        self._pool = pool
        self._refresh = refresh

    def __repr__(self) -> str:
        return f"<StoredTensor {self.name!r} {self.dtype.label} {self.shape}>"

    @property
    def name(self) -> str:
        """Name in its model."""
        return self._info.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""
        return self._info.shape

    @property
    def dtype(self) -> DType:
        """Element type as stored."""
        return self._info.dtype

    def matmul(
        self,
        x: ArrayLike,
        *,
        bias: ArrayLike | None = None,
        activation: str | None = None,
        transpose: bool = False,
    ) -> NDArray[Any]:
        """Return ``activation(x @ W.T + bias)``, the order of torch's Linear.

        Parameters
        ----------
        x
            Shape (..., in) for a weight of shape (out, in). Converted to float32, or to float64
            for weights of float64 and of 32- or 64-bit integers.
        bias
            Shape (out,).
        activation
            ``"relu"``, ``"gelu"`` (exact), ``"gelu_tanh"``, ``"silu"``, ``"sigmoid"``, ``"tanh"``.
        transpose
            Return ``x @ W + bias`` instead: x is (..., out), the result (..., in).

        Returns
        -------
        numpy.ndarray
            float32 or float64 as above. A tensor of more axes takes part as (first axis, product
            of the others), one of fewer as a single row.

        Raises
        ------
        ArgumentError
            When shapes do not fit, or for an unknown activation.
        """
        return self._with_map(
            lambda block_map: matmul.matmul(
                block_map, self._pool, x, bias=bias, activation=activation, transpose=transpose
            )
        )

    def take(self, ids: ArrayLike) -> NDArray[Any]:
        """Return the entries of the first axis with these numbers, reading only their pages.

        The result has shape ``ids.shape + shape[1:]`` and the stored dtype. Raises ArgumentError
        when ids are no integers or out of range, or the tensor has fewer than 2 axes.
        """
        self._check_rows("take")
        rows = self._with_map(lambda block_map: matmul.take(block_map, self._pool, ids))
        return rows.reshape(*rows.shape[:-1], *self.shape[1:])

    def bag(
        self, ids: ArrayLike, offsets: ArrayLike | None = None, mode: str = "mean"
    ) -> NDArray[Any]:
        """Return the sum, mean or maximum of the rows of each bag; see `pydedup.matmul.bag`.

        ``ids`` is 2-D with a bag per row, or 1-D with ``offsets`` that say where bags begin. The
        result has shape ``(n_bags,) + shape[1:]``, float32 or float64. Raises ArgumentError.
        """
        self._check_rows("bag")
        bags = self._with_map(
            lambda block_map: matmul.bag(block_map, self._pool, ids, offsets, mode)
        )
        return bags.reshape(len(bags), *self.shape[1:])

    def numpy(self) -> NDArray[Any]:
        """Return the whole tensor as an array, bit for bit (bf16 and f8 as ml_dtypes)."""
        array = self._with_map(lambda block_map: matmul.read(block_map, self._pool))
        return array.reshape(self.shape)

    def _check_rows(self, what: str) -> None:
        if len(self.shape) < 2:
            raise ArgumentError(
                f"{what} needs a tensor of 2 axes or more; {self.name!r} has shape {self.shape}"
            )

    def _with_map(self, use: Callable[[BlockMap], _T]) -> _T:
        try:
            return use(self._block_map())
        except PageNotFoundError:
            pass  # not retried here: the exception would keep pages pinned meanwhile
        self._refresh()
        return use(self._block_map())


class TensorsOnDemand:
    """A model's tensors by name, each loaded when a writer asks for it, with progress in bytes."""

    def __init__(
        self,
        read: Callable[[str], NDArray[Any]],
        total_bytes: int,
        progress: Progress | None,
    ) -> None:
        self._read = read
        self._total = total_bytes
        self._done = 0
        self._progress = progress

    def __getitem__(self, name: str) -> NDArray[Any]:
        array = self._read(name)
        self._done += array.nbytes
        if self._progress is not None:
            self._progress("reading", self._done, self._total)
        return array
