# SPDX-License-Identifier: Apache-2.0
"""Pages with the checksums that their rows record: what is read may be sound, and another page.

So may the row: of each page that it reads, a model has a tag in its certificate.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from pydedup.adapter import LIVE, RETIRED, Adapter
from pydedup.adapter_options import RecordedPagesAdapter, only_sound_rows
from pydedup.catalog.rows import recorded_certificate
from pydedup.certificates import PAGES
from pydedup.errors import CorruptStoreError, UnavailableError
from pydedup.pool import PagePool
from pydedup.sets import in_parts

__all__ = [
    "TAG_BYTES",
    "another_store",
    "expect_pages",
    "page_tags",
    "recorded_pages",
    "tags_in",
    "tags_of",
]

#: So many bytes of a page's checksum, from the first on, are its tag.
TAG_BYTES: Final = 3


def recorded_pages(
    adapter: Adapter,
) -> Callable[[Sequence[int]], Iterator[tuple[int, bytes, bytes]]]:
    """Return what reads pages as `RecordedPagesAdapter.read_recorded_pages` does."""
    if isinstance(adapter, RecordedPagesAdapter):
        return adapter.read_recorded_pages

    def read(ids: Sequence[int]) -> Iterator[tuple[int, bytes, bytes]]:
        checksums = {row.id: row.checksum for row in adapter.page_rows(ids=ids)}
        for page_id, payload in adapter.read_pages(ids):
            if page_id in checksums:  # else it was added in between
                yield page_id, checksums[page_id], payload

    return read


def tags_of(adapter: Adapter, page_ids: Sequence[int]) -> dict[int, bytes]:
    """Return the tags of those pages whose rows are there."""
    if not page_ids:
        return {}
    with only_sound_rows(adapter):
        return {row.id: row.checksum[:TAG_BYTES] for row in adapter.page_rows(ids=page_ids)}


def expect_pages(pool: PagePool, adapter: Adapter, tags: Mapping[int, bytes]) -> None:
    """Let a pool refuse other pages than those that a model was recorded to read.

    Raises UnavailableError where other pages were recorded under these ids before: ids are given
    once, so the tables went back to what they were earlier, and what is in memory is of pages that
    are no more. Where the row of a page does not say so, it is the record that is damaged; where a
    model still has the other one recorded, that is.
    """

    def there() -> list[int]:
        with only_sound_rows(adapter):
            return adapter.page_ids(LIVE) + adapter.page_ids(RETIRED)

    others = pool.expect(tags, there)
    now = tags_of(adapter, others)
    others = [page_id for page_id in others if now.get(page_id) == tags[page_id]]
    if not others:
        return
    before = {page_id: pool.expected(page_id) for page_id in others}
    if not _are_recorded(adapter, before):
        raise another_store(adapter, pool)
    pool.expect_instead({page_id: tags[page_id] for page_id in others})


def _are_recorded(adapter: Adapter, tags: Mapping[int, bytes]) -> bool:
    """Whether models that are there have each of these recorded of a page that they read."""
    left = dict(tags)
    for model_id in sorted({model_id for model_id, _ in adapter.readers_of(list(tags))}):
        row = adapter.model(model_id)
        with contextlib.suppress(CorruptStoreError):
            known = tags_in(recorded_certificate(row).get(PAGES)) if row is not None else {}
            left = {page_id: tag for page_id, tag in left.items() if known.get(page_id) != tag}
    return not left


def another_store(adapter: Adapter, pool: PagePool | None) -> UnavailableError:
    """Return the error that what was read is not of the tables as they are now.

    It is noted in the pool, whose pages are those of before.
    """
    if pool is not None:
        pool.outdated = True
    return UnavailableError(
        f"{adapter.url} is another store than the one that was opened: its tables were made anew, "
        "or restored to what they were earlier; open it again"
    )


def page_tags(tags: Mapping[int, bytes]) -> dict[str, str]:
    """Return the tags of pages as a certificate has them: by the first of a run of ids, in base64.

    That is 4 characters for each page, which is a megabyte.
    """
    runs: dict[int, list[bytes]] = {}
    first = end = -1
    for page_id in sorted(tags):
        if page_id != end:
            first = page_id
        runs.setdefault(first, []).append(tags[page_id])
        end = page_id + 1
    return {str(at): base64.b64encode(b"".join(run)).decode() for at, run in runs.items()}


def tags_in(recorded: object) -> dict[int, bytes]:
    """Return what `page_tags` was made of; nothing where that is not known, or damaged."""
    tags: dict[int, bytes] = {}
    try:
        for first, run in dict(recorded or {}).items():  # type: ignore[call-overload]
            known = base64.b64decode(run)
            tags.update(enumerate(in_parts(known, TAG_BYTES), int(first)))
    except (TypeError, ValueError):
        return {}
    return tags
