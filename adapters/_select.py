# SPDX-License-Identifier: Apache-2.0
"""The text of a user's query: what is plainly no SELECT, and one as a table of another."""

from __future__ import annotations

import re
from typing import Final

from pydedup.errors import ArgumentError

__all__ = ["as_table", "check_select"]

_COMMENTS: Final = re.compile(r"(?s)(\s|\(|;|--[^\n]*(\n|$)|/\*(?!!).*?\*/)*")
#: A semicolon at the end, and comments behind it with no character that may end a text, a name or
#: another comment, of which the semicolon would be part.
_END: Final = re.compile(r""";\s*(--[^\n'"`$*\]]*(\n\s*|$))*$""")
_FIRST_WORDS: Final = ("select", "with", "values", "table")


def as_table(query: str) -> str:
    """Return a user's SELECT as a table to select from."""
    check_select(query)
    # It may end in a comment, before or after its semicolon.
    return f"({_END.sub('', query)}\n) pydedup_q"


def check_select(query: str) -> None:
    """Raise ArgumentError for what is plainly no SELECT; the database sees to the rest."""
    try:
        query.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"the query is no Unicode text: it holds {query[error.start]!r} at place "
            f"{error.start}; write it in UTF-8"
        ) from None
    start = _COMMENTS.match(query)
    rest = query[start.end() if start else 0 :]
    word = re.match(r"[a-z]*", rest[:10].lower())
    if word is None or word.group() not in _FIRST_WORDS or "\0" in query:
        raise ArgumentError(
            f"the query must be one SELECT; this one begins with {rest[:20].strip() or 'nothing'!r}"
        )
