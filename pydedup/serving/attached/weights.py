# SPDX-License-Identifier: Apache-2.0
"""One version of a model as an attached module uses it, and the choice of the version.

A tensor is streamed (`StoredTensor`) or, where no kernel can, loaded whole; what is loaded is
counted against the memory budget of the store and kept until the version is no longer used.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pydedup.blocks import BlockMap
from pydedup.catalog import Catalog, StoredModel, grid_of
from pydedup.errors import ArgumentError, BudgetError
from pydedup.formats.torch_tensors import to_torch
from pydedup.layout import PAGE_BYTES
from pydedup.matmul import compute_dtype
from pydedup.pool import PagePool, Reservation
from pydedup.serving.attached.activations import Activations, made, not_measured
from pydedup.serving.attached.fit import fit, holds
from pydedup.serving.attached.pieces import Pieces
from pydedup.serving.attached.slots import Slot, find_slots
from pydedup.serving.tensor import StoredTensor, called, stored_tensor
from pydedup.stack import Layer, Stack
from pydedup.text import largest
from pydedup.types import DType

__all__ = ["Attachment", "Rows", "Weights"]

#: First row and the row behind the last of a part of a matrix.
Rows = tuple[int, int]


class Weights:
    """The tensors of one version, for one attached module. Safe between threads."""

    def __init__(
        self,
        model: StoredModel,
        pool: PagePool,
        slots: Sequence[Slot],
        kept: Mapping[str, torch.Tensor],
        prefix: str,
        kind: str,
    ) -> None:
        self.model = model
        self._pool = pool
        self._kind = kind
        self._names = fit(model, pool, slots, kept, prefix, kind)
        model.block_maps()  # all at once, instead of one by one later
        self._stored = {
            number: stored_tensor(model, name, pool)
            for number, name in enumerate(self._names)
            if name
        }
        self._lock, self._process = threading.Lock(), os.getpid()
        #: Whole tensors, with what torch counts of changes in place, when they were new.
        self._loaded: dict[int, tuple[torch.Tensor, int, Reservation]] = {}
        self._biases: dict[int, NDArray[np.floating]] = {}
        self._parts: dict[tuple[int, int, int], StoredTensor] = {}
        self._products: dict[tuple[int, int | None, bool], _Product] = {}
        self._slots = slots

    def call(self) -> AbstractContextManager[None]:
        """Return a context in which what this thread reads is one prediction of the model."""
        return self._pool.call(called(self.model))

    def stored(self, number: int) -> StoredTensor:
        """Return the tensor of a slot, to stream."""
        return self._stored[number]

    def read(self, number: int) -> torch.Tensor:
        """Return the whole tensor of a slot, anew, in the module's dtype."""
        slot, stored = self._slots[number], self._stored.get(number)
        if stored is None:  # a counter; torch as well takes it for 0 where a checkpoint has none
            return torch.zeros(slot.shape, dtype=slot.dtype)
        return to_torch(stored.numpy()).to(slot.dtype)

    def part(self, number: int, rows: Rows) -> tuple[StoredTensor, int]:
        """Return the least rows in whole blocks that hold these of a slot, and how many precede.

        Rows are those of the matrix view: of a stack, those of its matrices, one below the other.
        """
        # By blocks: of a matrix that is cut at each length there is, few parts are kept.
        height = self._stored[number].block_shape[0]
        first, stop = rows[0] // height * height, -(-rows[1] // height) * height
        key = number, first, stop
        found = self._parts.get(key)
        if found is None:
            found = self._parts[key] = self._part(self._names[number], first, stop)
        return found, rows[0] - first

    def loaded(self, number: int) -> torch.Tensor:
        """Return the whole tensor of a slot in the module's dtype.

        Raises BudgetError, and ArgumentError when somebody changed it; then it is read anew.
        """
        found = self._loaded.get(number)
        if found is None:
            if self._process != os.getpid():  # a fork may have left it locked
                self._lock, self._process = threading.Lock(), os.getpid()
            with self._lock:  # two threads would need the room twice
                found = self._loaded.get(number)
                if found is None:
                    found = self._loaded[number] = self._load(number)
        whole, version, _ = found
        if whole._version != version:
            self._loaded.pop(number, None)
            self._biases.pop(number, None)
            raise ArgumentError(
                f"{self._names[number]!r} of {self.model.address} is in a store and was changed "
                "in place, maybe through a view of it; the change is dropped: detach the module "
                "first, or load the weights with store.load_torch"
            )
        return whole

    def lines(self, number: int, rows: Rows) -> torch.Tensor:
        """Return rows of the matrix view of a slot in the module's dtype, without loading others.

        Raises as `loaded` does where the whole is loaded.
        """
        if number in self._loaded:
            whole = self.loaded(number)
            return whole.view(-1, whole.shape[-1])[rows[0] : rows[1]]
        part, before = self.part(number, rows)
        # Outside of inference mode, where changes in place are not counted.
        with torch.inference_mode(False):
            read = made(to_torch(part.numpy()[before : before + rows[1] - rows[0]]))
            return read.to(self._slots[number].dtype)

    def bias(self, number: int) -> NDArray[np.floating]:
        """Return a vector as kernels take it: float32, or float64 where that is stored."""
        whole = self.loaded(number)
        found = self._biases.get(number)
        if found is None:
            dtype = compute_dtype(self._stored[number].dtype)
            if whole.dtype in (torch.float32, torch.float64) and whole.numpy().dtype == dtype:
                found = whole.numpy()
            else:  # not rounded to the module's dtype first
                found = self._stored[number].numpy().astype(dtype)
            self._biases[number] = found
        return found

    def matmul(
        self, number: int, x: NDArray[Any], bias: int | None, *, transpose: bool, as_bf16: bool
    ) -> NDArray[Any]:
        """Return the product of x and the matrix of a slot; ``bias`` is the slot of a vector.

        In one native call where all its pages are in the pool, else as `StoredTensor.matmul`, which
        says what there is to be raised.
        """
        offset = None if bias is None else self.bias(bias)
        key = number, bias, transpose
        product = self._products.get(key)
        if product is None or product.state != self.model.state or product.bias is not offset:
            product = self._products[key] = self._product(number, offset, transpose)
        y = None if product.stack is None else product.stack.run(self._pool, x, as_bf16=as_bf16)
        if y is None:
            dtype = DType.BF16 if as_bf16 else None
            y = self._stored[number].matmul(x, bias=offset, transpose=transpose, dtype=dtype)
        return y

    def again(
        self, number: int, x: NDArray[Any], bias: int | None, *, as_bf16: bool
    ) -> NDArray[Any] | None:
        """Return what `matmul` does, not transposed, of an x that is ready (`Stack.run_factor`).

        None where it was not called with these slots before, or has to look closer.
        """
        product = self._products.get((number, bias, False))
        if product is None or product.stack is None or product.state != self.model.state:
            return None
        if bias is not None:
            found = self._loaded.get(bias)
            if found is None or self._biases.get(bias) is not product.bias:
                return None
            whole, version, _ = found
            if whole._version != version:  # `matmul` says so
                return None
        if product.stack.dtype != (np.float32 if as_bf16 else x.dtype):
            return None
        return product.stack.run_factor(self._pool, x, as_bf16=as_bf16)

    # ---- inside -------------------------------------------------------------------------------

    def _product(self, number: int, bias: NDArray[np.floating] | None, transpose: bool) -> _Product:
        state = self.model.state
        block_map = self.model.block_map(self._names[number])
        stack = None
        if len(self._pool.planned(block_map.page_ids, block_map.bases)) == 1:
            with suppress(ArgumentError):  # a bias that does not fit
                stack = Stack([Layer(block_map, bias, None, transpose)], self._pool)
        return _Product(state, bias, stack)

    def _part(self, name: str, first: int, stop: int) -> StoredTensor:
        info = self.model.tensor(name)
        stop = min(stop, grid_of(info).rows)
        part = replace(info, shape=(stop - first, *info.shape[info.row_axes :]), row_axes=1)
        block_map = _PartOfMap(self.model, name, (first, stop))
        return StoredTensor(part, block_map, self._pool, self.model.refresh)

    def _load(self, number: int) -> tuple[torch.Tensor, int, Reservation]:
        slot = self._slots[number]
        try:
            reservation = self._pool.reserve(slot.nbytes)
            # Outside of inference mode: made in it, the tensor would be of no use elsewhere.
            with torch.inference_mode(False), not_measured():
                tensor = self.read(number)
        except BudgetError as exc:
            others = {self._names[n]: self._slots[n].nbytes for n in list(self._loaded)}
            beside = f", beside {largest(others)}" if others else ""
            raise BudgetError(
                f"{self._names[number]!r} of {self.model.address} cannot be streamed by "
                f"{self._kind} and is loaded whole, {slot.nbytes:,} bytes{beside}: {exc}"
            ) from exc
        return tensor, tensor._version, reservation


