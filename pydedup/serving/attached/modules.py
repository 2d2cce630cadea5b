# SPDX-License-Identifier: Apache-2.0
"""What the modules of an attached tree do otherwise: one version per call, and clear refusals.

While it is attached, a module's class is a subclass of its own that carries the same name. So no
reference to the store or back to the module hides in hooks, and all that inspects modules by
``isinstance`` or by the signature of ``forward`` sees what it saw before.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any, NoReturn, Self

import torch
from torch import nn
from torch.nn.utils import parametrize

from pydedup.errors import ArgumentError
from pydedup.serving.attached.parameter import refuse_tracing
from pydedup.serving.attached.pieces import in_pieces
from pydedup.serving.attached.slots import name_in_tree, named_modules, tensors
from pydedup.serving.attached.weights import Attachment

__all__ = ["attachment_of", "enclose", "release"]

#: Where a module keeps its attachment.
_KEY = "_pydedup_attachment"


class _Any:
    """What the classes of all modules of an attached tree have that have weights or children."""

    __slots__ = ()


class _Attached(nn.Module, _Any):
    """First base of these classes, or what it has (`_first_base`)."""

    #: The first base of this very class, where ``super`` begins.
    _pydedup_first: Any

    # Slices of nn.Sequential are new objects of its class, and have no attachment.

    def __init_subclass__(cls, **options: Any) -> None:
        # Of a class that stands in for another one, the other's own shall know nothing: it may
        # register subclasses by their names, or wrap what they have.
        if not _stands_in(cls):
            super(cls._pydedup_first, cls).__init_subclass__(**options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _Any not in type(self).__mro__:  # detached, and compiled by torch before that
            return self(*args, **kwargs)
        attachment: Attachment | None = self.__dict__.get(_KEY)
        if attachment is None:
            return super(self._pydedup_first, self).__call__(*args, **kwargs)
        if self.training:
            raise ArgumentError(
                f"{self._label()} is in training mode; attached modules only predict: call eval()"
            )
        inside = attachment.inside
        if inside.is_call:
            return super(self._pydedup_first, self).__call__(*args, **kwargs)
        _check_surroundings(self._label())
        if "torch._dynamo" in sys.modules:  # somebody compiles: what is ours is not to be traced
            return _untraced()(self, attachment, *args, **kwargs)
        return self._outermost(attachment, *args, **kwargs)

    def _outermost(self, attachment: Attachment, *args: Any, **kwargs: Any) -> Any:
        """Call it with one version of the weights, which all within it use."""
        inside = attachment.inside
        outer = inside.weights
        weights = outer or attachment.resolve()
        inside.weights, inside.is_call = weights, True
        try:
            with weights.call():
                call = super(self._pydedup_first, self).__call__
                n_rows = None if kwargs else attachment.rows_at_once(self, args, weights)
                if n_rows is not None:
                    return in_pieces(
                        functools.partial(self._counted, attachment, call), args[0], n_rows
                    )
                return self._counted(attachment, call, *args, **kwargs)
        finally:
            inside.weights, inside.is_call = outer, False

    def _counted(
        self, attachment: Attachment, call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        with attachment.counted(self, args, kwargs):
            return call(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("has no state_dict() of its own")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("takes no state dict")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("takes no state dict")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._refuse("cannot be copied")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._refuse("cannot be pickled or copied")

    def __prepare_scriptable__(self) -> NoReturn:
        self._refuse("cannot be compiled by TorchScript")

    def compile(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("cannot be compiled")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Apply what ``to``, ``half``, ``cuda`` and the like do, where that changes nothing."""
        dtypes = {tensor.dtype for *_, tensor in tensors(self, recurse=recurse)}
        # That of its results first: counters are integers, and of no interest.
        for dtype in sorted(dtypes, key=lambda dtype: not dtype.is_floating_point):
            before = torch.zeros(1, dtype=dtype)
            after = fn(before)
            if after.device != before.device or after.dtype != dtype:
                self._refuse(
                    f"cannot become {after.dtype} on {after.device}: its weights are streamed on "
                    f"the CPU and it returns {dtype}"
                )
        return self

    def _label(self) -> str:
        attachment: Attachment | None = self.__dict__.get(_KEY)
        where = "a store" if attachment is None else attachment.address
        return f"{type(self).__name__}, attached to {where},"

    def _refuse(self, what: str) -> NoReturn:
        raise ArgumentError(
            f"{self._label()} {what}; store.detach(module) makes it a plain module again, and "
            "store.load_torch(name) gives the weights"
        )


@functools.cache
def _untraced() -> Callable[..., Any]:
    disabled: Callable[..., Any]
    disabled = torch.compiler.disable(_Attached._outermost)  # type: ignore[no-untyped-call]
    return disabled


def attachment_of(module: object) -> Attachment | None:
    """Return the attachment of an attached module, also of one inside of an attached tree."""
    found = module.__dict__.get(_KEY) if isinstance(module, _Any) else None
    return found if isinstance(found, Attachment) else None


