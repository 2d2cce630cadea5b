# SPDX-License-Identifier: Apache-2.0
"""The tensor that stands in a module where a parameter or buffer was.

It has shape, dtype and device, and no elements. A torch function that is given one goes through
`StoredParameter.__torch_function__`: functions with a kernel of ours are in a table, filled by
:mod:`pydedup.serving.attached.functions`, ``rows`` and ``views``; all others are called with the
loaded tensor instead.
What reaches torch's dispatcher unseen by the first does so through ``__torch_dispatch__``.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Self

import torch

from pydedup.errors import ArgumentError, BudgetError
from pydedup.serving.attached.slots import Slot
from pydedup.serving.attached.weights import Attachment, Rows
from pydedup.serving.tensor import StoredTensor

__all__ = ["StoredParameter", "are_loaded", "handles", "may_be_traced", "refuse_tracing"]

#: Function of torch -> what to do instead; ``NotImplemented`` means that it is no case for it.
_HANDLERS: dict[Any, Callable[..., Any]] = {}

_CPU = torch.device("cpu")
#: Methods that speak of shape and kind alone.
_OF_SHAPE = frozenset(
    {
        *("__len__", "dim", "ndimension", "size", "stride", "numel", "nelement", "element_size"),
        *("storage_offset", "get_device", "has_names", "dense_dim", "sparse_dim", "is_same_size"),
        *("is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_conj", "is_neg"),
        *("is_shared", "is_pinned", "is_inference", "is_coalesced", "_is_view"),
    }
)


class StoredParameter(torch.Tensor):
    """A parameter, or a view of one, whose elements are in a store.

    Attributes
    ----------
    attachment, number
        Which slot of which attached module it is.
    entries, rows, transposed
        What view of the tensor it is: first the entry of each of its first axes (only of a stack of
        matrices), then rows of the axis behind these, then the last two axes transposed.
    is_whole
        Whether it is none of these, but the tensor as it is.
    """

    attachment: Attachment
    number: int
    entries: tuple[int, ...]
    rows: Rows | None
    transposed: bool
    is_whole: bool
    _is_param: bool

    @staticmethod
    def __new__(
        cls,
        attachment: Attachment,
        number: int,
        *,
        entries: tuple[int, ...] = (),
        rows: Rows | None = None,
        transposed: bool = False,
    ) -> Self:
        """Make the parameter of a slot, or a view of it."""
        slot = attachment.slots[number]
        shape = _shape(slot, entries, rows)
        strides = None
        if transposed:
            *outer, height, width = shape
            shape = (*outer, width, height)
            strides = (*(height * width for _ in outer), 1, width)
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            shape,
            strides=strides,
            dtype=slot.dtype,
            device=_CPU,
        )
        # Else who reads its memory unasked, as torch.utils.dlpack.to_dlpack, ends the process.
        torch._C._set_throw_on_mutable_data_ptr(made)
        made.attachment = attachment
        made.number = number
        made.entries = entries
        made.rows = rows
        made.transposed = transposed
        made.is_whole = not entries and rows is None and not transposed
        made._is_param = slot.is_parameter and made.is_whole
        return made

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    # Tensor's own need elements, or would copy what is in a store.

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"<StoredParameter {self.label} {tuple(self.shape)} {self.dtype}>"

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._refuse("copied")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._refuse("pickled")

    @property
    def slot(self) -> Slot:
        """What it stands for."""
        return self.attachment.slots[self.number]

    @property
    def label(self) -> str:
        """Its name, and of what model, for messages."""
        return f"{self.slot.names[0]!r} of {self.attachment.address}"

    def with_rows(self, rows: Rows) -> StoredParameter:
        """Return the view that has these rows of the whole first axis; it is not transposed."""
        return StoredParameter(self.attachment, self.number, entries=self.entries, rows=rows)

    def with_transposed(self) -> StoredParameter:
        """Return the view with the last two axes the other way round."""
        return StoredParameter(
            self.attachment,
            self.number,
            entries=self.entries,
            rows=self.rows,
            transposed=not self.transposed,
        )

    def entry(self, index: int) -> StoredParameter:
        """Return the view that is an entry, which exists, of the first axis of this one."""
        first = 0 if self.rows is None else self.rows[0]
        entries = *self.entries, first + index
        # Of a matrix, a row is left, which has nothing to be transposed.
        transposed = self.transposed and len(self.slot.shape) - len(entries) > 1
        return StoredParameter(self.attachment, self.number, entries=entries, transposed=transposed)

    def lines(self) -> Rows:
        """Return which rows of the matrix view of the slot it has."""
        axes = self.slot.shape[: self.stored().row_axes]
        first, count = 0, math.prod(axes)
        for size, entry in zip(axes, self.entries, strict=False):
            count //= size
            first += entry * count
        if self.rows is None:
            return first, first + count
        each = math.prod(axes[len(self.entries) + 1 :])
        return first + self.rows[0] * each, first + self.rows[1] * each

    def loaded(self) -> torch.Tensor:
        """Return the elements: the loaded tensor of the slot, or a view of it.

        Of an entry of a stack they are a copy, read for this where the stack is not loaded.
        """
        if may_be_traced():
            refuse_tracing(self.label)
        weights = self.attachment.weights()
        if self.entries:
            whole = weights.lines(self.number, self.lines())
            whole = whole.view(_shape(self.slot, self.entries, self.rows))
        else:
            whole = weights.loaded(self.number)
            if self.rows is not None:
                whole = whole[self.rows[0] : self.rows[1]]
        return whole.mT if self.transposed else whole

    def stored(self) -> StoredTensor:
        """Return the tensor to stream: all rows, not transposed."""
        if may_be_traced():
            refuse_tracing(self.label)
        return self.attachment.weights().stored(self.number)

    def _refuse(self, what: str) -> NoReturn:
        raise ArgumentError(
            f"{self.label} is in a store and cannot be {what}; detach the module first, or load "
            "the weights with store.load_torch"
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch with stored tensors among its arguments."""
        if "torch._dynamo" in sys.modules:  # somebody compiles: what is ours is not to be traced
            return _untraced()(func, args, kwargs or {})
        return _overridden(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own is a placeholder
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call an operator that torch reached without asking `__torch_function__`."""
        return _with_loaded(func, func._schema.name, args, kwargs or {})


def _shape(slot: Slot, entries: tuple[int, ...], rows: Rows | None) -> tuple[int, ...]:
    """Return the shape of a view that is not transposed."""
    shape = slot.shape[len(entries) :]
    return shape if rows is None else (rows[1] - rows[0], *shape[1:])


def are_loaded(weights: Sequence[StoredParameter], nbytes: int, part: int) -> bool:
    """Load weights of one module, if there are any, and return whether all are.

    They are where the ``nbytes`` of these, and of others that come with them, are no more than that
    part of the budget (4: a quarter), and others have not loaded too much.
    """
    if weights and not weights[0].attachment.has_room_for(nbytes, part):
        return False
    try:
        for weight in weights:
            weight.loaded()
    except BudgetError:
        return False
    return True


def handles(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what to do when one of these functions is given a stored tensor."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        _HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def may_be_traced() -> bool:
    """Return whether `refuse_tracing` has to look closer: whether anybody sees what torch does."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch.compiler.is_compiling()
    )


