# SPDX-License-Identifier: Apache-2.0
"""One stored tensor to compute with where it lies.

Deliberately not here: graphs of layers (:mod:`pydedup.serving.engine`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, TypeAlias, TypeVar

from numpy.typing import ArrayLike, DTypeLike, NDArray

from pydedup import conv, joint, lookup, matmul
from pydedup.blocks import BlockMap, matrix_shape
from pydedup.catalog import StoredModel
from pydedup.conv import Padding, Pair
from pydedup.errors import ArgumentError, CorruptStoreError
from pydedup.joint import Factor
from pydedup.pool import Called, PagePool
from pydedup.types import DType, TensorInfo
from pydedup.words import Activation, BagMode, FloatDType

__all__ = [
    "StoredTensor",
    "TensorOf",
    "called",
    "matmul_together",
    "stored_tensor",
]

_T = TypeVar("_T")


def called(model: StoredModel) -> Called:
    """Return a model as a pool wants to know it."""
    return Called(model.row.id, model.state, model.page_ids)


class StoredTensor:
    """A tensor of a stored model. Its blocks stay on their pages; nothing is loaded up front.

    Safe between threads. A vacuum, or a repair of a damaged page, may move blocks to other pages
    meanwhile: a call that misses a page, or finds it damaged, reads the block map again, once, and
    starts over.

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
    call
        Returns a context in which what is read counts as one prediction of the model.
    """

    __slots__ = ("_block_map", "_call", "_info", "_pool", "_refresh")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ArgumentError(
            f"{self!r} cannot be pickled or copied: it reads from an open store; load it, or open "
            "the store in the other process"
        )

    def __init__(
        self,
        info: TensorInfo,
        block_map: Callable[[], BlockMap],
        pool: PagePool,
        refresh: Callable[[], None],
        call: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._call = call
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

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns of a block of its matrix view: of the first axis by all others.

        Of a stack of matrices that is all axes but the last by that one.
        """
        return self._info.block_shape

    @property
    def row_axes(self) -> int:
        """How many axes are rows of its matrix view: the first, or all but the last of a stack."""
        return self._info.row_axes

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack of matrices, each of which has blocks of its own."""
        return self.row_axes > 1

    def matmul(
        self,
        x: ArrayLike,
        *,
        bias: ArrayLike | None = None,
        activation: Activation | None = None,
        transpose: bool = False,
        dtype: FloatDType | None = None,
    ) -> NDArray[Any]:
        """Return ``activation(x @ W.T + bias)``, the order of torch's Linear.

        Parameters
        ----------
        x
            Shape (..., in) for a weight of shape (out, in). Converted to float32, or to float64
            for weights of float64 and of 32- or 64-bit integers. bfloat16 stays as it is.
        bias
            Shape (out,).
        activation
            ``"relu"``, ``"gelu"`` (exact), ``"gelu_tanh"``, ``"silu"``, ``"sigmoid"``, ``"tanh"``.
        transpose
            Return ``x @ W + bias`` instead: x is (..., out), the result (..., in).
        dtype
            Of the result: ``"bf16"`` for one in float32 that is rounded, which is as large as half
            of it and made so at once.

        Returns
        -------
        numpy.ndarray
            float32 or float64 as above, or bfloat16. A tensor of more axes takes part as (first
            axis, product of the others), one of fewer as a single row.

        Raises
        ------
        ArgumentError
            When shapes do not fit, for an unknown activation or dtype, or of a stack of matrices: 3
            axes or more of which the last two are 128 or longer.
        """
        self._refuse_stack("matmul")
        wanted = None if dtype is None else DType.of_floats(dtype)
        return self._with_map(
            lambda block_map: matmul.matmul(
                block_map,
                self._pool,
                x,
                bias=bias,
                activation=activation,
                transpose=transpose,
                dtype=wanted,
            )
        )

    def conv2d(
        self,
        x: ArrayLike,
        *,
        bias: ArrayLike | None = None,
        stride: Pair = 1,
        padding: Padding = 0,
        dilation: Pair = 1,
        groups: int = 1,
        activation: Activation | None = None,
        dtype: FloatDType | None = None,
    ) -> NDArray[Any]:
        """Return ``activation(conv(x, W) + bias)`` of images, as torch's Conv2d computes it.

        Parameters
        ----------
        x
            Shape (batch, in, height, width), or (in, height, width), for a weight of shape
            (out, in / groups, kernel_h, kernel_w). A weight of shape (out, in / groups, kernel),
            that of a 1-D convolution, is one of height 1, and so is then x.
        bias
            Shape (out,).
        stride, dilation
            One number, or (vertical, horizontal).
        padding
            Zeros around the image: one number, (vertical, horizontal), (top, left, bottom, right),
            ``"valid"``, or ``"same"`` at stride 1.
        groups
            Parts into which input and output channels are cut.
        activation, dtype
            As for `matmul`.

        Returns
        -------
        numpy.ndarray
            Shape (batch, out, out_height, out_width), or without batch as x; float32,
            float64 or bfloat16 as for `matmul`.

        Raises
        ------
        ArgumentError
            When the tensor is no such weight, but a stack of matrices, or shapes or sizes do not
            fit; see `pydedup.conv.conv2d`.
        """
        self._refuse_stack("conv2d")
        if len(self.shape) not in (3, 4):
            raise ArgumentError(
                f"conv2d needs a weight of shape (out, in / groups, kernel_h, kernel_w); "
                f"{self.name!r} has shape {self.shape}; "
                + (
                    "3-D convolutions are not supported"
                    if len(self.shape) == 5
                    else "3 axes are a 1-D convolution, others are none"
                )
            )
        kernel = self.shape[2:] if len(self.shape) == 4 else (1, self.shape[2])
        wanted = None if dtype is None else DType.of_floats(dtype)
        return self._with_map(
            lambda block_map: conv.conv2d(
                block_map,
                self._pool,
                x,
                kernel=kernel,
                bias=bias,
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=groups,
                activation=activation,
                dtype=wanted,
            )
        )

    def take(self, ids: ArrayLike) -> NDArray[Any]:
        """Return the entries of the first axis with these numbers, reading only their pages.

        The result has shape ``ids.shape + shape[1:]`` and the stored dtype. Raises ArgumentError
        when ids are no integers or out of range, or the tensor has fewer than 2 axes.
        """
        self._check_rows("take")
        each = math.prod(self.shape[1 : self._info.row_axes])
        rows = self._with_map(lambda block_map: lookup.take(block_map, self._pool, ids, each=each))
        return rows.reshape(*rows.shape[:-1], *self.shape[1:])

    def bag(
        self,
        ids: ArrayLike,
        offsets: ArrayLike | None = None,
        mode: BagMode = "mean",
        *,
        weights: ArrayLike | None = None,
    ) -> NDArray[Any]:
        """Return the sum, mean or maximum of the rows of each bag; see `pydedup.lookup.bag`.

        ``ids`` is 2-D with a bag per row, or 1-D with ``offsets`` that say where bags begin.
        ``weights``, in the shape of ids, are factors of the rows of a sum. The result has shape
        ``(n_bags,) + shape[1:]``, float32 or float64. Raises ArgumentError, also of a stack of
        matrices.
        """
        self._check_rows("bag")
        self._refuse_stack("bag")
        bags = self._with_map(
            lambda block_map: lookup.bag(block_map, self._pool, ids, offsets, mode, weights=weights)
        )
        return bags.reshape(len(bags), *self.shape[1:])

    def numpy(self, *, is_mapped: bool = False) -> NDArray[Any]:
        """Return the whole tensor as an array, bit for bit (bf16 and f8 as ml_dtypes).

        Where it ``is_mapped``, its memory goes back to the system as soon as it is free, which
        takes some microseconds for each MB more.
        """
        array = self._with_map(
            lambda block_map: matmul.read(block_map, self._pool, is_mapped=is_mapped)
        )
        return array.reshape(self.shape)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """Return `numpy`, for numpy's functions: to them it was one object of no known kind.

        Raises ArgumentError where there must be no copy: it is read from its pages each time.
        """
        if copy is False:
            raise ArgumentError(f"{self!r} is read anew by each call; that is always a copy")
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def columns(self, first: int, stop: int) -> NDArray[Any]:
        """Return columns of the matrix view, reading only their blocks, bit for bit.

        Raises ArgumentError unless 0 <= first <= stop <= how many there are.
        """
        cols = matrix_shape(self.shape, self.row_axes)[1]
        if not 0 <= first <= stop <= cols:
            raise ArgumentError(f"{self.name!r} has {cols} columns; {first} to {stop} are none")

        def read(block_map: BlockMap) -> NDArray[Any]:
            grid = block_map.grid
            part = block_map.covering(slice(0, grid.rows), slice(first, stop))
            skipped = first % grid.block_cols
            return matmul.read(part, self._pool)[:, skipped : skipped + stop - first]

        return self._with_map(read)

    def _check_rows(self, what: str) -> None:
        if len(self.shape) < 2:
            raise ArgumentError(
                f"{what} needs a tensor of 2 axes or more; {self.name!r} has shape {self.shape}"
            )

    def _refuse_stack(self, what: str) -> None:
        if self.is_stack:
            raise ArgumentError(
                f"{what} takes no stack of matrices, as {self.name!r} of shape {self.shape} seems "
                "to be; use take() or numpy()"
            )

    def _with_map(self, use: Callable[[BlockMap], _T]) -> _T:
        with self._call():
            try:
                return self._pool.with_room(lambda: use(self._block_map()))
            except CorruptStoreError:  # of which PageNotFoundError is one
                pass  # not retried here: the exception would keep pages pinned meanwhile
            self._refresh()
            return self._pool.with_room(lambda: use(self._block_map()))


def stored_tensor(
    model: StoredModel,
    name: str,
    pool: PagePool,
    call: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> StoredTensor:
    """Return a tensor of a model; ``call`` as `StoredTensor` takes it."""
    info = model.tensor(name)
    return StoredTensor(info, lambda: model.block_map(name), pool, model.refresh, call)


#: Returns a tensor of a model by name.
TensorOf: TypeAlias = Callable[[StoredModel, str], StoredTensor]


def matmul_together(
    tensors: Sequence[StoredTensor],
    xs: Sequence[NDArray[Any]],
    biases: Sequence[NDArray[Any] | None],
    *,
    activation: Activation | None = None,
    transpose: bool = False,
) -> list[NDArray[Any]]:
    """Return what `StoredTensor.matmul` returns for each tensor, with blocks in common used once.

    The tensors are of one store. Raises what `StoredTensor.matmul` does.
    """
    if len(tensors) == 1:
        y = tensors[0].matmul(xs[0], bias=biases[0], activation=activation, transpose=transpose)
        return [y]

    pool = tensors[0]._pool

    def use() -> list[NDArray[Any]]:
        factors = []
        for tensor, x, bias in zip(tensors, xs, biases, strict=True):
            block_map = tensor._block_map()
            given, offset = matmul.checked_factors(block_map, x, bias, transpose)
            factors.append(Factor(block_map, given.reshape(-1, given.shape[-1]), offset))
        return joint.matmul_together(factors, pool, activation=activation, transpose=transpose)

    try:
        results = pool.with_room(use)
    except CorruptStoreError:  # see StoredTensor
        results = []
    if not results:
        for tensor in tensors:
            tensor._refresh()
        results = pool.with_room(use)
    return [
        result.reshape(*x.shape[:-1], result.shape[-1])
        for x, result in zip(xs, results, strict=True)
    ]