def enclose(module: nn.Module, attachment: Attachment) -> None:
    """Make a tree of modules attached ones: those that have weights or parts.

    Raises ArgumentError, and leaves them as they were, for a class that allows no other in its
    place.
    """
    owners = {path for slot in attachment.slots for path, _ in slot.places}
    try:
        for path, inner in list(named_modules(module)):
            if path in owners or inner._modules or inner is module:
                inner.__class__ = _attached_class(type(inner))
                inner.__dict__[_KEY] = attachment
    except Exception as exc:  # of a layout of its own, or whatever its metaclass raises
        release(module)
        raise ArgumentError(f"a {type(inner).__name__} cannot be attached: {exc}") from exc


def release(module: nn.Module) -> None:
    """Give all modules of a tree their classes back.

    Raises ArgumentError, and leaves them as they are, for a class that was made of an attached one,
    or got a property, as one that was parametrized before does.
    """
    attached = [(path, m) for path, m in named_modules(module) if isinstance(m, _Any)]
    for path, inner in attached:
        changed = any(isinstance(one, property) for one in vars(type(inner)).values())
        if changed or not _stands_in(type(inner)):
            raise ArgumentError(
                f"{name_in_tree(path)} has become a {type(inner).__name__} since it was attached; "
                "undo that first, as with torch.nn.utils.parametrize.remove_parametrizations"
            )
    for _, inner in attached:
        inner.__dict__.pop(_KEY, None)
        inner.__class__ = type(inner).__bases__[1]


_classes: weakref.WeakValueDictionary[type, type[nn.Module]] = weakref.WeakValueDictionary()


def _attached_class(base: type[nn.Module]) -> type[nn.Module]:
    made: type[nn.Module] | None = _classes.get(base)
    if made is None:
        names: dict[str, Any] = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        }
        # That of transformers calls the model many times, and parts of it on their own.
        if callable(getattr(base, "generate", None)):
            names["generate"] = _in_one_version(base)
        metaclass: Any = type(base)
        if _is_parametrized(base):
            metaclass = _keeping(metaclass)
        first = _first_base(_root_of(base).__base__ or object)
        made = metaclass(base.__name__, (first, base), names)
        assert made is not None
        _classes[base] = made
    return made


def _is_parametrized(base: type) -> bool:
    """Return whether a class is one of those that torch makes for each parametrized module.

    It reads and deletes the properties that it gave them of whichever class the module has.
    """
    return base.__module__ == parametrize.__name__ and base.__name__.startswith("Parametrized")


@functools.cache
def _keeping(metaclass: Any) -> Any:
    """Return a metaclass by which a class refuses to lose what only the one behind it has."""

    def refuse(cls: type, name: str) -> None:
        if name not in vars(cls) and hasattr(cls, name):
            raise ArgumentError(
                f"{name!r} of a {cls.__name__} stays parametrized while it is attached to a store; "
                "detach the module first, store.detach(module)"
            )
        metaclass.__delattr__(cls, name)

    return type(metaclass)(metaclass.__name__, (metaclass,), {"__delattr__": refuse})


def _stands_in(cls: type) -> bool:
    """Return whether a class is one that stands in for another one."""
    return "_pydedup_first" in vars(cls.__bases__[0])


def _root_of(base: type) -> type:
    """Return the class that gave objects of ``base`` their ``__dict__``."""
    while base.__base__ is not None and base.__base__.__dictoffset__:
        base = base.__base__
    return base


@functools.cache
def _first_base(layout: type) -> type[nn.Module]:
    """Return what has the methods of `_Attached`, and adds a ``__dict__`` to ``layout``.

    Python lets an object change its class only where both classes did that to the same one. It is
    ``object``, or what stands before ``nn.Module`` and has no ``__dict__``, as ``abc.ABC`` and
    ``typing.Generic``.
    """
    if layout is object:
        return _Attached
    metaclass: Any = type(layout)
    own = vars(_Attached).items()
    names: dict[str, Any] = {"__orig_bases__": ()}  # Generic wants some
    names.update((n, value) for n, value in own if isinstance(value, FunctionType | classmethod))
    made = metaclass("_Attached", (layout, nn.Module, _Any), names)
    made._pydedup_first = made
    first: type[nn.Module] = made
    return first


_Attached._pydedup_first = _Attached


def _in_one_version(base: Any) -> Callable[..., Any]:
    @functools.wraps(base.generate)
    def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        attachment: Attachment | None = self.__dict__.get(_KEY)
        if attachment is None:
            return base.generate(self, *args, **kwargs)
        with attachment.one_version():
            return base.generate(self, *args, **kwargs)

    return generate


def _check_surroundings(label: str) -> None:
    refuse_tracing(label)
    if torch.is_autocast_enabled("cpu"):
        raise ArgumentError(
            f"{label} computes in the dtype of its inputs; leave torch.autocast for the call, or "
            "attach a module in the dtype that you want"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ArgumentError(
            f"{label} streams its weights and cannot be part of what torch.func transforms (vmap, "
            "grad and the like); call it outside, or detach it first"
        )