@dataclass(frozen=True, slots=True, eq=False)
class _Product:
    """What multiplies with a matrix, and a bias, in one state of its pages.

    ``stack`` is None where the pages are not those of one window.
    """

    state: int
    bias: NDArray[np.floating] | None
    stack: Stack | None


class _PartOfMap:
    """Rows of a block map, made once per map: pools remember how its arrays are walked over."""

    def __init__(self, model: StoredModel, name: str, rows: Rows) -> None:
        self._model = model
        self._name = name
        self._rows = rows
        self._last: tuple[BlockMap, BlockMap] | None = None

    def __call__(self) -> BlockMap:
        whole = self._model.block_map(self._name)
        last = self._last
        if last is None or last[0] is not whole:
            part = whole.covering(slice(*self._rows), slice(0, whole.grid.cols))
            last = self._last = whole, part
        return last[1]


class Attachment:
    """A module's tie to a store: which version it uses now, in this thread.

    Parameters
    ----------
    address
        Of the model.
    catalog, pool, epoch
        The store's; the epoch grows with every change of aliases and versions.
    prefix
        What the names in the store have before those of the module.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        address: str,
        catalog: Catalog,
        pool: PagePool,
        epoch: Callable[[], int],
        prefix: str,
    ) -> None:
        self.address = address
        self.catalog = catalog
        self.root = weakref.ref(module)
        self.inside = _Inside()
        self._kind = type(module).__name__
        self._prefix = prefix
        self._pool = pool
        self._epoch = epoch
        now = epoch()
        model = catalog.of_row(catalog.resolve(address))
        names = {info.name for info in model.tensors}
        #: What is replaced in the module, and what stays.
        self.slots, self._kept = find_slots(module, names, prefix, partial(holds, model, pool))
        self._current = now, self._weights(model)
        self._pieces = Pieces(module)
        layers = tuple((slot.names, slot.shape, slot.dtype) for slot in self.slots)
        self._layers = self._kind, hash(layers)
        self._activations = Activations.of(pool)
        #: Where calls of the module and its parts are counted.
        self._threads: set[int] = set()

    def counted(
        self, module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        """Return a context in which what torch allocates for a call counts against the budget."""
        is_whole = self.root() is module
        called = (*self._layers, None if is_whole else id(module))
        return self._activations.counted(
            self._pool, called, args, kwargs, self._threads, is_part=not is_whole
        )

    def rows_at_once(
        self, module: torch.nn.Module, args: tuple[Any, ...], weights: Weights
    ) -> int | None:
        """Return of how many rows the module's batch may be at a time; None to give it whole."""
        if self.root() is not module:
            return None
        tensor = weights.model.tensor
        # Half, so that two can predict at a time.
        nbytes = self._pool.activation_bytes // 2
        return self._pieces.rows(module, args, lambda name: tensor(self._prefix + name), nbytes)

    @property
    def memory_bytes(self) -> int:
        """The budget that is to be kept."""
        return self._pool.memory_bytes

    def has_room_for(self, nbytes: int, part: int) -> bool:
        """Whether weights that are loaded take no more than this part, and leave pages enough."""
        budget = self._pool.memory_bytes
        # A delta needs its page and that of its base at once.
        return nbytes <= min(budget // part, budget - 2 * PAGE_BYTES)

    def weights(self) -> Weights:
        """Return the version that the call under way in this thread uses, or the one of now."""
        return self.inside.weights or self.resolve()

    def resolve(self) -> Weights:
        """Return the version that the address means now."""
        # Also a fixed version may be removed, and another model added by its name.
        epoch, weights = self._current
        now = self._epoch()
        if now != epoch:
            row = self.catalog.resolve(self.address)
            if row.id != weights.model.row.id:
                weights = self._weights(self.catalog.of_row(row))
            self._current = now, weights
        return weights

    @contextmanager
    def one_version(self) -> Iterator[Weights]:
        """Use one version in this thread, as long as this lasts."""
        outer = self.inside.weights
        weights = outer or self.resolve()
        self.inside.weights = weights
        try:
            yield weights
        finally:
            self.inside.weights = outer

    def _weights(self, model: StoredModel) -> Weights:
        return Weights(model, self._pool, self.slots, self._kept, self._prefix, self._kind)


class _Inside(threading.local):
    """What calls that are under way in this thread use."""

    weights: Weights | None = None
    #: Whether it is a call of a module, and not only of `generate`, which makes many.
    is_call: bool = False
