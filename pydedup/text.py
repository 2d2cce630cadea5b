# SPDX-License-Identifier: Apache-2.0
"""Values as people read them, and text from outside made fit for a terminal and a log."""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from datetime import time as time_of_day
from decimal import ROUND_CEILING, Context, Decimal

__all__ = [
    "at_most",
    "clean",
    "count",
    "did_you_mean",
    "duration",
    "is_cut",
    "it_has",
    "largest",
    "listed",
    "models",
    "moment",
    "percent",
    "plural",
    "ratio",
    "row_key",
    "saved",
    "shape",
    "size",
    "size_at_least",
    "without_secrets",
]

# Of many names, a message has so many.
_SHOWN_NAMES = 6
#: And of many tensors with their sizes.
_SHOWN_SIZES = 3
#: And of the key of a row, as text.
_KEY_CHARS = 80
_ROUNDED_UP = Context(prec=3, rounding=ROUND_CEILING)
_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")
# Controls, halves of surrogate pairs, and what breaks a line of text.
_STEERING = ("Cc", "Cs", "Zl", "Zp")
# What reorders a line, and what nobody sees, so that two names would look the same. Not the
# joiners, of which emoji and Persian are made.
_MISLEADING = re.compile(
    "[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
# How URLs look in our own advice: nobody's login.
_FORM = r"(?!user(?::password)?@host(?::port)?/database(?:[\s,;]|$))"
# Of a URL that was taken for a path, `Path` leaves one slash.
_SCHEME = r"(?!sqlite:|file:)[A-Za-z][A-Za-z0-9+.-]*:(?://|/(?=[^\s'\"/:]+:))"
# A password may hold '@' and '/' by mistake: everything up to the last '@' of the word goes.
_LOGIN = re.compile(rf"\b({_SCHEME}){_FORM}[^\s'\"]*@")
# Databases with a login each.
_LIST = re.compile(r"\b([A-Za-z][A-Za-z0-9.-]*\+shards://[^\s'\"]*)")
_PORT = re.compile(r"([^:]*|\[[^\]]*\])(:\d*)?")
_SECRET_OPTION = re.compile(r"(?i)([?&](?:password|passwd|pwd|sslpassword|token)=)[^&\s'\"]*")


def clean(text: str) -> str:
    """Return text without anything that steers a terminal; what is taken out shows as an escape."""
    if text.isprintable() and not _MISLEADING.search(text):
        return text
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _STEERING or _MISLEADING.match(char)
        else char
        for char in text
    )


def without_secrets(text: str) -> str:
    """Return text with user names and passwords of URLs replaced by stars."""
    return "".join(
        _SECRET_OPTION.sub(r"\1***", _LOGIN.sub(r"\1***@", one))
        if n % 2 == 0
        else _list_without_secrets(one)
        for n, one in enumerate(_LIST.split(text))
    )


def _list_without_secrets(url: str) -> str:
    scheme, _, listed = url.partition("://")
    parts = listed.split("|")
    if is_cut([*parts[:-1], parts[-1].rstrip(".,:;")]):
        parts = [f"x@{listed.rpartition('@')[2]}"] if "@" in listed else ["***"]
    hidden = (
        without_secrets(part)
        if "://" in part
        else without_secrets(f"x://{part}").removeprefix("x://")
        for part in parts
    )
    return f"{scheme}://{'|'.join(hidden)}"


def is_cut(parts: Sequence[str]) -> bool:
    """Whether one of the databases of a sharded store may be a piece of a password with ``|``."""
    for part, after in zip(parts, [*parts[1:], ""], strict=True):
        bare = part.rpartition("://")[2]
        location = bare.partition("?")[0].partition("/")[0]
        # What reads as a host and its port may be a user and the first half of a password.
        halved = location == bare and ":" in location and "@" in after
        if "@" not in location and (halved or not _PORT.fullmatch(location)):
            return True
    return False


def size(n_bytes: int) -> str:
    """Return a number of bytes, e.g. ``512 B`` or ``12.3 MiB``."""
    if abs(n_bytes) < 1024:
        return f"{n_bytes} B"
    value = float(n_bytes)
    for unit in _UNITS:
        value /= 1024
        # 1023.95 would be printed as 1024.0: that is one of the next unit.
        if abs(value) < 1023.95 or unit == _UNITS[-1]:
            return f"{value:,.1f} {unit}"
    raise AssertionError("unreachable")


