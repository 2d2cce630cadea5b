# SPDX-License-Identifier: Apache-2.0
"""The read side of the tables: addresses to models, models to tensors and block maps.

``catalog`` finds models, ``model`` is one of them, ``digests`` names what it holds, ``rows`` makes
what users see of the rows of tables, and ``pages`` reads pages as they are recorded. Not here:
adding and publishing (`pydedup.ingest`).
"""

from __future__ import annotations

from pydedup.catalog.ahead import ModelsAhead
from pydedup.catalog.aliases import aliases_of, point_alias, recorded_aliases, wrong_aliases
from pydedup.catalog.catalog import Catalog
from pydedup.catalog.chunks import chunk_lengths, joined_chunks, laid_out
from pydedup.catalog.digests import (
    ModelDigest,
    map_digest,
    tensors_digest,
    with_other_maps,
)
from pydedup.catalog.model import SourceHashes, StoredModel, grid_of
from pydedup.catalog.pages import (
    TAG_BYTES,
    another_store,
    page_tags,
    recorded_pages,
    tags_in,
    tags_of,
)
from pydedup.catalog.parsed import ParsedMaps
from pydedup.catalog.rows import (
    ARTIFACT_DTYPE,
    added_as,
    artifact_digests,
    certificate_of,
    check_row,
    known_versions,
    model_info,
    page_readers,
    recorded_object,
    taken_versions,
    version_of,
    with_recorded,
)

__all__ = [
    "ARTIFACT_DTYPE",
    "TAG_BYTES",
    "Catalog",
    "ModelDigest",
    "ModelsAhead",
    "ParsedMaps",
    "SourceHashes",
    "StoredModel",
    "added_as",
    "aliases_of",
    "another_store",
    "artifact_digests",
    "certificate_of",
    "check_row",
    "chunk_lengths",
    "grid_of",
    "joined_chunks",
    "known_versions",
    "laid_out",
    "map_digest",
    "model_info",
    "page_readers",
    "page_tags",
    "point_alias",
    "recorded_aliases",
    "recorded_object",
    "recorded_pages",
    "tags_in",
    "tags_of",
    "taken_versions",
    "tensors_digest",
    "version_of",
    "with_other_maps",
    "with_recorded",
    "wrong_aliases",
]
