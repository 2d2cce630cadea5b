# SPDX-License-Identifier: Apache-2.0
"""Which page a full buffer pool gives up: the policies by name, recorded traces, their replay.

The policies themselves are native, the same code in the pool and in the replay. Deliberately not
here: the pool (:mod:`pydedup.pool`).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from pydedup import _core, config
from pydedup.errors import ArgumentError, FormatError
from pydedup.words import Replacement, ReplayPolicy, check_word

__all__ = ["DEFAULT_POLICY", "POLICIES", "Replay", "Trace", "check_policy", "check_trace", "replay"]

#: Policies by name, and what goes first.
POLICIES: Final[Mapping[Replacement, str]] = {
    "lru": "the page used least recently",
    "mru": "the page used most recently",
    "lru2": "the page whose last use but one is longest ago",
    "locality": "the page least likely wanted by any of its models, by their call rates added up",
    "reuse": "the page with the longest expected wait per byte: its own rate and that of its "
    "models, and how even its uses come",
}
#: The policy of a pool that was not told another.
DEFAULT_POLICY: Final = "reuse"

_TRACE_VERSION = 1


def check_policy(name: str, known: Iterable[str] = tuple(POLICIES)) -> None:
    """Raise ArgumentError for the name of a policy that is not ``known``."""
    check_word("replacement policy", name, known)


def check_trace(trace: object) -> None:
    """Raise ArgumentError for what is no trace."""
    if not isinstance(trace, Trace):
        raise ArgumentError(
            "trace must be a pydedup.replacement.Trace, as Trace.load(path) gives, not "
            f"{type(trace).__name__}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Uses of pages in their order, with the predictions that they were made for.

    Attributes
    ----------
    pages
        The page of each use, int64 (n,).
    nbytes
        Size of that page in bytes, uint32 (n,); the same at each use of a page.
    calls
        How many calls had begun before each use, uint32 (n,), ascending.
    owners
        The model of each call, int64.
    complete
        Whether the recording had room for all uses.
    """

    pages: NDArray[np.int64]
    nbytes: NDArray[np.uint32]
    calls: NDArray[np.uint32]
    owners: NDArray[np.int64]
    complete: bool = True

    def __len__(self) -> int:
        return len(self.pages)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``.npz`` file, in one step; what was there goes only then.

        Raises ArgumentError where none can be written, and for a database, StorageFullError.
        """
        from pydedup.formats._files import atomic_file

        content = io.BytesIO()  # numpy before 2.2 complains of a file that it cannot write
        np.savez_compressed(
            content,
            version=np.int64(_TRACE_VERSION),
            pages=self.pages,
            nbytes=self.nbytes,
            calls=self.calls,
            owners=self.owners,
            complete=np.bool_(self.complete),
        )
        with atomic_file(Path(path)) as scratch:
            scratch.write_bytes(content.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote. Raises FormatError for another file."""
        from pydedup.formats._files import is_used_by_sqlite

        if is_used_by_sqlite(Path(path)):  # to open it would give up a store's locks on it
            raise FormatError(f"{path} is a SQLite database, maybe a store, and no recorded trace")
        content = io.BytesIO(Path(path).read_bytes())  # so that an OSError is one of the file
        try:
            with np.load(content, allow_pickle=False) as columns:
                if int(columns["version"]) != _TRACE_VERSION:
                    raise FormatError(
                        f"{path} is a trace of version {int(columns['version'])}; "
                        f"this pydedup reads version {_TRACE_VERSION}"
                    )
                return cls(
                    columns["pages"].astype(np.int64, casting="safe"),
                    columns["nbytes"].astype(np.uint32, casting="safe"),
                    columns["calls"].astype(np.uint32, casting="safe"),
                    columns["owners"].astype(np.int64, casting="safe"),
                    bool(columns["complete"]),
                )
        except FormatError:
            raise
        except Exception as exc:  # numpy, zipfile and zlib raise all kinds on damaged bytes
            raise FormatError(
                f"{path} is no recorded trace, or a damaged one; `pydedup serve --record FILE` "
                "makes one, and store.recorded().save(FILE) after store.record()"
            ) from exc


@dataclass(frozen=True, slots=True)
class Replay:
    """What a trace comes to under a policy, the pool being empty at first.

    Attributes
    ----------
    policy
        Its name.
    hits, misses
        Uses of pages that were in the pool, and of those that were not.
    missed_bytes
        Bytes of the pages that were not.
    missed_calls
        Calls with a miss before the next one began: those that waited for the database, where
        none is made while another runs.
    """

    policy: ReplayPolicy
    hits: int
    misses: int
    missed_bytes: int
    missed_calls: int

    @property
    def hit_ratio(self) -> float:
        """Hits by uses; 0 for an empty trace."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else 0.0


def replay(trace: Trace, memory_bytes: str | int, policy: ReplayPolicy) -> Replay:
    """Replay a trace through a pool of so much memory, e.g. ``"512MiB"``.

    ``policy`` is one of `POLICIES`, or ``"optimum"``: the page whose next use is farthest away goes
    first, which needs to know the future (Belady, 1966; fewest misses where pages are of one size).

    Raises
    ------
    ArgumentError
        For an unknown policy, what is no trace or no size, and when the trace does not fit together
        or has a page larger than the memory.
    """
    check_trace(trace)
    check_policy(policy, [*POLICIES, "optimum"])
    counts = _core.replay(
        np.ascontiguousarray(trace.pages, np.int64),
        np.ascontiguousarray(trace.nbytes, np.uint32),
        np.ascontiguousarray(trace.calls, np.uint32),
        np.ascontiguousarray(trace.owners, np.int64),
        config.parse_bytes(memory_bytes),
        None if policy == "optimum" else policy,
    )
    return Replay(policy, *counts)
