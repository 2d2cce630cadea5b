# SPDX-License-Identifier: Apache-2.0
"""Adding a model and one that descends from it."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

import pydedup
from pydedup.policies import Exact, Policy

Model = dict[str, NDArray[Any]]

_EXACT = Exact()


def added_beside(
    store: pydedup.Store,
    base: Model,
    model: Model,
    policy: Policy,
    *,
    joint: bool,
    before: Policy = _EXACT,
) -> pydedup.AddReport:
    """Add a model after its relative, which comes under ``before``, or with it in one call."""
    if joint:
        return store.add_many({"base": base, "m": model}, policy=policy)[1]
    store.add("base", base, policy=before)
    return store.add("m", model, policy=policy)
