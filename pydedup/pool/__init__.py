# SPDX-License-Identifier: Apache-2.0
"""Pages in memory, under one hard budget per store.

``pool`` is what others see, with ``walks`` over many blocks; ``loading`` brings in what misses,
``prefetch`` does so ahead of its use, ``admission`` divides the budget between those who work at
the same time.
"""

from __future__ import annotations

from pydedup.pool.admission import Reservation
from pydedup.pool.loading import Fetch, Fetched
from pydedup.pool.pool import Called, Page, PagePool
from pydedup.windows import Window

__all__ = ["Called", "Fetch", "Fetched", "Page", "PagePool", "Reservation", "Window"]
