# SPDX-License-Identifier: Apache-2.0
"""The tensor that stands in a module where a parameter or buffer was.

It has shape, dtype and device, and no elements. A torch function that is given one goes through
`StoredParameter.__torch_function__`: functions with a kernel of ours are in a table, filled by
:mod:`pydedup.serving.attached.functions`, ``rows`` and ``views``; all others are called with the
loaded tensor instead.
What reaches torch's dispatcher unseen by the first does so through ``__torch_dispatch__``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Self

import torch

from pydedup.errors import ArgumentError
from pydedup.serving.attached.slots import Slot
from pydedup.serving.attached.weights import Attachment, Rows
from pydedup.serving.tensor import StoredTensor

__all__ = ["StoredParameter", "handles", "refuse_tracing"]

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
    transposed, rows
        What view of the matrix it is: first rows, then transposed. Of three axes, these are rows
        of the first, and the other two transposed.
    """

    attachment: Attachment
    number: int
    transposed: bool
    rows: Rows | None
    _is_param: bool

    @staticmethod
    def __new__(
        cls,
        attachment: Attachment,
        number: int,
        *,
        rows: Rows | None = None,
        transposed: bool = False,
    ) -> Self:
        """Make the parameter of a slot, or a view of it."""
        slot = attachment.slots[number]
        shape = slot.shape if rows is None else (rows[1] - rows[0], *slot.shape[1:])
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
        made.transposed = transposed
        made.rows = rows
        made._is_param = slot.is_parameter and rows is None and not transposed
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

    def view_of(self, *, rows: Rows | None, transposed: bool) -> StoredParameter:
        """Return another view of the same slot."""
        return StoredParameter(self.attachment, self.number, rows=rows, transposed=transposed)

    def loaded(self) -> torch.Tensor:
        """Return the elements: the loaded tensor of the slot, or a view of it."""
        refuse_tracing(self.label)
        whole = self.attachment.weights().loaded(self.number)
        if self.rows is not None:
            whole = whole[self.rows[0] : self.rows[1]]
        return whole.mT if self.transposed else whole

    def stored(self) -> StoredTensor:
        """Return the tensor to stream: all rows, not transposed."""
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


def handles(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what to do when one of these functions is given a stored tensor."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        _HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def refuse_tracing(label: str) -> None:
    """Raise ArgumentError where torch makes a program of what is called."""
    proxies = torch._C._TorchDispatchModeKey.PROXY  # those of make_fx
    if (
        torch._C._get_tracing_state() is not None
        or torch.compiler.is_compiling()
        or torch._C._get_dispatch_mode(proxies) is not None
    ):
        raise ArgumentError(
            f"{label} cannot be traced, compiled or exported: streamed weights would become "
            "constants of the program; detach it first"
        )


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
    changed: list[Any] = [kwargs.get("out")]
    if _changes_first(name):  # torch.nn.init passes it by name
        first = next(iter((*args, *kwargs.values())), None)
        changed += first if isinstance(first, list | tuple) else [first]
    for value in changed:
        if type(value) is StoredParameter:
            value._refuse(f"changed (by {name})")
    result = func(*map(_loaded, args), **{key: _loaded(value) for key, value in kwargs.items()})
    for value in (*args, *kwargs.values()):  # `inplace=True`: it raises where that happened
        _loaded(value)
    return result


def _changes_first(name: str) -> bool:
    """Return whether a function of this name changes its first argument."""
    if name.startswith("__"):
        return name in ("__setitem__", "__set__", "__delitem__") or (
            name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
        )
    return name.endswith("_")


def _loaded(value: Any) -> Any:
    if type(value) is StoredParameter:
        return value.loaded()
    if type(value) in (list, tuple):
        return type(value)(map(_loaded, value))
    return value
