# SPDX-License-Identifier: Apache-2.0
"""Stores on Ray: rows scored by the workers of a cluster.

Needs the extra ``ray`` (``pip install 'pydedup[ray]'``); importing this does not.
"""

from __future__ import annotations

from pydedup.ray.cluster import attached

__all__ = ["attached"]
