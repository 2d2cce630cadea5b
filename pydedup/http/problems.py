# SPDX-License-Identifier: Apache-2.0
"""What went wrong as a status of HTTP and a sentence."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydedup.errors import (
    ArgumentError,
    BudgetError,
    ConflictError,
    NotFoundError,
    PydedupError,
    UnavailableError,
    UnsupportedFormatError,
)

__all__ = ["RETRY_SOON", "HttpError", "bad", "busy", "problem_of"]

#: For clients that were turned away because there was too much to do.
RETRY_SOON = ((b"retry-after", b"1"),)
#: A message repeats no more of what a client sent.
_LONGEST_MESSAGE = 1000


@dataclass(eq=False)
class HttpError(Exception):
    """A request ends with this status and message.

    ``outcome`` is what the metrics call it; ``cause`` is set where the log has more to say.
    """

    status: int
    message: str
    outcome: str
    headers: tuple[tuple[bytes, bytes], ...] = ()
    cause: BaseException | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.message


def bad(where: str, problem: str, status: int = 400) -> HttpError:
    """Return the error of a field of a request, such as ``inputs[0].shape``."""
    return HttpError(status, _short(f"{where}: {problem}"), "bad_request")


def busy(said: str, outcome: str = "unavailable", cause: BaseException | None = None) -> HttpError:
    """Return the error of a request that may be answered if it comes again soon."""
    return HttpError(503, said, outcome, RETRY_SOON, cause)


def problem_of(error: BaseException) -> HttpError:
    """Return what a client gets to know of an exception."""
    if isinstance(error, HttpError):
        return error
    text = _short(str(error) or type(error).__name__)
    if isinstance(error, NotFoundError):
        return HttpError(404, text, "not_found")
    if isinstance(error, (UnavailableError, ConflictError)):
        # Where the database is, and what it says, is for the log.
        said = "the database cannot be reached; try again soon"
        return busy(said, cause=error)
    if isinstance(error, BudgetError) and error.never:
        return HttpError(501, text, "unsupported")
    if isinstance(error, (BudgetError, MemoryError)):
        said = text if isinstance(error, BudgetError) else "not enough memory for this request"
        return busy(said)
    if isinstance(error, ArgumentError):
        return HttpError(400, text, "bad_request")
    if isinstance(error, UnsupportedFormatError):
        return HttpError(501, text, "unsupported")
    if isinstance(error, PydedupError):  # the store itself: damaged, of a newer version
        return HttpError(500, text, "error", cause=error)
    return HttpError(500, "a fault of the server; its log says more", "error", cause=error)


def _short(text: str) -> str:
    # Half of a surrogate pair, which JSON can name, has no bytes in UTF-8.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + "..."
