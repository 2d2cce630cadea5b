# SPDX-License-Identifier: Apache-2.0
"""Keeping a store sound and small.

verify.py checks it: verify_pages.py, then verify_models.py; damage.py is what it reports, and
recheck.py measures promised metrics again. repair.py restores damaged pages (survey.py says what is
lost, blocks_from.py finds it, relocate.py publishes it), rows.py makes rows anew that follow from
others, refill.py puts back copies of pages where a store keeps several, vacuum.py and repack.py
free and repack (unused.py says whether that may pay), maps.py gives models the block maps of what
moved, versions.py moves aliases and removes versions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydedup._lazy import modules_of

if not TYPE_CHECKING:
    __getattr__ = modules_of(__name__)
