# SPDX-License-Identifier: Apache-2.0
"""What people who know the command line, numpy or torch give to `Store` at first.

Each of these was an AttributeError, IndexError or TypeError from within, or something else than
what was meant.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pydedup
import pydedup.sql
from pydedup.config import LEAST_MEMORY
from pydedup.errors import ArgumentError
from pydedup.graph import Graph, Node
from pydedup.layout import PAGE_BYTES
from pydedup.opening import pool_bytes
from pydedup.policies import Bounded, Exact

MODEL = {"w": np.arange(6000.0, dtype=np.float32).reshape(60, 100)}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    """A store with one model, which nothing here changes; not typed, as those who err are not."""
    with pydedup.open(f"sqlite:///{tmp_path / 'store.db'}") as opened:
        opened.add("good", MODEL)
        yield opened
        assert [info.address for info in opened.models()] == ["good@1"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda store: store.add("m", MODEL, policy="exact"), r"'exact' is no policy; give one of"),
        (lambda store: store.add("m", MODEL, policy=""), "'' is no policy"),
        (lambda store: store.add("m", MODEL, policy=Exact), r"Exact'> is no policy.*Exact\(\)"),
        (lambda store: store.add("m", MODEL, policy=Bounded), "is no policy"),
        (lambda store: store.add("m", MODEL, graph=[{"op": "linear"}]), r"Graph, not list"),
        (lambda store: store.add("m", MODEL, graph="{}"), r"not str; Graph\.from_json"),
        (lambda store: store.add("m", MODEL, metadata="acme"), "metadata 'acme' is no mapping"),
        (lambda store: store.add("m", {}), "the given mapping has no tensors to store as 'm'"),
        (lambda store: store.add_many([("m", MODEL)]), "mapping of names to sources.* not list"),
        (lambda store: store.predict_many([3]), "pair of a model and its input, not 3"),
        (lambda store: store.predict_many(5), "pairs of a model and its input, not 5"),
        (lambda store: store.tensor("good", None), "tensor's name must be a string, not None"),
        (lambda store: store.predict_many({"ab": 1}), "pair of a model and its input, not 'ab'"),
        (lambda store: store.verify(evaluate=len), "mapping of models to metrics.* not builtin"),
        (lambda store: store.report(models=5), "models must be names of models, or one, not 5"),
        (lambda store: pydedup.open("m.db", replacement=["lru"]), "unknown replacement policy"),
        (
            lambda store: pydedup.open("\ud800.db"),
            "is no text that can name a store",
        ),
    ],
)
def test_what_is_of_the_wrong_kind_is_named(
    store: Any, call: Callable[[Any], object], says: str
) -> None:
    with pytest.raises(ArgumentError, match=says):
        call(store)


@pytest.mark.parametrize("name", ["m.safetensors", "told.safetensors", "m.npz", "m.pt", "folder"])
def test_a_file_without_tensors_is_no_model(store: Any, tmp_path: Path, name: str) -> None:
    """A dict without any was refused, and such a file, or one that tells of itself, stored."""
    torch = pytest.importorskip("torch")
    numpy_files = pytest.importorskip("safetensors.numpy")
    numpy_files.save_file({}, tmp_path / "m.safetensors")
    np.savez(tmp_path / "m.npz")
    torch.save({}, tmp_path / "m.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "bert"}')
    for told in ("told.safetensors", "folder/model.safetensors"):
        numpy_files.save_file({}, tmp_path / told, metadata={"format": "pt"})
    with pytest.raises(ArgumentError, match=rf"/{name} has no tensors to store as 'm'"):
        store.add("m", tmp_path / name)


@pytest.mark.parametrize("path", [None, 7, b"x.npz", ["x"], "x\0.npz", "\ud800.npz"])
def test_what_is_no_path_is_named(store: Any, path: Any) -> None:
    """These were TypeError, ValueError and UnicodeEncodeError, from somewhere below."""
    for call in (
        lambda: store.export("good", path),
        lambda: store.backup(path),
        lambda: store.restore(path),
    ):
        with pytest.raises(ArgumentError, match=r"^path must be the path of a file, not "):
            call()
    if path is not None:
        with pytest.raises(ArgumentError, match=r"^path must be the path of a file, not "):
            store.report(path)
        with pytest.raises(ArgumentError, match=r"^repair_from must be the path of a file, not "):
            store.verify(repair_from=path)


@pytest.mark.parametrize("value", [["good"], {}, b"good", object(), "good\0"])
def test_what_is_of_another_type_is_named(store: Any, value: Any) -> None:
    """These were TypeError, AttributeError and RuntimeError, and 1 no version though there is 1."""
    for call, said in (
        (lambda: store.add(value, MODEL), "(a )?model"),
        (lambda: store.alias("good", "prod", value), "version"),
        (lambda: store.alias("good", "prod", 1), "version must be a string, got int; write '1'"),
        (lambda: store.vacuum(grace_seconds=value), "grace_seconds must be seconds"),
        (lambda: store.vacuum(grace_seconds=float("nan"), dry_run=True), "grace_seconds must be"),
        (lambda: store.vacuum(lease_seconds=value), "lease_seconds must be seconds"),
        (lambda: store.vacuum(lease_seconds=-1), "lease_seconds must be seconds"),
        (lambda: store.record(value), "max_uses must be"),
        (lambda: store.report(trace=value), r"trace must be a pydedup.replacement.Trace"),
    ):
        with pytest.raises(ArgumentError, match=f"^{said}"):
            call()
    if not isinstance(value, str):
        with pytest.raises(ArgumentError, match=r"^by must be a key of metadata"):
            store.stats(by=value)
        with pytest.raises(ArgumentError, match=r"^model must be a string"):
            store.score("SELECT 1", value, into="t")


def test_progress_that_cannot_be_called_is_named(store: Any, tmp_path: Path) -> None:
    """The work began, and ended in a TypeError where it was first to be told of."""
    for call in (
        lambda: store.add("m", MODEL, progress=5),
        lambda: store.add_many({"m": MODEL}, progress=5),
        lambda: store.export("good", tmp_path / "x.npz", progress=5),
        lambda: store.diff("good", "good", progress=5),
        lambda: store.verify(progress=5),
        lambda: store.vacuum(progress=5),
        lambda: store.refill(progress=5),
        lambda: store.copy_to(tmp_path / "other.db", progress=5),
        lambda: store.backup(tmp_path / "x.backup", progress=5),
        lambda: store.restore(tmp_path / "store.db", progress=5),
        lambda: store.score("SELECT 1", "good", into="t", progress=5),
    ):
        with pytest.raises(ArgumentError, match=r"^progress must be a function of .*, not 5$"):
            call()
    assert [path.name for path in tmp_path.glob("[!s]*")] == []


def test_a_device_that_torch_lacks_is_named(store: Any) -> None:
    pytest.importorskip("torch")
    with pytest.raises(ArgumentError, match="device 'abacus' is none that torch has here"):
        store.load_torch("good", device="abacus")
    assert store.load_torch("good", device="meta")["w"].shape == (60, 100)


@pytest.mark.parametrize("call", [pydedup.open, pydedup.Store.replace_lost])
@pytest.mark.parametrize("nothing", [None, 3])
def test_what_is_no_store_is_named(nothing: Any, call: Callable[[Any], object]) -> None:
    with pytest.raises(ArgumentError, match=f"{nothing} is no store; give a URL such as"):
        call(nothing)


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+shards", "mysql", "sqlite"])
@pytest.mark.parametrize("schema", [3, "\ud800"])
def test_what_is_no_schema_is_named(scheme: str, schema: Any) -> None:
    with pytest.raises(ArgumentError, match=re.escape(f"schema must be a text, not {schema!r}")):
        pydedup.open(f"{scheme}://host/db|host/db", schema=schema)


def test_names_to_copy_are_gone_through_as_they_come(store: Any, tmp_path: Path) -> None:
    """An iterator was at its end when the copying began, and nothing was copied."""
    target = tmp_path / "target.db"
    with pytest.raises(ArgumentError, match="names must be names of models, or one, not 3"):
        store.copy_to(target, 3)
    assert not target.exists()
    assert store.copy_to(target, (name for name in ["good"])).copied == 1


@pytest.mark.parametrize("memory", [1, "2047KiB"])
def test_a_budget_below_two_pages_is_refused(memory: Any, tmp_path: Path) -> None:
    """It was found out by the first request, which got an error about a page."""
    path = tmp_path / "new.db"
    with pytest.raises(ArgumentError, match="is too little memory for a store: give 2MiB or more"):
        pydedup.open(path, memory=memory)
    assert not path.exists()
    assert pool_bytes(LEAST_MEMORY) == 2 * PAGE_BYTES


def test_what_is_printed_of_a_store(tmp_path: Path) -> None:
    with pydedup.open(tmp_path / "store.db") as store:
        assert repr(store) == f"<pydedup.Store {store.url}>"
        assert repr(store.quotas) == f"<pydedup.quotas.Quotas of {store.url}>"
        with contextlib.closing(sqlite3.connect(tmp_path / "store.db")) as connection:
            functions = pydedup.sql.register(connection)
            shown = f"SqlFunctions of <pydedup.Store {store.url}>, last_error=None>"
            assert repr(functions) == f"<pydedup.sql.{shown}"
    assert repr(store) == f"<pydedup.Store {store.url}, closed>"


def test_a_connection_that_is_closed_is_told(tmp_path: Path) -> None:
    with pydedup.open(tmp_path / "store.db") as store:
        connection = sqlite3.connect(tmp_path / "store.db")
        connection.close()
        for more in ((), (store,)):
            with pytest.raises(ArgumentError, match=r"cannot be used here: .* closed"):
                pydedup.sql.register(connection, *more)


def test_tensors_of_torch_are_inputs(store: pydedup.Store, tmp_path: Path) -> None:
    """Those that numpy does not read, too; what has no elements to read is told."""
    torch = pytest.importorskip("torch")
    graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
    x = torch.arange(200, dtype=torch.float32).reshape(2, 100)
    with pydedup.open(tmp_path / "linear.db") as linear:
        linear.add("m", MODEL, graph=graph)
        wanted = linear.predict("m", x.numpy())
        for given in (x, x.clone().requires_grad_(), x.bfloat16(), x.double().requires_grad_()):
            np.testing.assert_allclose(linear.predict("m", given), wanted, rtol=1e-6)
            np.testing.assert_allclose(linear.predict("m", {"x": given})["y"], wanted, rtol=1e-6)
        for wrong, says in (
            (x.to("meta"), r"without data \(meta\); load its values first"),
            (x.to_sparse(), "torch.sparse_coo; convert it to a dense tensor"),
        ):
            with pytest.raises(ArgumentError, match=f"x is {says}"):
                linear.predict("m", wrong)
        weight = linear.tensor("m", "w")
        with pytest.raises(ArgumentError, match=r"x does not make an array.*detach"):
            weight.matmul(x.clone().requires_grad_())


def test_masked_inputs_are_refused(tmp_path: Path) -> None:
    """What is under the mask was taken for an input; a mask that masks nothing is none."""
    graph = Graph(("x",), ("y",), (Node("linear", ("x",), "y", {"weight": "w"}),))
    x = np.ma.masked_greater(np.arange(200, dtype=np.float32).reshape(2, 100), 198)
    with pydedup.open(tmp_path / "linear.db") as store:
        store.add("m", MODEL, graph=graph)
        for call in (
            lambda: store.predict("m", x),
            lambda: store.predict("m", {"x": x}),
            lambda: store.tensor("m", "w").matmul(x),
        ):
            with pytest.raises(
                ArgumentError, match=r"x'? has masked elements, which are lost; fill"
            ):
                call()
        (told,) = store.predict_many([("m", x)])
        assert isinstance(told, ArgumentError)
        assert np.array_equal(store.predict("m", x[:1]), store.predict("m", x.data[:1]))


def test_nothing_to_add_is_nothing(store: pydedup.Store) -> None:
    assert store.add_many({}) == []


def test_one_name_is_a_list_of_one(store: pydedup.Store, tmp_path: Path) -> None:
    """It was taken for a list of its letters."""
    report = store.copy_to(f"sqlite:///{tmp_path / 'other.db'}", "good")
    assert [model.model for model in report.models] == ["good@1"]
    pytest.importorskip("jinja2")
    assert "good@1" in store.report(models="good")


def test_dtypes_of_numpy_and_their_names_are_taken(store: pydedup.Store) -> None:
    for dtype in ("f16", "float16", np.float16, np.dtype("float16"), np.dtype(">f2")):
        assert store.load("good", dtype)["w"].dtype == np.float16, dtype
    for dtype in ("bf16", "bfloat16", ml_dtypes.bfloat16):
        assert store.load("good", dtype)["w"].dtype == ml_dtypes.bfloat16, dtype
    for wrong in (np.int8, "uint8", bool, object, 3):
        with pytest.raises(ArgumentError, match="choose one of: f64, f32, f16, bf16, f8_e4m3"):
            store.load("good", wrong)


def test_dtypes_of_torch_are_taken(store: pydedup.Store) -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float16, torch.half, "float16", np.float16):
        assert store.load_torch("good", dtype)["w"].dtype == torch.float16, dtype
    assert store.load_torch("good", torch.bfloat16)["w"].dtype == torch.bfloat16
    with pytest.raises(ArgumentError, match="'int8'; choose one of: f64"):
        store.load_torch("good", torch.int8)
