# SPDX-License-Identifier: Apache-2.0
"""An adapter that fails where a test wants it to.

A full disk, a lost connection or a killed process at a chosen call: wrap an adapter, name the
method and which of its calls, and what happens there. Everything else is passed on unchanged.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydedup.adapter import Adapter
from pydedup.adapter_options import (
    ExpectingAdapter,
    NumberingAdapter,
    RowAdapter,
    StagingAdapter,
)

__all__ = ["Fault", "FaultyAdapter", "inject"]

_SCOPES = ("transaction", "staging", "publishing", "snapshot")
_NOT_CALLS = ("url", "read_only", "capabilities")
#: Passed on, too, where an adapter has them.
_OPTIONAL = (ExpectingAdapter, StagingAdapter, NumberingAdapter)


@dataclass(frozen=True)
class Fault:
    """One failure.

    Attributes
    ----------
    method
        Name of a method of the adapter, or ``"commit"``: the end of a transaction.
    error
        Raised; or called, when it is a function, and what it returns is raised, if anything (so
        a test can also kill the process, or just look).
    call
        Which call of the method fails, counted from 1; 0 means every call.
    after
        Fail when the call has had its effect, as if only its answer were lost. For ``"commit"``:
        after the transaction was committed. For ``"read_pages"``: after the first page.
    """

    method: str
    error: BaseException | Callable[[], BaseException | None]
    call: int = 1
    after: bool = False

    def __post_init__(self) -> None:
        known = self.method == "commit" or any(
            callable(getattr(protocol, self.method, None))
            for protocol in (Adapter, RowAdapter, *_OPTIONAL)
        )
        if not known or self.method in _NOT_CALLS:
            raise ValueError(f"an adapter has no method {self.method!r} that could fail")

    def strike(self) -> None:
        """Raise the error."""
        error = self.error if isinstance(self.error, BaseException) else self.error()
        if error is not None:
            raise error


class FaultyAdapter:
    """Passes calls on to an adapter, but for the faults; :func:`inject` gives it the right type.

    Attributes
    ----------
    calls
        How often each method was called so far, by name, ``"commit"`` included.
    """

    def __init__(self, adapter: Adapter, *faults: Fault) -> None:
        self._adapter = adapter
        self._faults = list(faults)
        self._lock = threading.Lock()
        self.calls: Counter[str] = Counter()

    def add_fault(self, fault: Fault) -> None:
        """Add a fault; its calls are counted from the beginning, not from now."""
        self._faults.append(fault)

    def clear_faults(self) -> None:
        """Behave well from now on."""
        self._faults.clear()

    def _due(self, method: str) -> list[Fault]:
        """Count a call and return the faults that it meets."""
        with self._lock:
            self.calls[method] += 1
            count = self.calls[method]
            return [f for f in self._faults if f.method == method and f.call in (0, count)]

    def _call(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        faults = self._due(name)
        _strike(faults, after=False)
        result = getattr(self._adapter, name)(*args, **kwargs)
        _strike(faults, after=True)
        return result

    def _read_pages(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        faults = self._due("read_pages")
        _strike(faults, after=False)
        for page in self._adapter.read_pages(ids):
            yield page
            _strike(faults, after=True)

    @contextlib.contextmanager
    def _scope(self, name: str) -> Iterator[None]:
        faults = self._due(name)
        _strike(faults, after=False)
        commit: list[Fault] = []
        with getattr(self._adapter, name)():
            yield
            if name != "snapshot":
                commit = self._due("commit")
            _strike(commit, after=False)
        _strike(commit, after=True)
        _strike(faults, after=True)


def _passed_on(name: str) -> Any:
    """Return the attribute of FaultyAdapter that stands for one of the protocol."""
    if name in _NOT_CALLS:
        return property(lambda self: getattr(self._adapter, name))
    if name in _SCOPES:
        return lambda self: self._scope(name)
    if name == "read_pages":
        return FaultyAdapter._read_pages
    return lambda self, /, *args, **kwargs: self._call(name, *args, **kwargs)


def _calls(*protocols: type) -> dict[str, Any]:
    """Return what passes on the calls of these protocols, by name."""
    names = {name for one in protocols for name in vars(one) if not name.startswith("_")}
    return {name: _passed_on(name) for name in names}


# Written into the class, not found by __getattr__, so that isinstance sees the protocol.
for _name, _attribute in _calls(Adapter, RowAdapter).items():
    setattr(FaultyAdapter, _name, _attribute)


def inject(adapter: Adapter, *faults: Fault) -> tuple[Adapter, FaultyAdapter]:
    """Return the adapter with these faults, once as an Adapter and once as what controls them."""
    given: object = adapter
    optional = _calls(*(one for one in _OPTIONAL if isinstance(given, one)))
    faulty: FaultyAdapter = type("FaultyAdapter", (FaultyAdapter,), optional)(adapter, *faults)
    return cast(Adapter, faulty), faulty


def _strike(faults: list[Fault], *, after: bool) -> None:
    for fault in faults:
        if fault.after == after:
            fault.strike()
