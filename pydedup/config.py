# SPDX-License-Identifier: Apache-2.0
"""What can be configured from outside, and what is in use.

Environment: ``PYDEDUP_KERNEL`` demands a kernel by name (an error when it cannot be had).
Deliberately not here: settings of a store, which live in its ``meta`` table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydedup import _core
from pydedup.errors import ArgumentError

__all__ = ["Kernel", "Kernels", "kernels", "parse_bytes"]


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


_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}IB"] = 1024**_power
    _UNITS[f"{_letter}B"] = 1000**_power


def parse_bytes(text: str | int) -> int:
    """Return the number of bytes in e.g. ``"512MiB"``, ``"2 GB"`` or ``1048576``.

    Raises
    ------
    ArgumentError
        When the text is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    factor = _UNITS.get(match.group(2).upper()) if match else None
    size = int(float(match.group(1)) * factor) if match and factor else 0
    if size <= 0:
        raise ArgumentError(f"{text!r} is not a size; write bytes or a unit, e.g. 512MiB")
    return size
