# SPDX-License-Identifier: Apache-2.0
"""What torch allocates while an attached module is called, counted against the budget of the store.

What a module will need, nobody can say beforehand: its code is its own. So its first call has all
that activations may take, and is measured: the memory behind the result of each operator is
followed until it is freed. Later calls of about these shapes take the peak before they begin, as
predictions without torch do, and are not slowed down; much larger or smaller ones are measured too.

Deliberately not here: cutting batches (pieces.py), which needs to know that rows are apart.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, TypeAlias, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pydedup.pool import PagePool

__all__ = ["Activations", "made", "needed", "not_measured"]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

#: Sizes of all axes of all tensors among the arguments.
_Sizes: TypeAlias = tuple[int, ...]
#: What a call is beside these: the module, the kinds of its tensors, its flags.
_Form: TypeAlias = tuple[object, ...]

#: The budget is asked for so many bytes at a time while a call is measured.
_STEP: Final = 1 << 20
#: What is not worth the asking, and what is not worth being measured again.
_NOTHING: Final = 256 << 10
_SMALL: Final = 4 << 20
#: A call that is larger, or smaller, than a measured one by no more than this is not measured.
_GROWTH, _SHRINKING = 1.25, 2.0
#: Forms of calls that are remembered, and sizes of each.
_FORMS, _MEASURED = 64, 16


class _Here(threading.local):
    """What is going on in this thread."""

    #: Whether a call is counted: what is called inside of it is part of it.
    counted = False
    meter: _Meter | None = None


_here = _Here()


class Activations:
    """How much memory calls of attached modules take, for one pool. Safe between threads."""

    def __init__(self) -> None:
        # Never changed, but replaced: without a lock, which a fork could leave locked.
        self._peaks: dict[_Form, dict[_Sizes, int]] = {}

    @classmethod
    def of(cls, pool: PagePool) -> Activations:
        """Return what is known of the calls of all modules that this pool has pages for."""
        return _known.setdefault(pool, cls())

    def counted(
        self,
        pool: PagePool,
        module: object,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        threads: set[int],
        *,
        is_part: bool,
    ) -> AbstractContextManager[None]:
        """Return a context in which what torch allocates is counted.

        It waits until other calls leave room for that. Calls of modules that are equal, or of one,
        are told from each other by their arguments.

        Parameters
        ----------
        threads
            Those whose calls of an attached module are counted now; this one is added meanwhile.
        is_part
            Whether it is a part of that module. Then no other call of it is waited for: the
            module may have threads that call its parts, and wait for them.
        """
        if _here.counted:
            return nullcontext()
        form, sizes = _form(module, args, kwargs)
        if self._peaks.get(form, {}).get(sizes, _NOTHING + 1) <= _NOTHING:
            return nullcontext()
        waits = not (is_part and threads)
        return self._counted(pool, form, sizes, threads, waits)

    @contextmanager
    def _counted(
        self, pool: PagePool, form: _Form, sizes: _Sizes, threads: set[int], waits: bool
    ) -> Iterator[None]:
        found = self._expected(form, sizes)
        expected, is_known = (pool.activation_bytes, False) if found is None else found
        thread = threading.get_ident()
        _here.counted = True
        try:
            with pool.activations(expected, waits=waits) as held:
                threads.add(thread)
                if is_known:
                    yield
                    return
                meter = _Meter(expected, held.take_more)
                try:
                    with meter:
                        yield
                finally:
                    peak = meter.end()
            self._note(form, sizes, peak)
        finally:
            _here.counted, _here.meter = False, None  # before any call: an interrupt comes there
            threads.discard(thread)

    def _expected(self, form: _Form, sizes: _Sizes) -> tuple[int, bool] | None:
        """Return what a call will take at most, and whether that is known well enough."""
        measured = list(self._peaks.get(form, {}).items())
        if not measured:
            return None
        larger = [
            (peak, _growth(sizes, known))
            for known, peak in measured
            if all(size <= most for size, most in zip(sizes, known, strict=True))
        ]
        if larger:
            peak, surplus = min(larger)
            return peak, surplus <= _SHRINKING or peak <= _SMALL
        # As attention grows, with the square of a length: the product of all axes, twice.
        growth, peak = min((_growth(known, sizes), peak) for known, peak in measured)
        likely = int(peak * growth**2)
        return likely, growth <= _GROWTH or likely <= _SMALL

    def _note(self, form: _Form, sizes: _Sizes, peak: int) -> None:
        others = {other: known for other, known in self._peaks.items() if other != form}
        known = {**self._peaks.get(form, {}), sizes: peak}
        self._peaks = _newest({**others, form: _newest(known, _MEASURED)}, _FORMS)


def _newest(known: dict[_Key, _Value], most: int) -> dict[_Key, _Value]:
    return dict(list(known.items())[-most:])


def _growth(known: _Sizes, sizes: _Sizes) -> float:
    """Return how much larger the largest argument may have become."""
    growth = 1.0
    for size in {(most, size) for most, size in zip(known, sizes, strict=True) if size > most}:
        growth *= size[1] / max(size[0], 1)
    return growth


#: Of each pool, for all who attach modules to its store.
_known: weakref.WeakKeyDictionary[PagePool, Activations] = weakref.WeakKeyDictionary()


def _form(module: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[_Form, _Sizes]:
    if not kwargs and len(args) == 1 and type(args[0]) is torch.Tensor and not args[0].is_nested:
        return (module, args[0].dtype, args[0].ndim), tuple(args[0].shape)  # the most common one
    kinds: list[object] = [module]
    sizes: list[int] = []
    for value in _flat((args, kwargs)):
        if isinstance(value, torch.Tensor) and value.is_nested:
            kinds.append(("nested", value.dtype, value.ndim))
            sizes.append(value.values().numel())  # has no shape
        elif isinstance(value, torch.Tensor):
            kinds.append((value.dtype, value.ndim))
            sizes.extend(value.shape)
        elif value is None or isinstance(value, bool | str):
            kinds.append(value)  # numbers differ from call to call, and flags change what is done
        else:
            kinds.append(type(value))
    return tuple(kinds), tuple(sizes)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _flat(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _flat(inner)
    else:
        yield value


# ---- measuring ----------------------------------------------------------------------------------


class _Followed(weakref.ref[torch.UntypedStorage]):
    """A piece of memory that lives."""

    __slots__ = ("key", "nbytes")
    key: int
    nbytes: int


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the result of each operator of torch in this thread, and how long its memory lives.

    Parameters
    ----------
    taken
        Bytes of the budget that the call has.
    take_more
        Takes more of it.
    """

    supports_higher_order_operators = True

    def __init__(self, taken: int, take_more: Callable[[int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._taken, self._take_more = taken, take_more
        self._live: dict[int, _Followed] = {}
        self._nbytes = self._peak = 0
        self.paused = False
        _here.meter = self

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's wrapper for that imports its compiler: a second, and 70 MB

    def end(self) -> int:
        """Follow nothing any more; return the most bytes that lived at a time."""
        _here.meter = None
        self.paused = True
        self._live.clear()
        if self._is_last():  # an interrupt came as torch entered or left it
            torch._C._pop_torch_dispatch_stack(None)
        return self._peak

    def _is_last(self) -> bool:
        n_modes = torch._C._len_torch_dispatch_stack()
        return n_modes > 0 and torch._C._get_dispatch_stack_at(n_modes - 1) is self

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call an operator, and follow what it made."""
        made = func(*args, **kwargs or {})
        if not self.paused:
            given = {storage._cdata for storage in _storages((args, kwargs or {}))}
            for storage in _storages(made):
                if storage._cdata not in given:
                    self.follow(storage)
        return made

    def follow(self, storage: torch.UntypedStorage) -> None:
        """Count this memory until it is freed."""
        key = storage._cdata
        if key in self._live:
            return
        followed = _Followed(storage, self._gone)
        followed.key, followed.nbytes = key, storage.nbytes()
        self._live[key] = followed
        self._nbytes += followed.nbytes
        self.need(0)

    def need(self, nbytes: int) -> None:
        """Count memory that is used for a moment, beside what lives."""
        wanted = self._nbytes + nbytes
        self._peak = max(self._peak, wanted)
        if wanted > self._taken:
            more = -(-(wanted - self._taken) // _STEP) * _STEP
            self._take_more(more)
            self._taken += more

    def _gone(self, followed: weakref.ref[torch.UntypedStorage]) -> None:
        assert isinstance(followed, _Followed)
        if self._live.pop(followed.key, None) is not None:
            self._nbytes -= followed.nbytes


def _storages(values: Any) -> Iterable[torch.UntypedStorage]:
    for value in _flat(values):
        # Of subclasses, the tensors inside are seen by themselves.
        is_plain = type(value) in (torch.Tensor, torch.nn.Parameter)
        if is_plain and value.is_cpu and value.layout is torch.strided:
            yield value.untyped_storage()


def made(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose memory no operator of torch allocated, and count that."""
    meter = _here.meter
    if meter is not None and not meter.paused:
        meter.follow(tensor.untyped_storage())
    return tensor


def needed(nbytes: Callable[[], int]) -> None:
    """Count memory that is about to be used, by no operator of torch; most calls do not ask."""
    meter = _here.meter
    if meter is not None and not meter.paused:
        meter.need(nbytes())


@contextmanager
def not_measured() -> Iterator[None]:
    """Do something whose memory is counted otherwise."""
    meter = _here.meter
    if meter is None or meter.paused:
        yield
        return
    meter.paused = True
    try:
        yield
    finally:
        meter.paused = False
