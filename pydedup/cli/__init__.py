# SPDX-License-Identifier: Apache-2.0
"""The command line program ``pydedup``: options in, tables or JSON out, nothing of its own to know.

``app.py`` gathers the commands, ``errors.py`` turns exceptions into one line and an exit status,
``output.py`` and ``tables.py`` print, ``progress.py`` says how far something is, ``signals.py``
lets Ctrl-C end it. The commands lie in one file per purpose and call `pydedup.Store`. Deliberately
not here: any figure that the API does not give.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pydedup.errors import with_causes

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status; see `pydedup.cli.app.main`."""
    try:
        from pydedup.cli import app

        return app.main(arguments)
    except BaseException as error:  # what it needs takes a while to load, on a cold disk seconds
        interrupt = interrupt_in(error)
        if interrupt is None:
            raise
        sys.stderr.write("pydedup: interrupted, the store is as it was before\n")
        return 128 + getattr(interrupt, "number", 2)  # SIGINT, before there is another one


def interrupt_in(error: BaseException) -> KeyboardInterrupt | None:
    """Return what Ctrl-C raised; a compiled module makes an ImportError of that."""
    return next((one for one in with_causes(error) if isinstance(one, KeyboardInterrupt)), None)
