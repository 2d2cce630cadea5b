# SPDX-License-Identifier: Apache-2.0
"""Which running work a staging belongs to, and whether it is still alive.

A writer leaves a job row and refreshes its cursor, a time stamp, with every transaction. A job is
dead when it was silent for `LEASE_SECONDS`, or at once when its process is known to be gone: the
row also names the machine (boot id), the process namespace, the process and its start time.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["LEASE_SECONDS", "job_is_dead", "job_spec", "models_of_job"]

#: A job that gave no sign of life for this long is abandoned.
LEASE_SECONDS = 600.0


def job_spec(kind: str, model_ids: Sequence[int] = ()) -> str:
    """Return the spec of a job of this process that stages these models."""
    return json.dumps({"kind": kind, "models": list(model_ids), "process": _identity(os.getpid())})


def models_of_job(spec: str) -> list[int]:
    """Return the ids of the models that a job stages."""
    return [int(model_id) for model_id in json.loads(spec).get("models", ())]


def job_is_dead(spec: str, cursor: str, lease_seconds: float = LEASE_SECONDS) -> bool:
    """Return whether whoever left this job cannot be working on it any more."""
    if time.time() - float(cursor) > lease_seconds:
        return True
    process = json.loads(spec).get("process")
    if not process:
        return False
    here = _identity(os.getpid())
    if here is None or (process["boot"], process["namespace"]) != (here["boot"], here["namespace"]):
        return False  # on another machine: only the lease can tell
    return bool(_identity(int(process["pid"])) != process)


def _identity(pid: int) -> dict[str, str | int] | None:
    """Return what tells one process from all others, ``None`` where /proc does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        # From field 3 on, counted after the command, which may hold spaces and parentheses.
        fields = stat[stat.rindex(")") + 2 :].split()
        if fields[0] == "Z":
            return None  # killed, not yet waited for
        return {
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "namespace": str(Path("/proc/self/ns/pid").readlink()),
            "pid": pid,
            "started": fields[19],
        }
    except (OSError, ValueError, IndexError):
        return None
