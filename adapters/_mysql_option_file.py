# SPDX-License-Identifier: Apache-2.0
"""The password in an option file of MySQL's programs, such as ``~/.my.cnf``.

The driver reads such files too, but takes quotes for a part of the password, and shows the line
that it does not understand.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

__all__ = ["password_in"]

#: What all clients of MariaDB read; of several passwords the last one counts.
_GROUPS: Final = ("client", "client-server", "client-mariadb")
_ESCAPES: Final = {"b": "\b", "n": "\n", "r": "\r", "s": " ", "t": "\t"}
_ESCAPED: Final = re.compile(r"\\([bnrst\\'\"])")
#: A value, of whose quoted parts a ``#`` belongs to them, and a comment.
_VALUE: Final = re.compile(r"""((?:"(?:\\.|[^"\\])*"?|'(?:\\.|[^'\\])*'?|[^#"'])*)(?:#.*)?""")


def password_in(file: str) -> str:
    """Return the password that a file gives to all clients. Raises ValueError, without it."""
    try:
        lines = Path(file).expanduser().read_text("utf-8").splitlines()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"a file that can be read, and {file!r} cannot: {error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"an option file of MySQL, in UTF-8, and {file!r} is none") from None
    group, password = "", None
    for line in map(str.strip, lines):
        if line.startswith("["):
            group = line[1:].partition("]")[0].strip()
        name, is_given, value = line.partition("=")
        if group in _GROUPS and name.strip() == "password" and is_given:
            password = _value(value)
    if password is None:
        raise ValueError(f"a file with a line password=... below [client], and {file!r} has none")
    return password


def _value(text: str) -> str:
    found = _VALUE.match(text)
    value = found[1].strip() if found else ""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    return _ESCAPED.sub(lambda escaped: _ESCAPES.get(escaped[1], escaped[1]), value)
