# SPDX-License-Identifier: Apache-2.0
"""Whether a path is there, and whether one that a model names may be read or written.

Such a one must not lead out of the model's folder: one from a stranger could link a tokenizer file
to a private one, and the store would hand its content out. The cache of the Hugging Face hub links
files of ``snapshots/<revision>`` to ``blobs`` beside it, so for such a folder the whole repository
counts. And how the files of one model are named.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

__all__ = ["exists", "is_inside", "other_shards", "stays_inside"]

#: How the files are named into which Hugging Face's libraries cut a large model.
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\..+)")
_MOST_SHARDS = 10_000


def exists(path: Path) -> bool:
    """Return whether there is something at a path; raise OSError where that cannot be told.

    `Path.exists` takes the latter for an absence since Python 3.14.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether ``path``, links resolved, lies in ``folder`` or its hub cache entry."""
    target = path.resolve()
    root = folder.resolve()
    if target.is_relative_to(root):
        return True
    for parent in (root, *root.parents):
        if parent.parent.name == "snapshots":
            return target.is_relative_to(parent.parent.parent / "blobs")
    return False


def stays_inside(name: str) -> bool:
    """Return whether a relative path, links aside, stays in the folder in which it is looked up."""
    pure = PurePosixPath(name)
    return bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts


def other_shards(name: str) -> tuple[str, ...]:
    """Return the files that have the rest of a model, by the name of one: ``x-1-of-2.bin``."""
    found = _SHARD.fullmatch(name)
    if found is None or int(found[3]) > _MOST_SHARDS:
        return ()
    head, own, count, tail = found.groups()
    numbers = (str(n).zfill(len(own)) for n in range(1, int(count) + 1) if n != int(own))
    return tuple(f"{head}-{number}-of-{count}{tail}" for number in numbers)
