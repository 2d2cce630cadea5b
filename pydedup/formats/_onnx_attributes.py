# SPDX-License-Identifier: Apache-2.0
"""Attributes of ONNX nodes as plain numbers."""

from __future__ import annotations

from typing import Any

__all__ = ["Attributes", "UnknownError"]


class UnknownError(Exception):
    """An operation has no exact counterpart among ours."""


class Attributes(dict[str, Any]):
    """The attributes of one node, each an ``onnx.AttributeProto``, by name."""

    def integer(self, name: str, default: int) -> int:
        """Return an integer."""
        return int(self[name].i) if name in self else default

    def integers(self, name: str, default: list[int]) -> list[int]:
        """Return a list of integers."""
        return [int(value) for value in self[name].ints] if name in self else default

    def number(self, name: str, default: float) -> float:
        """Return a float."""
        return float(self[name].f) if name in self else default

    def text(self, name: str, default: str) -> str:
        """Return a text. Raises ValueError for bytes that are none."""
        return str(self[name].s.decode()) if name in self else default

    def pads(self, kernel: list[int], stride: list[int], dilation: list[int]) -> list[int]:
        """Return the padding as (top, left, bottom, right), which is ONNX's own order.

        Raises UnknownError where it depends on the size of the image.
        """
        how = self.text("auto_pad", "NOTSET")
        if how == "VALID":
            return [0, 0, 0, 0]
        if how in ("SAME_UPPER", "SAME_LOWER"):
            if stride != [1, 1]:
                raise UnknownError
            whole = [(size - 1) * apart for size, apart in zip(kernel, dilation, strict=True)]
            less = [total // 2 for total in whole]
            more = [total - part for total, part in zip(whole, less, strict=True)]
            return less + more if how == "SAME_UPPER" else more + less
        if how != "NOTSET":
            raise UnknownError
        return self.integers("pads", [0, 0, 0, 0])
