# SPDX-License-Identifier: Apache-2.0
"""Large files beside the weights, such as tokenizers, are kept in blocks: once, and compressed."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import pydedup
from pydedup import policies
from pydedup.catalog import StoredModel
from pydedup.cli.app import main
from pydedup.graph import Graph, Node

from .damage import change

NAMES = [f"Ġ{hashlib.blake2b(b'%d' % n, digest_size=4).hexdigest()}" for n in range(20_000)]
TOKENIZER = json.dumps(
    {"padding": None, "vocab": {name: n for n, name in enumerate(NAMES)}}
).encode()
PADDED = TOKENIZER.replace(b"null", b'{"length": 128}', 1)
NOISE = np.random.default_rng(3).bytes(100_000)


def weights(seed: int) -> dict[str, np.ndarray[Any, Any]]:
    return {"w": np.random.default_rng(seed).standard_normal((64, 64), np.float32)}


def folder(path: Path, seed: int, **files: bytes) -> Path:
    path.mkdir()
    save_file(weights(seed), path / "model.safetensors")
    for name, content in {"config": b"{}", **files}.items():
        (path / f"{name}.json").write_bytes(content)
    return path


def test_a_tokenizer_is_kept_once(store_url: str, tmp_path: Path) -> None:
    """Each version had all of it: four nights of 1 MiB of weights took 18.5 MiB."""
    with pydedup.open(store_url) as store:
        first = store.add("m", folder(tmp_path / "one", 1, tokenizer=TOKENIZER))
        assert first.stored_bytes < 64 * 64 * 4 + 100
        assert first.artifact_bytes > len(TOKENIZER)
        assert first.stored_artifact_bytes < 0.7 * len(TOKENIZER)
        again = store.add("m", folder(tmp_path / "two", 2, tokenizer=TOKENIZER))
        other = store.add("other", folder(tmp_path / "three", 3, tokenizer=PADDED))
        for report, most in ((again, 1_000), (other, 70_000)):
            assert report.artifact_bytes >= len(TOKENIZER)
            assert report.stored_artifact_bytes < most
            assert (report.blocks, report.shared_blocks) == (1, 0)  # of the tensor
        assert (
            store.artifacts("m@1")
            == store.artifacts("m@2")
            == {
                "config.json": b"{}",
                "tokenizer.json": TOKENIZER,
            }
        )
        assert store.artifacts("other")["tokenizer.json"] == PADDED
        assert store.verify().ok
        assert [info.name for info in store.info("m").tensors] == ["w"]
        assert store.stats().tensors == 3
        (tokenizer,) = store.explain("m").artifacts
        assert tokenizer.tensor.name == "tokenizer.json"
        assert tokenizer.shared_with == ("m@1", "other@1")
        assert list(store.load("m")) == ["w"]
        assert not store.diff("m@1", "m@2").same
        store.remove("m@1")
        store.vacuum()
        assert store.artifacts("other")["tokenizer.json"] == PADDED
        assert store.verify().ok


@pytest.mark.parametrize(
    "policy",
    [
        policies.Exact(),
        policies.Bounded(0.05),
        policies.Accuracy(lambda arrays: float(len(arrays)), max_drop=0.1),
    ],
)
def test_policies_do_not_change_files(policy: Any, tmp_path: Path) -> None:
    """Nor does an evaluation see them."""
    with pydedup.open(tmp_path / "store.db") as store:
        source = folder(tmp_path / "one", 1, tokenizer=TOKENIZER, noise=NOISE)
        store.add("lossless", source)
        report = store.add("m", source, policy=policy)
        assert report.certificate.get("metric_before", 1.0) == 1.0
        for name in ("lossless", "m"):
            assert store.artifacts(name)["tokenizer.json"] == TOKENIZER
            assert store.artifacts(name)["noise.json"] == NOISE
        assert store.verify().ok


def test_a_difference_beside_the_weights_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two versions with other tokenizers nothing was said but that they have the same bits."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    with pydedup.open(url) as store:
        store.add("m", folder(tmp_path / "one", 1, tokenizer=TOKENIZER, old=b"1"))
        store.add("m", folder(tmp_path / "two", 1, tokenizer=PADDED, new=b"2"))
        found = store.diff("m@1", "m@2")
    assert found.same  # of the tensors
    assert {item.name: item.status for item in found.artifacts} == {
        "config.json": "same",
        "new.json": "added",
        "old.json": "removed",
        "pydedup:folder-layout": "same",
        "tokenizer.json": "changed",
    }
    assert main(["diff", url, "m@1", "m@2", "-q"]) == 0
    assert capsys.readouterr().out == (
        "m@1 and m@2: the same bits (1 same)\n"
        "they differ beside the weights: new.json (added), old.json (removed), tokenizer.json "
        "(changed)\n"
    )


@pytest.mark.parametrize("size", [0, 16_383, 16_384, 32_768, 32_769, 700_000])
def test_sizes(size: int, tmp_path: Path) -> None:
    content = (NOISE * 7)[:size]
    source = folder(tmp_path / "one", 1, w=content, tokenizer=bytes(size))
    save_file({**weights(1), "w.json": np.arange(9)}, source / "model.safetensors")
    with pydedup.open(tmp_path / "store.db", memory="2MiB") as store:
        store.add("m", source)
        assert store.artifacts("m")["w.json"] == content  # called as a tensor
        assert store.artifacts("m")["tokenizer.json"] == bytes(size)
        assert np.array_equal(store.load("m")["w.json"], np.arange(9))
        store.export("m", tmp_path / "out")
        assert (tmp_path / "out" / "w.json").read_bytes() == content
        assert store.verify().ok


def test_an_export_takes_the_memory_of_one_file(tmp_path: Path) -> None:
    """All of them were read beforehand, also where none is written."""
    files = {f"f{n}": NOISE[n:] * 20 for n in range(12)}
    together = sum(map(len, files.values()))
    with pydedup.open(tmp_path / "store.db", memory="2MiB") as store:
        store.add("m", folder(tmp_path / "one", 1, **files))
        for target, most in (("m.safetensors", 0.2), ("out", 0.6)):
            tracemalloc.start()
            try:
                store.export("m", tmp_path / target)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert peak < most * together
    for name, content in files.items():
        assert (tmp_path / "out" / f"{name}.json").read_bytes() == content


def test_copies_and_backups_take_them_along(store_url: str, tmp_path: Path) -> None:
    with pydedup.open(store_url) as store:
        store.add("one", folder(tmp_path / "one", 1, tokenizer=TOKENIZER))
        store.add("two", folder(tmp_path / "two", 2, tokenizer=TOKENIZER))
        store.copy_to(tmp_path / "copy.db", "two")
        store.backup(tmp_path / "backup.db")
        assert [model.status for model in store.copy_to(tmp_path / "copy.db").models] == [
            "copied",
            "there",
        ]
        store.remove("one")
        store.restore(tmp_path / "backup.db")
        assert store.artifacts("one")["tokenizer.json"] == TOKENIZER
        assert store.verify().ok
    for name in ("copy.db", "backup.db"):
        with pydedup.open(tmp_path / name) as store:
            assert store.verify().ok
            for model in ("one", "two"):
                assert store.artifacts(model)["tokenizer.json"] == TOKENIZER
            assert store.explain("one").artifacts[0].shared_with == ("two@1",)
            assert store.stats().page_bytes < len(TOKENIZER)


def test_one_with_another_tokenizer_is_another_model(tmp_path: Path) -> None:
    """Their digests name the tensors alone."""
    with pydedup.open(tmp_path / "a.db") as a, pydedup.open(tmp_path / "b.db") as b:
        a.add("m", folder(tmp_path / "one", 1, tokenizer=TOKENIZER))
        b.add("m", folder(tmp_path / "two", 1, tokenizer=TOKENIZER[:-1] + b" "))
        (model,) = a.copy_to(tmp_path / "b.db", on_conflict="replace").models
        assert model.status == "replaced"
        assert b.artifacts("m")["tokenizer.json"] == TOKENIZER


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Adds keep all artifacts in rows, as they did; until `undo`."""
    monkeypatch.setattr("pydedup.ingest.artifacts.LEAST_BYTES", 1 << 40)
    return monkeypatch


