# SPDX-License-Identifier: Apache-2.0
"""Store families of similar deep-learning models once, in a database, and predict from its pages.

Here: the public names, nothing else.
"""

from __future__ import annotations

from importlib.metadata import version as _version

from pydedup import policies
from pydedup.errors import PydedupError
from pydedup.store import Store, open

__version__ = _version("pydedup")

__all__ = ["PydedupError", "Store", "__version__", "open", "policies"]
