# SPDX-License-Identifier: Apache-2.0
"""The command line program ``pydedup``: options in, tables or JSON out, nothing of its own to know.

``app.py`` gathers the commands, ``errors.py`` turns exceptions into one line and an exit status,
``output.py`` and ``tables.py`` print, ``progress.py`` says how far something is. The commands lie
in one file per purpose and call `pydedup.Store`. Deliberately not here: any figure that the API
does not give.
"""

from __future__ import annotations

from pydedup.cli.app import main

__all__ = ["main"]
