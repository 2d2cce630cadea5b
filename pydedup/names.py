# SPDX-License-Identifier: Apache-2.0
"""What users name: models, as ``name``, ``name@version`` or ``name@alias``, and files."""

from __future__ import annotations

import os
import sys
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from pydedup.errors import ArgumentError

__all__ = ["Address", "check_name", "check_path", "parse_address"]

_MAX_LENGTH = 255


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed address; ``selector`` is a version or an alias, ``None`` for the newest version."""

    name: str
    selector: str | None

    def __str__(self) -> str:
        return self.name if self.selector is None else f"{self.name}@{self.selector}"


def check_name(text: str, what: str) -> str:
    """Return ``text`` if it can name a model, version, alias or tensor owner.

    Raises
    ------
    ArgumentError
        Unless it is 1 to 255 NFC characters without ``@``, control characters or outer space.
    """
    if not isinstance(text, str):
        raise _no_text(text, what)
    reason = None
    if not text:
        reason = "is empty"
    elif len(text) > _MAX_LENGTH:
        reason = f"has {len(text)} characters; at most {_MAX_LENGTH} are allowed"
    elif text != text.strip():
        reason = "starts or ends with space"
    elif "@" in text:
        reason = "holds '@', which separates a name from its version"
    elif any("\udc80" <= c <= "\udcff" for c in text):  # so Python hands over such bytes
        encoding = sys.getfilesystemencoding()
        way = "write it so" if encoding == "utf-8" else "take a locale of UTF-8, as LC_ALL=C.UTF-8"
        reason = f"has bytes that are not {encoding}; {way}"
    elif any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        reason = "holds control characters or half of a surrogate pair"
    elif not unicodedata.is_normalized("NFC", text):
        reason = "is not in Unicode normal form C; apply unicodedata.normalize('NFC', ...)"
    if reason:
        raise ArgumentError(f"{what} {text[:60]!r} {reason}")
    return text


def _no_text(value: object, what: str) -> ArgumentError:
    written = f"; write {str(value)!r}" if isinstance(value, int) else ""
    return ArgumentError(f"{what} must be a string, got {type(value).__name__}{written}")


def check_path(path: object, what: str, *, or_url: bool = False) -> str:
    """Return a path as a text.

    Raises
    ------
    ArgumentError
        When it is no path, or one that no file can have; and for a URL, without its password,
        unless it may be one.
    """
    try:
        text = os.fspath(path)  # type: ignore[call-overload]
        is_path = isinstance(text, str) and b"\0" not in os.fsencode(text)
    except (TypeError, UnicodeEncodeError):
        is_path = False
    if not is_path:
        raise ArgumentError(f"{what} must be the path of a file, not {path!r:.100}")
    if not text:  # to `Path`, that is the folder where the process runs
        raise ArgumentError(f"{what} is empty; give the path of a file")
    if "://" in text and not or_url:
        raise ArgumentError(
            f"{what} must be the path of a file, not a URL (copy takes models to another store)"
        )
    return str(text)


def parse_address(text: str) -> Address:
    """Parse ``name`` or ``name@selector``.

    Raises
    ------
    ArgumentError
        When either part breaks the rules of `check_name`.
    """
    if not isinstance(text, str):
        raise _no_text(text, "a model address")
    return _parsed(text)


@lru_cache(maxsize=4096)  # each prediction names its model again
def _parsed(text: str) -> Address:
    name, at, selector = text.partition("@")
    check_name(name, "model name")
    return Address(name, check_name(selector, "version or alias") if at else None)
