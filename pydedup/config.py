# SPDX-License-Identifier: Apache-2.0
"""What can be configured from outside, and what is in use.

Environment: ``PYDEDUP_KERNEL`` demands a kernel by name (an error when it cannot be had);
``PYDEDUP_THREADS`` says how many threads a computation takes that asks for no number (one per core
without it); it is read once, and what is no number of threads is refused when a store is opened.
Deliberately not here: settings of a store, which live in its ``meta`` table.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydedup import _core
from pydedup.errors import ArgumentError

if TYPE_CHECKING:
    from fractions import Fraction

__all__ = [
    "LEAST_MEMORY",
    "Kernel",
    "Kernels",
    "at_most_threads",
    "kernels",
    "parse_bytes",
    "parse_memory",
    "threads",
]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of the native kernels."""

    name: str
    built: bool
    runnable: bool
    note: str


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels of this build: all of them, which is in use, and why."""

    available: tuple[Kernel, ...]
    in_use: str
    reason: str


def kernels() -> Kernels:
    """Return which kernels exist, which is used and why.

    Raises
    ------
    KernelUnavailableError
        When ``PYDEDUP_KERNEL`` demands a kernel that is unknown, not built, or not runnable here.
    """
    return Kernels(
        available=tuple(Kernel(*info) for info in _core.kernel_infos()),
        in_use=_core.active_kernel(),
        reason=_core.active_kernel_reason(),
    )


def threads() -> int:
    """Return how many threads a computation takes that asks for no number, here and now.

    Raises ArgumentError when ``PYDEDUP_THREADS`` is no number above 0.
    """
    said = os.environ.get("PYDEDUP_THREADS", "")
    if said and re.fullmatch("0*[1-9][0-9]*", said) is None:
        raise ArgumentError(
            f"PYDEDUP_THREADS: {said!r} is no number of threads; give one above 0, or leave it out "
            "for one per core"
        )
    return _core.default_threads()


@contextlib.contextmanager
def at_most_threads(most: int | None) -> Iterator[None]:
    """Bound the threads of computations that this thread begins within; ``None`` for no bound."""
    before = _core.limit_threads(most or 0)
    try:
        yield
    finally:
        _core.limit_threads(before)


#: The least memory budget of a store: two pages (`pydedup.layout.PAGE_BYTES`), a delta's and its
#: base's.
LEAST_MEMORY = 2 * 1024 * 1024
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)
_LONGEST_SIZE = 40
#: What a column of integers takes.
_MOST_BYTES = 2**63 - 1
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}IB"] = 1024**_power
    _UNITS[f"{_letter}B"] = 1000**_power


def parse_bytes(text: str | int) -> int:
    """Return the number of bytes in e.g. ``"512MiB"``, ``"1.5 GB"`` or ``1048576``.

    Raises
    ------
    ArgumentError
        When the text is not a size of 1 byte to 8 EiB. Fractions want a unit: bytes are whole.
    """
    match = _SIZE.fullmatch(str(text)) if len(str(text)) <= _LONGEST_SIZE else None
    factor = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or factor is None:
        raise ArgumentError(
            f"{str(text)[:_LONGEST_SIZE]!r} is not a size; write bytes or a unit, e.g. 512MiB"
        )
    exact = _exact(match.group(1)) * factor
    if factor == 1 and exact.denominator != 1:
        raise ArgumentError(
            f"{text!r} is no whole number of bytes; write a unit, e.g. {match.group(1)}GB"
        )
    if not 1 <= exact <= _MOST_BYTES:
        raise ArgumentError(f"{text!r} is not within 1 byte and 8 EiB")
    return int(exact)


def parse_memory(text: str | int) -> int:
    """Return a memory budget in bytes, given as `parse_bytes` takes it.

    Raises
    ------
    ArgumentError
        When it is no size, or less than `LEAST_MEMORY`.
    """
    budget = parse_bytes(text)
    if budget < LEAST_MEMORY:
        raise ArgumentError(
            f"{text!r} is too little memory for a store: give {LEAST_MEMORY >> 20}MiB or more; "
            "two pages of up to 1 MiB each have to fit"
        )
    return budget


def _exact(number: str) -> int | Fraction:
    if "." not in number:
        return int(number)
    from fractions import Fraction

    return Fraction(number)