def size_at_least(n_bytes: int, exact: bool) -> str:
    """Return a number of bytes, and whether it may be more."""
    return size(n_bytes) if exact else f"at least {size(n_bytes)}"


def count(number: int) -> str:
    """Return a whole number with separators, e.g. ``12,345``."""
    return f"{number:,}"


def plural(number: int, noun: str) -> str:
    """Return e.g. ``1 page`` or ``12,345 pages``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def models(names: int, versions: int) -> str:
    """Return e.g. ``3 models in 5 versions``; the latter only where they are more."""
    what = plural(names, "model")
    return what if names == versions else f"{what} in {plural(versions, 'version')}"


def percent(share: float) -> str:
    """Return a share, e.g. ``62.4 %``; 100.0 and 0.0 only when it is exactly that."""
    value = 100 * share
    if 99.95 <= value < 100:
        return "99.9 %"
    if 0 < value < 0.05:
        return "<0.1 %"
    return f"{value + 0.0:.1f} %".replace("-0.0 %", "0.0 %")


def saved(share: float) -> str:
    """Return what is saved; where more is taken than given, that nothing is."""
    return percent(share) if share >= 0 else "nothing"


def ratio(value: float) -> str:
    """Return a ratio, e.g. ``1.08``."""
    return f"{value:.2f}"


def at_most(value: float) -> str:
    """Return what nothing is beyond, to three digits, rounded up."""
    return f"{float(_ROUNDED_UP.create_decimal(repr(float(value)))):.3g}"


def shape(extents: Iterable[int]) -> str:
    """Return a shape, e.g. ``400000x50``; ``scalar`` for no axes."""
    return "x".join(str(extent) for extent in extents) or "scalar"


def duration(seconds: float) -> str:
    """Return a span of time, e.g. ``0.42 s`` or ``3 min 20 s``."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def moment(timestamp: float) -> str:
    """Return a point in time, local, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(timestamp))


def row_key(value: object, *, shortened: bool = True) -> str:
    """Return the key of a row as people read it, and, but for the quotes of texts, as SQL has it.

    Python's driver makes its own objects of dates, decimal numbers and the like. For programs, long
    ones are not ``shortened``.
    """
    from uuid import UUID

    if value is None:
        text = "NULL"
    elif isinstance(value, bytes | bytearray | memoryview):
        text = f"0x{bytes(value).hex()}"
    elif isinstance(value, date | time_of_day | timedelta | Decimal | UUID):
        text = str(value)
    else:
        text = repr(value)
    if not shortened or len(text) <= _KEY_CHARS:
        return text
    return f"{text[:_KEY_CHARS]}... ({len(text)} characters)"


def listed(names: Sequence[str]) -> str:
    """Return names for a message; of many, some."""
    if len(names) <= _SHOWN_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[: _SHOWN_NAMES - 1])} and {len(names) - _SHOWN_NAMES + 1:,} more"


def largest(sizes: Mapping[str, int]) -> str:
    """Return the largest of some tensors with their bytes, and how many others there are."""
    shown = sorted(sizes, key=sizes.__getitem__, reverse=True)[:_SHOWN_SIZES]
    named = [f"{name!r} ({sizes[name]:,} bytes)" for name in shown]
    others = len(sizes) - len(shown)
    return ", ".join(named) + (f" and {others:,} more" if others else "")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Say which names come near to one that is not there, or else which there are.

    Those that are longer come first: who wrote the beginning of a name left out the rest.
    """
    import difflib

    longer = sorted(one for one in known if name and one.startswith(name))
    close = [*longer, *(c for c in difflib.get_close_matches(name, known) if c not in longer)][:3]
    if close:
        *others, last = map(repr, close)
        return f"; did you mean {', '.join(others)}{' or ' if others else ''}{last}?"
    if known:
        shown = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
        return f"; there is: {shown}"
    return "; the store is empty"


def it_has(selector: str, known: Sequence[str]) -> str:
    """Say what there is in the place of a version, alias or column; of many, what comes near."""
    if len(known) <= _SHOWN_NAMES:
        return f"; it has: {', '.join(known)}"
    return did_you_mean(selector, known)