def test_one_of_an_older_store_is_the_same_model(older: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There, all of them are in rows."""
    source = folder(tmp_path / "one", 1, tokenizer=TOKENIZER)
    with pydedup.open(tmp_path / "a.db") as store:
        report = store.add("m", source)
        assert report.stored_artifact_bytes == report.artifact_bytes
    older.undo()
    with pydedup.open(tmp_path / "b.db") as b, pydedup.open(tmp_path / "a.db") as a:
        b.add("m", source)
        assert a.artifacts("m") == b.artifacts("m")
        for target, end in ((b, "a.db"), (a, "b.db")):
            assert target.restore(tmp_path / end).models[0].status == "there"


def test_copies_of_older_stores_have_them_in_blocks(
    older: pytest.MonkeyPatch, store_url: str, tmp_path: Path
) -> None:
    """They kept each of them whole, for ever."""
    paths = [
        folder(tmp_path / "one", 1, tokenizer=TOKENIZER, noise=NOISE),
        folder(tmp_path / "two", 2, tokenizer=TOKENIZER),
        folder(tmp_path / "three", 3, tokenizer=PADDED),
    ]
    with pydedup.open(tmp_path / "old.db") as old:
        for number, path in enumerate(paths):
            old.add(f"m{number}", path)
        wanted = {info.name: old.artifacts(info.name) for info in old.models()}
        older.undo()
        assert [model.status for model in old.copy_to(store_url).models] == 3 * ["copied"]
        old.backup(tmp_path / "backup.db")
        assert {model.status for model in old.copy_to(store_url).models} == {"there"}
    for url in (store_url, tmp_path / "backup.db"):
        with pydedup.open(url) as store:
            assert {info.name: store.artifacts(info.name) for info in store.models()} == wanted
            assert store.verify().ok
            artifacts = {item.tensor.name: item for item in store.explain("m0").artifacts}
            assert artifacts.keys() == {"tokenizer.json", "noise.json"}
            assert artifacts["tokenizer.json"].shared_with == ("m1@1", "m2@1")
            assert store.stats().page_bytes < len(TOKENIZER) + 200_000
            again = store.add("m0", paths[0])
            assert (again.stored_bytes, again.stored_artifact_bytes < 2_000) == (0, True)


LARGE_GRAPH = Graph(
    ("x",),
    ("y",),
    (
        Node("linear", ("x",), "h0", {"weight": "w"}),
        *(Node("relu", (f"h{n}",), f"h{n + 1}") for n in range(300)),
        Node("relu", ("h300",), "y"),
    ),
)


@pytest.mark.parametrize("origin", ["store", "folder", "older store"])
def test_a_damaged_page_is_repaired(
    origin: str, older: pytest.MonkeyPatch, store_url: str, tmp_path: Path
) -> None:
    """From a store of before, that has files in rows; and graphs of a file, not files alone."""
    source = folder(tmp_path / "one", 1, tokenizer=TOKENIZER)
    (source / "pydedup_graph.json").write_text(LARGE_GRAPH.to_json())
    if origin == "older store":
        with pydedup.open(tmp_path / origin) as store:
            store.add("m", source)
    older.undo()
    with pydedup.open(store_url) as store:
        store.add("m", source)
        store.copy_to(tmp_path / "store")
        wanted = store.artifacts("m")
    change(store_url, "UPDATE {pages} SET payload = ?", b"damaged" * 100)
    with pydedup.open(store_url) as store:
        report = store.verify()
        assert report.damaged_pages
        assert not any("not what it was added with" in said for said in report.errors)
        with pytest.raises(pydedup.errors.CorruptStoreError, match="page 1"):
            store.artifacts("m")
        assert store.verify(repair_from=source if origin == "folder" else tmp_path / origin).ok
        assert store.artifacts("m") == wanted
        assert store.predict("m", np.ones((1, 64), np.float32)).shape == (1, 64)


def test_blocks_that_a_vacuum_moved(tmp_path: Path) -> None:
    """A model that was met before knows where they were."""
    with pydedup.open(tmp_path / "store.db") as store, pydedup.open(tmp_path / "store.db") as other:
        for number in range(4):
            content = TOKENIZER if number == 3 else NOISE[number:] * 3
            store.add(f"m{number}", folder(tmp_path / f"{number}", number, tokenizer=content))
        assert other.artifacts("m3")["tokenizer.json"] == TOKENIZER
        for number in range(3):
            store.remove(f"m{number}")
        assert store.vacuum(grace_seconds=0).freed_pages
        other._pool.clear()
        assert other.artifacts("m3")["tokenizer.json"] == TOKENIZER


def test_a_large_graph(tmp_path: Path) -> None:
    """Also where nothing but it is read, as by what plans a scoring."""
    assert len(LARGE_GRAPH.to_json()) > 16_384
    x = np.ones((3, 64), np.float32)
    with pydedup.open(tmp_path / "store.db") as store:
        store.add("m", weights(1), graph=LARGE_GRAPH)
        assert np.allclose(store.predict("m", x), np.maximum(x @ weights(1)["w"].T, 0), atol=1e-4)
        (row,) = store._adapter.models()
        assert StoredModel(store._adapter, row).graph() == LARGE_GRAPH


def test_versions_with_the_same_layers_have_one_graph(store_url: str) -> None:
    """Parsed, it is most of what is kept of a version: a server of many kept one for each."""
    with pydedup.open(store_url) as store:
        store.add("a", weights(1), graph=LARGE_GRAPH)
        store.add("a", weights(2), graph=LARGE_GRAPH)
        store.add("b", weights(3), graph=Graph(("x",), ("x",), ()))
        first, second, other = (
            StoredModel(store._adapter, row)
            for row in sorted(store._adapter.models(), key=lambda r: r.id)
        )
        assert first.graph() is second.graph() == LARGE_GRAPH
        assert other.graph() != first.graph()
        assert first.layers_key == second.layers_key != other.layers_key


def image(count: int, seed: int = 5) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def test_what_does_not_compress_takes_its_size(store_url: str, tmp_path: Path) -> None:
    """It took 7 % more: what fills up chunks."""
    with pydedup.open(store_url) as store:
        for number, count in enumerate((1 << 20, 9_876_543)):
            content = image(count, number)
            source = folder(tmp_path / f"of{count}", number, image=content)
            report = store.add(f"m{number}", source)
            # The last chunk is filled up as well.
            assert report.stored_artifact_bytes < 1.005 * count + 32 * 1024
            assert store.add("again", source).stored_artifact_bytes < 1_000
            assert store.artifacts(f"m{number}")["image.json"] == content
        assert store.verify().ok


def test_noise_of_which_more_was_put_in_shares_what_is_far_behind(tmp_path: Path) -> None:
    content = image(24 << 20)
    with pydedup.open(tmp_path / "store.db") as store:
        store.add("m", folder(tmp_path / "one", 1, image=content))
        report = store.add("m", folder(tmp_path / "two", 1, image=b"more" + content))
        assert report.stored_artifact_bytes < 0.7 * len(content)
        report = store.add("m", folder(tmp_path / "three", 1, image=content + b"more"))
        assert report.stored_artifact_bytes < 100_000


@pytest.mark.parametrize("is_newer_there", [False, True])
def test_noise_that_an_older_add_stored_is_shared(
    is_newer_there: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = folder(tmp_path / "one", 1, image=image(3 << 20))
    with pydedup.open(tmp_path / "store.db") as store:
        monkeypatch.setattr("pydedup.ingest.artifacts.is_noise", lambda payload: False)
        store.add("older", source)
        monkeypatch.undo()
        if is_newer_there:  # both are: one of them goes
            with pydedup.open(tmp_path / "other.db") as other:
                other.add("newer", source)
                other.copy_to(tmp_path / "store.db")
            store.remove("older")
            store.vacuum()
        assert store.add("m", source).stored_artifact_bytes < 2_000
        assert store.artifacts("m")["image.json"] == image(3 << 20)


def test_damaged_blocks_of_noise_are_found_in_the_folder(tmp_path: Path) -> None:
    source = folder(tmp_path / "one", 1, image=image(3 << 20))
    path = tmp_path / "store.db"
    with pydedup.open(path) as store:
        store.add("m", source)
    change(f"sqlite:///{path}", "UPDATE {pages} SET payload = ? WHERE id = 2", b"gone")
    with pydedup.open(path) as store:
        assert not store.verify().ok
        store.verify(repair_from=source)
        assert store.verify().ok
        assert store.artifacts("m")["image.json"] == image(3 << 20)
