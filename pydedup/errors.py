# SPDX-License-Identifier: Apache-2.0
"""Every exception that pydedup raises on purpose.

    PydedupError
    ├── ArgumentError (ValueError)         a value the caller gave is wrong
    │   └── KernelUnavailableError         PYDEDUP_KERNEL demands what cannot be had
    ├── FormatError (ValueError)           a model file is truncated, corrupt or unsafe
    │   └── UnsupportedFormatError         no reader or writer for it, or an extra is missing
    ├── NotFoundError (LookupError)        no such model, version, alias, tensor or file
    ├── DuplicateError                     name@version exists already
    ├── QuotaError                         an add would take a value of metadata over its quota
    ├── BudgetError (MemoryError)          the memory budget does not allow the request
    ├── EvaluationError                    a policy's callable failed or returned nonsense
    ├── ClusterError                       a Ray cluster cannot be reached, or does not fit
    └── StoreError
        ├── NotAStoreError                 the database holds no pydedup store (or something else)
        │   └── MissingStoreError          there could be one, but nobody has created it yet
        ├── SchemaVersionError             of a newer pydedup, or an older one not migrated yet
        ├── ReadOnlyError                  a change was asked of a store opened for reading
        ├── ConflictError                  another writer was in the way for too long
        ├── UnavailableError               the database cannot be reached; retrying may help
        ├── StorageFullError               no space left where the store lives
        └── CorruptStoreError              stored bytes do not match their checksum
            └── PageNotFoundError          a page that should exist does not

Messages say what was wrong, with which name and value, and what to do. They never hold
credentials.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Self, TypeVar

from pydedup.text import clean, listed, plural

__all__ = [
    "ArgumentError",
    "BudgetError",
    "ClusterError",
    "ConflictError",
    "CorruptStoreError",
    "DuplicateError",
    "EvaluationError",
    "FormatError",
    "KernelUnavailableError",
    "MissingStoreError",
    "NotAStoreError",
    "NotFoundError",
    "PageNotFoundError",
    "PydedupError",
    "QuotaError",
    "ReadOnlyError",
    "SchemaVersionError",
    "StorageFullError",
    "StoreError",
    "UnavailableError",
    "UnsupportedFormatError",
]

#: A disk with less free space than this counts as full: a new store takes 0.7 MiB with its log.
_SPARE_BYTES: Final = 1 << 20
_E = TypeVar("_E", bound=BaseException)


def not_installed(what: str, error: ImportError, extra: str) -> str:
    """Return the message for where an extra is missing: what needs it, and how to get it.

    A package that is there and cannot be imported, for a library that it lacks, says so itself.
    """
    return (
        f"{what} needs something that is not installed ({error}); install it with: "
        f"pip install 'pydedup[{extra}]'"
    )


def is_full(folder: Path) -> bool:
    """Return whether a folder's disk has too little space for what is written there."""
    import shutil  # of use here alone

    try:
        disk = shutil.disk_usage(folder)
    except OSError:
        return False
    return disk.total > 0 and disk.free < _SPARE_BYTES  # some know of neither, and say 0


def without_frames(error: _E) -> _E:
    """Return an error, and what led to it, without frames, whose variables it would keep.

    Of what a driver raised as it connected these hold passwords, which tracebacks that show
    variables, as those of rich and pytest do, would show. Of an error that is kept, frames of who
    called have pages and arrays in use; some hold the error too, and in such a circle all of it
    would stay until Python happens to look for circles.
    """
    for one in with_causes(error):
        one.__traceback__ = None
    return error


def with_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what led to it, each once: some are raised from themselves."""
    ahead: list[BaseException | None] = [error]
    seen = set[int]()  # a cause is most often the context as well
    while ahead:
        one = ahead.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            ahead += [one.__cause__, one.__context__]


class PydedupError(Exception):
    """Root of all exceptions raised by pydedup.

    What steers a terminal or a log shows as an escape: names in a message may be those of a store
    or a file that somebody else made.
    """

    def __str__(self) -> str:
        return "\n".join(clean(line) for line in super().__str__().split("\n"))


class ArgumentError(PydedupError, ValueError):
    """A value given by the caller is wrong."""


class KernelUnavailableError(ArgumentError):
    """The kernel demanded by ``PYDEDUP_KERNEL`` is unknown, not built or not runnable."""


class FormatError(PydedupError, ValueError):
    """A model file is truncated, corrupt or unsafe to read."""


class UnsupportedFormatError(FormatError):
    """No reader or writer fits, or the extra that brings it is not installed."""


class NotFoundError(PydedupError, LookupError):
    """No such model, version, alias or tensor, or no such file to read."""


class DuplicateError(PydedupError):
    """The store already has this ``name@version``."""


class QuotaError(PydedupError):
    """An add would take the models of one value of metadata, a tenant, over their quota."""


class BudgetError(PydedupError, MemoryError):
    """The memory budget does not allow the request.

    Attributes
    ----------
    never
        Whether it surely never will, whatever else is in use. Where it is not known, False.
    """

    never: bool = False


class EvaluationError(PydedupError):
    """A callable that a policy was given raised, or returned what cannot be used.

    Those are ``evaluate``, ``finetune`` and ``saliency``. What they raised is ``__cause__``.
    """


class ClusterError(PydedupError):
    """A Ray cluster cannot be reached, or what is on its machines does not fit."""


class StoreError(PydedupError):
    """Something is wrong with the database or what it holds."""


class NotAStoreError(StoreError):
    """The database holds no pydedup store, or is not a database at all."""


class MissingStoreError(NotAStoreError):
    """There is no store where one was to be read, though there could be one.

    Attributes
    ----------
    what
        What was found instead of one.
    hindrance
        What must be done before one can be created; empty when nothing must.
    """

    def __init__(self, what: str, hindrance: str = "") -> None:
        super().__init__(what, hindrance)
        self.what = what
        self.hindrance = hindrance

    def told(self, how: str) -> str:
        """Return the message; ``how`` says how one is created."""
        return f"{self.what}; {self.hindrance}{', then ' if self.hindrance else ''}{how}"

    def __str__(self) -> str:
        return clean(self.told("open it with mode 'a' to create one"))


class SchemaVersionError(StoreError):
    """The store was written by a newer pydedup, or by an older one and cannot be migrated here."""


class ReadOnlyError(StoreError):
    """A change was asked of a store that cannot be written."""


class ConflictError(StoreError):
    """Another writer was in the way for too long."""


class UnavailableError(StoreError):
    """The database cannot be reached; trying again may help."""


class StorageFullError(StoreError):
    """There is no space left where the store lives."""


class CorruptStoreError(StoreError):
    """Stored bytes do not parse or do not match their checksum.

    Attributes
    ----------
    page_ids
        The pages that cannot be read, where it is about pages.
    """

    page_ids: tuple[int, ...] = ()


class PageNotFoundError(CorruptStoreError):
    """A page that a block map names does not exist."""

    @classmethod
    def of(cls, page_ids: Sequence[int], more: str = "") -> Self:
        """Return the error for pages that do not exist; ``more`` is what is known of them."""
        do = "does" if len(page_ids) == 1 else "do"
        ids = listed([str(number) for number in page_ids])
        more = more or "; if this stays so after reopening the store, run verify on it"
        error = cls(f"{plural(len(page_ids), 'page')} {do} not exist: {ids}{more}")
        error.page_ids = tuple(page_ids)
        return error
