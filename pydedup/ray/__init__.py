# SPDX-License-Identifier: Apache-2.0
"""Stores on Ray: rows scored by the workers of a cluster, and models served by them.

cluster.py reaches or starts a Ray (probe.py and versions.py ask one beforehand). score.py is the
driver of a scoring: score_job.py is what is asked, score_plan.py cuts it into parts, score_feed.py
and score_pool.py give them to workers, which score_worker.py is. serving/ is for Ray Serve.

Needs the extra ``ray`` (``pip install 'pydedup[ray]'``); importing this does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydedup.ray.cluster import attached
from pydedup.ray.score import score

if TYPE_CHECKING:
    from pydedup.ray.serving.application import app, deployment

__all__ = ["app", "attached", "deployment", "score"]


if not TYPE_CHECKING:  # to a type checker, names that there are not stay unknown

    def __getattr__(name: str) -> Any:
        if name in ("app", "deployment"):
            try:
                from pydedup.ray.serving import application
            except ModuleNotFoundError as error:
                from pydedup.errors import ArgumentError, not_installed

                raise ArgumentError(not_installed("serving", error, "ray")) from error
            return getattr(application, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
