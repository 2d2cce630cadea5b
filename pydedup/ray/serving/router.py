# SPDX-License-Identifier: Apache-2.0
"""How Ray Serve chooses a replica: the home of the family first, then whoever has room.

Named to Ray by its import path, and used where a deployment is called: in the processes of the
front. Says nothing of which model is of which family; that is the id that a call is multiplexed by.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import RequestRouter

from pydedup.ray.serving.placement import Placement

__all__ = ["FamilyRouter"]


class FamilyRouter(RequestRouter):  # type: ignore[misc,unused-ignore]
    """Sends a call to the home of its family; while that has all that it may have, to others."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._placement = Placement()

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """Return replicas in ranks; of a rank, Ray takes the one with the fewest requests."""
        key = "" if pending_request is None else pending_request.metadata.multiplexed_model_id
        if not key or len(candidate_replicas) < 2:
            return [candidate_replicas]
        known = {str(one.replica_id.unique_id): one for one in candidate_replicas}
        home = self._placement.home(
            key, {name: one.multiplexed_model_ids for name, one in known.items()}
        )
        first = known.pop(home)
        return [[first], list(known.values())]