def refuse_tracing(label: str) -> None:
    """Raise ArgumentError where torch makes a program of what is called, or has no elements."""
    if (
        torch._C._get_tracing_state() is not None
        or torch.compiler.is_compiling()
        or _is_mode("PROXY")  # of make_fx
    ):
        raise ArgumentError(
            f"{label} cannot be traced, compiled or exported: streamed weights would become "
            "constants of the program; detach it first"
        )
    if _is_mode("FAKE") or _is_mode("FUNCTIONAL"):
        raise ArgumentError(
            f"{label} cannot be run with fake tensors: streamed weights have elements; leave "
            "FakeTensorMode for the call, or take a module on the meta device that is not attached"
        )


def _is_mode(name: str) -> bool:
    """Return whether operators of torch go to one of its own tracers."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    return torch._C._get_dispatch_mode(getattr(torch._C._TorchDispatchModeKey, name)) is not None


def _overridden(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Do what `StoredParameter.__torch_function__` does."""
    handler = _HANDLERS.get(func)
    if handler is not None:
        try:
            result = handler(*args, **kwargs) if kwargs else handler(*args)
        except TypeError:
            if _takes(handler, args, kwargs):
                raise
            result = NotImplemented  # `out=`, or a name that another form of it has
        if result is not NotImplemented:
            return result
    name = func.__name__
    if name == "__get__" or name in _OF_SHAPE:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    return _with_loaded(func, name, args, kwargs)


_disabled: Callable[..., Any] | None = None


def _untraced() -> Callable[..., Any]:
    global _disabled
    if _disabled is None:  # functools.cache would be warned of
        _disabled = torch.compiler.disable(_overridden)  # type: ignore[no-untyped-call]
    return _disabled


def _takes(handler: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(handler).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _with_loaded(func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a function with the loaded tensors in the place of stored ones."""
    if _changes_first(name) or "out" in kwargs:
        _refuse_changes(name, args, kwargs)
    given: list[tuple[StoredParameter, torch.Tensor, int]] = []
    result = func(
        *[_loaded(value, given) for value in args],
        **{key: _loaded(value, given) for key, value in kwargs.items()},
    )
    for stored, tensor, version in given:
        if tensor._version != version:  # `inplace=True`
            stored.loaded()  # what is kept is dropped, and this raises
            stored._refuse(f"changed (by {name})")
    return result


def _refuse_changes(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise ArgumentError where what a function changes is a stored tensor."""
    changed: list[Any] = [kwargs.get("out")]
    if _changes_first(name):  # torch.nn.init passes it by name
        first = next(iter((*args, *kwargs.values())), None)
        changed += first if isinstance(first, list | tuple) else [first]
    for value in changed:
        if type(value) is StoredParameter:
            value._refuse(f"changed (by {name})")


@functools.cache
def _changes_first(name: str) -> bool:
    """Return whether a function of this name changes its first argument."""
    if name.startswith("__"):
        return name in ("__setitem__", "__set__", "__delitem__") or (
            name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
        )
    return name.endswith("_")


def _loaded(value: Any, given: list[tuple[StoredParameter, torch.Tensor, int]]) -> Any:
    """Return an argument with what is loaded in it, which is noted with its count of changes."""
    if type(value) is StoredParameter:
        tensor = value.loaded()
        given.append((value, tensor, tensor._version))
        return tensor
    if type(value) in (list, tuple):
        return type(value)(_loaded(each, given) for each in value)
    return value
