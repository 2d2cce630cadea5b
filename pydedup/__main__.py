# SPDX-License-Identifier: Apache-2.0
"""``python -m pydedup``: the command line program, by another way in."""

from __future__ import annotations

import sys

from pydedup.cli import main

if __name__ == "__main__":
    sys.exit(main())
