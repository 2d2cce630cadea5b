# SPDX-License-Identifier: Apache-2.0
"""Models from one store to another, of whatever databases, and stores to one file and back.

An add whose matching step takes blocks as another store has them: what is staged, checked and
published is what `pydedup.ingest` stages and publishes. `copy` does it for all models, `backup` to
a file. `plan` says what there is to do, `quota` whether it is allowed; `survey` and `known` what is
there already; `resolve` finds or takes along the blocks of one model (`pieces`, `whole` pages, its
`signatures`), `staged` is that model on its way, and `arrival` checks what was written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydedup._lazy import modules_of

if not TYPE_CHECKING:
    __getattr__ = modules_of(__name__)
