# SPDX-License-Identifier: Apache-2.0
"""What a certificate records of a model, computed anew from its rows as docs/format.md says."""

from __future__ import annotations

import base64
import hashlib
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

import pydedup

PARTS = (
    "SELECT payload FROM pydedup_block_maps WHERE model_id = ? AND ordinal = ? ORDER BY part",
    "SELECT payload FROM pydedup_source_hashes WHERE model_id = ? AND ordinal = ? ORDER BY part",
)


def b2(payload: bytes, size: int = 16) -> bytes:
    return hashlib.blake2b(payload, digest_size=size).digest()


def test_what_the_format_document_says_of_digests(tmp_path: Path) -> None:
    path = tmp_path / "models.db"
    rng = np.random.default_rng(0)
    model = {
        'a "name" ż': rng.standard_normal((130, 70)),
        "stack": rng.standard_normal((2, 128, 128)).astype("f4"),
        "scalar": np.float32(1),
        "empty": np.empty((3, 0), np.int64),
    }
    with pydedup.open(f"sqlite:///{path}") as store:
        store.add("a@1", model, metadata={"ż": 1})
        store.add("a@2", {**model, "stack": model["stack"] * np.float32(1.001)})
        store.alias("a", "prod", "2")

    with closing(sqlite3.connect(path)) as db:

        def rows(sql: str, *values: object) -> Sequence[Any]:
            return db.execute(sql, values).fetchall()

        models = rows("SELECT id, name, version, certificate, metadata, digest FROM pydedup_models")
        assert len(models) == 2
        for model_id, name, version, certificate, metadata, digest in models:
            heads = contents = maps = b""
            for ordinal, *head, shape, block_shape in rows(
                "SELECT ordinal, name, dtype, shape, block_shape FROM pydedup_tensors"
                " WHERE model_id = ? ORDER BY ordinal",
                model_id,
            ):
                block_map, hashes = (
                    b"".join(part for (part,) in rows(parts, model_id, ordinal)) for parts in PARTS
                )
                named = json.dumps([*head, json.loads(shape), json.loads(block_shape)]).encode()
                heads += named
                contents += named + hashes
                maps += base64.b64encode(b2(block_map, 6))
            checksums = dict(
                rows(
                    "SELECT id, checksum FROM pydedup_pages JOIN pydedup_model_pages"
                    " ON page_id = id WHERE model_id = ?",
                    model_id,
                )
            )
            recorded = json.loads(certificate)
            tags = {
                int(first) + at // 3: run[at : at + 3]
                for first, run in (
                    (first, base64.b64decode(text)) for first, text in recorded["pages"].items()
                )
                for at in range(0, len(run), 3)
            }
            assert recorded["address"] == f"{name}@{version}"
            assert recorded["tensors"] == b2(heads).hex()
            assert digest == b2(contents)
            assert recorded["maps"] == maps.decode()
            assert recorded["metadata"] == b2(metadata.encode()).hex()
            assert tags == {page_id: checksum[:3] for page_id, checksum in checksums.items()}
            assert recorded["aliases"] == (["prod"] if version == "2" else [])
