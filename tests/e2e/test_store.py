# SPDX-License-Identifier: Apache-2.0
"""The store as its users see it: in, out, names, sharing, upkeep."""

from __future__ import annotations

import json
import sqlite3
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pydedup
from pydedup import policies
from pydedup.errors import ArgumentError, DuplicateError, NotFoundError, PydedupError

from .damage import change


def variants(count: int, rows: int = 4000, cols: int = 50) -> dict[str, dict[str, np.ndarray]]:
    """A base table and copies of it with some rows changed, as sparse fine-tunes have it."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((rows, cols)).astype(np.float32)
    models = {}
    for number in range(count):
        mine = table.copy()
        changed = rng.choice(rows // 4, rows // 40, replace=False)
        mine[changed] += 0.1
        head = rng.standard_normal((5, cols)).astype(np.float32)
        models[f"tenant-{number}"] = {
            "embedding": mine,
            "head.weight": head,
            "head.bias": head[:, 0].copy(),
        }
    return models


def assert_same(loaded: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert list(loaded) == list(wanted)
    for name, array in wanted.items():
        array = np.asarray(array)
        assert loaded[name].dtype == array.dtype, name
        assert loaded[name].shape == array.shape, name
        assert loaded[name].tobytes() == array.tobytes(), name


def test_every_dtype_and_shape_comes_back_bit_for_bit(store: pydedup.Store) -> None:
    rng = np.random.default_rng(3)
    dtypes = [
        np.float64,
        np.float32,
        np.float16,
        ml_dtypes.bfloat16,
        np.int8,
        np.int16,
        np.int32,
        np.int64,
        np.uint8,
        np.uint16,
        np.uint32,
        np.uint64,
        np.bool_,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
    ]
    shapes = [
        (),
        (1,),
        (7,),
        (0,),
        (3, 0),
        (0, 5),
        (65, 67),
        (130, 1),
        (1, 9000),
        (3, 4, 5),
        (2, 3, 1, 7, 2),
    ]
    model = {}
    for dtype in dtypes:
        for shape in shapes:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            data = rng.integers(0, 256, size, np.uint8)
            if dtype is np.bool_:
                data &= 1
            model[f"{np.dtype(dtype).name}/{'x'.join(map(str, shape))}"] = data.view(dtype).reshape(
                shape
            )
    model["nan"] = np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324])
    store.add("zoo", model)
    assert_same(store.load("zoo"), model)
    assert store.verify().errors == []


def test_loading_to_a_dtype_converts_what_is_of_floating_point(store: pydedup.Store) -> None:
    arrays = {"w": np.array([[1.5, -2.25, 1e30]], np.float32), "ids": np.arange(3)}
    store.add("m", arrays)
    half = store.load("m", "f16")
    assert half["w"].dtype == np.float16
    assert half["w"].tolist() == [[1.5, -2.25, np.inf]]
    assert half["ids"].dtype == arrays["ids"].dtype
    assert str(store.load("m", "bf16")["w"].dtype) == "bfloat16"
    with pytest.raises(ArgumentError, match="no dtype of floats 'int8'"):
        store.load("m", "int8")
    with pytest.raises(ArgumentError, match="float99"):
        store.load("m", "float99")


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("f8", 0x7FF0000000000001), ("f4", 0x7F800001), ("f2", 0x7C01), (ml_dtypes.bfloat16, 0x7F81)],
)
def test_signalling_nans_are_converted_without_a_warning(
    store: pydedup.Store, dtype: Any, bits: int
) -> None:
    """Numpy warned of them in a load, a product, and an add of what is near in another dtype."""
    weight = np.random.default_rng(0).standard_normal((64, 64))
    odd = weight.astype(dtype)
    odd.view(f"u{odd.itemsize}")[0, 0] = bits
    for number, other in enumerate((np.float64, np.float32, np.float16, ml_dtypes.bfloat16)):
        store.add(f"near@{number}", {"w": weight.astype(other)})
    store.add("m", {"w": odd})
    store.add("tuned", {"w": (weight * 1.001).astype(np.float16)})
    assert store.load("m")["w"].tobytes() == odd.tobytes()
    for wanted in ("f64", "f32", "f16", "bf16", "f8_e4m3"):
        loaded = store.load("m", wanted)["w"]
        with np.errstate(invalid="ignore"):
            assert np.isnan(loaded).sum() == 1
    x = np.ones((1, 64))
    x.view(np.uint64)[0, 0] = 0x7FF0000000000001
    assert np.isnan(store.tensor("near@1", "w").matmul(x)).all()


def test_block_shapes_do_not_change_what_comes_back(store: pydedup.Store) -> None:
    model = {"w": np.random.default_rng(0).standard_normal((100, 70)).astype(np.float32)}
    for number, shape in enumerate([(1, 1), (7, 3), (64, 64), (100, 70), (1000, 1000)]):
        store.add(f"m{number}", model, block_shape=shape)
        assert_same(store.load(f"m{number}"), model)
    assert store.verify().errors == []


def test_variants_share_what_they_have_in_common(store: pydedup.Store) -> None:
    models = variants(5)
    reports = store.add_many(models, policy=policies.Exact())
    logical = sum(report.logical_bytes for report in reports)
    assert sum(report.stored_bytes for report in reports) < 0.55 * logical
    assert store.stats().page_bytes < 0.6 * logical
    for name, model in models.items():
        assert_same(store.load(name), model)
        info = store.info(name)
        assert info.read_amplification <= 2.0
    again = store.add("tenant-0", models["tenant-0"])
    assert again.model == "tenant-0@2"
    assert (again.stored_bytes, again.pages, again.shared_blocks) == (0, 0, again.blocks)
    assert store.diff("tenant-0@1", "tenant-0@2").same


def test_joint_layout_keeps_stored_pages_at_the_bound(store: pydedup.Store) -> None:
    reports = store.add_many(variants(6, rows=20000), policy=policies.Exact())
    stats = store.stats()
    assert sum(report.pages for report in reports) == stats.pages
    payload = stats.page_bytes / stats.pages
    assert payload > 0.9 * 1024 * 1024 or stats.pages <= 2
    worst = max(store.info(info.address).read_amplification for info in store.models())
    assert worst <= 1.5


def test_tied_and_equal_tensors_are_stored_once(store: pydedup.Store) -> None:
    weight = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32)
    report = store.add(
        "tied", {"in": weight, "out": weight, "copy": weight.copy()}, policy=policies.Exact()
    )
    assert report.stored_bytes == weight.nbytes
    assert report.shared_blocks == report.blocks * 2 // 3
    assert_same(store.load("tied"), {"in": weight, "out": weight, "copy": weight})


def test_equal_bytes_of_another_dtype_are_not_confused(store: pydedup.Store) -> None:
    """Their hash is the same, so several blocks are looked at before one fits, or none does."""
    numbers = np.random.default_rng(0).integers(0, 1 << 30, (64, 128), np.int32)
    whole = {dtype: numbers.view(dtype) for dtype in ("float32", "int32", "uint32")}
    store.add("one", {"f": whole["float32"]}, policy=policies.Exact())
    batch = {"i": {"i": whole["int32"]}, "all": whole, "again": dict(reversed(whole.items()))}
    reports = store.add_many(batch, policy=policies.Exact())
    assert [report.stored_bytes for report in reports] == [numbers.nbytes, numbers.nbytes, 0]
    assert store.add("all", whole, policy=policies.Exact()).stored_bytes == 0
    for name in batch:
        assert_same(store.load(name), batch[name])
    assert store.verify().errors == []


def test_of_many_versions_those_are_named_that_come_near(store: pydedup.Store) -> None:
    """The message named all of them: of 3,000 versions it had 15 kB."""
    store.add_many({f"m@{number}": {"w": np.full(3, number, np.float32)} for number in range(40)})
    store.alias("m", "production", "3")
    with pytest.raises(NotFoundError, match=r"no version or alias 'prodction'; did you mean 'prod"):
        store.load("m@prodction")
    with pytest.raises(NotFoundError, match=r"'x'; there is: 0, 1, 2, 3, 4, \.\.\.$"):
        store.load("m@x")
    with pytest.raises(NotFoundError, match=r"no version '399'; did you mean '39'"):
        store.alias("m", "next", "399")


def test_versions_and_aliases(store: pydedup.Store) -> None:
    for number in range(3):
        store.add("m", {"w": np.full(3, number, np.float32)})
    assert [info.version for info in store.versions("m")] == ["1", "2", "3"]
    assert store.load("m")["w"][0] == 2
    with pytest.raises(NotFoundError, match=r"has no alias 'prod', nor any other$"):
        store.alias("m", "prod", None)
    store.alias("m", "prod", "2")
    assert store.load("m@prod")["w"][0] == 1
    with pytest.raises(NotFoundError, match=r"has no alias 'prd'; it has: prod$"):
        store.alias("m", "prd", None)
    store.alias("m", "prod", "1")
    assert store.load("m@prod")["w"][0] == 0
    with pytest.raises(ArgumentError, match="is a version"):
        store.alias("m", "2", "1")
    with pytest.raises(ArgumentError, match="is an alias"):
        store.add("m@prod", {"w": np.zeros(1)})
    with pytest.raises(NotFoundError, match="it has: 1, 2, 3"):
        store.alias("m", "prod", "9")
    with pytest.raises(ArgumentError, match="points at m@1"):
        store.remove("m@1")
    with pytest.raises(
        ArgumentError, match=r"3 versions; .*\(all_versions=True, .*\(keep=1, --keep 1\)$"
    ):
        store.remove("m")
    store.alias("m", "prod", None)
    with pytest.raises(ArgumentError, match="'m@1' names one version"):
        store.remove("m@1", all_versions=True)
    assert store.remove("m@1") == ["m@1"]
    assert store.remove("m@2") == ["m@2"]
    store.alias("m", "prod", "3")
    with pytest.raises(ArgumentError, match="'prod' points at m@3"):
        store.remove("m")  # also where the name means just that one
    assert store.remove("m", all_versions=True) == ["m@3"]
    assert store.models() == []


def test_a_name_means_what_it_means_now_whoever_changed_it(store_url: str) -> None:
    with pydedup.open(store_url) as store, pydedup.open(store_url) as other:

        def found(address: str) -> float:
            values = {float(one.tensor(address, "w").numpy()[0]) for one in (store, other)}
            assert len(values) == 1
            return values.pop()

        for number in range(4):
            (store, other)[number % 2].add("m", {"w": np.full(3, number, np.float32)})
            assert found("m") == found("m") == number
        for mover, version in ((store, "1"), (other, "2"), (other, "1"), (store, "3")):
            mover.alias("m", "prod", version)
            assert found("m@prod") == found("m@prod") == int(version) - 1
        thread = threading.Thread(target=lambda: store.alias("m", "prod", "2"))
        thread.start()
        thread.join()
        assert found("m@prod") == 1
        other.remove("m@4")
        assert found("m") == 2
        other.vacuum()
        assert found("m") == 2


def test_the_newest_versions_are_kept(store_url: str) -> None:
    """And those that an alias points at, whatever their age."""
    with pydedup.open(store_url) as store:
        for number in range(6):
            store.add("m", {"w": np.full(3, number, np.float32)})
            store.add("other", {"w": np.full(5, number, np.float32)})
        store.alias("m", "prod", "2")
        for bad in (0, -1, 1.0, True, "3"):
            with pytest.raises(ArgumentError, match="keep must be a whole number"):
                store.remove("m", keep=bad)  # type: ignore[arg-type]
        for name, options in (("m@1", {}), ("m@prod", {}), ("m", {"all_versions": True})):
            with pytest.raises(ArgumentError, match="name of a model alone"):
                store.remove(name, keep=2, **options)
        with pytest.raises(NotFoundError):
            store.remove("n", keep=2)
        assert store.remove("m", keep=1 << 70) == store.remove("m", keep=6) == []
        with pydedup.open(store_url, mode="r") as reader:
            assert reader.remove("m", keep=3, dry_run=True) == ["m@1", "m@3"]
        assert store.remove("m", keep=3) == ["m@1", "m@3"]
        assert [info.version for info in store.versions("m")] == ["2", "4", "5", "6"]
        assert store.remove("m", keep=3) == []
        assert store.remove("m", keep=1) == ["m@4", "m@5"]
        assert store.load("m@prod")["w"][0] == 1
        store.alias("m", "prod", None)
        assert store.remove("m", keep=1) == ["m@2"]
        assert len(store.versions("other")) == 6
        assert store.load("m")["w"][0] == 5
        store.vacuum()
        assert store.verify().ok


def test_a_version_whose_alias_is_lost_is_kept(store_url: str) -> None:
    with pydedup.open(store_url) as store:
        for number in range(3):
            store.add("m", {"w": np.full(3, number, np.float32)})
        store.alias("m", "prod", "2")
    change(store_url, "DELETE FROM {aliases}")
    with pydedup.open(store_url) as store:
        assert store.remove("m", keep=1, dry_run=True) == ["m@1"]
        assert store.remove("m", keep=1) == ["m@1"]


@pytest.mark.parametrize(
    "name",
    [
        "naïve modèle",
        "模型",
        "🙂",
        "a'b\"c",
        "x; DROP TABLE pydedup_models; --",
        "a" * 255,
        "a/b\\c",
        "%_?",
        "-rf",
    ],
)
def test_hostile_names(store: pydedup.Store, name: str) -> None:
    store.add(f"{name}@{name}", {name: np.arange(5.0)})
    store.alias(name, "prod", name)
    assert_same(store.load(f"{name}@prod"), {name: np.arange(5.0)})
    assert [info.name for info in store.models()] == [name]
    store.alias(name, "prod", None)
    store.remove(name)
    assert store.verify().errors == []


@pytest.mark.parametrize(
    "name", ["", "a" * 256, " a", "a ", "a@b@c", "a\nb", "e\u0301", "a\0", "@", "a@", "\ud800"]
)
def test_bad_names_are_refused(store: pydedup.Store, name: str) -> None:
    with pytest.raises(ArgumentError):
        store.add(name, {"w": np.zeros(1)})
    assert store.models() == []


def test_duplicates_are_refused_and_change_nothing(store: pydedup.Store) -> None:
    store.add("m@1", {"w": np.zeros(4)})
    with pytest.raises(DuplicateError, match="m@1"):
        store.add("m@1", {"w": np.ones(4)})
    with pytest.raises(PydedupError):
        store.add_many({"new": {"w": np.ones(4)}, "m@1": {"w": np.ones(4)}})
    assert [info.address for info in store.models()] == ["m@1"]
    assert_same(store.load("m"), {"w": np.zeros(4)})
    assert store.verify().notes == []


def test_unknown_names_are_helped(store: pydedup.Store) -> None:
    store.add("resnet", {"conv1.weight": np.zeros((2, 3, 3, 3))})
    with pytest.raises(NotFoundError, match="did you mean 'resnet'"):
        store.load("resnt")
    # Who left out the end was told only of what was as long.
    store.add_many({name: {"w": np.ones(2)} for name in ("a-classifier", "a-model", "ab", "b")})
    with pytest.raises(NotFoundError, match=r"mean 'a-classifier', 'a-model' or 'ab'\?$"):
        store.load("a")
    with pytest.raises(NotFoundError, match=r"conv1\.weight"):
        store.tensor("resnet", "conv1.weigth")
    with pytest.raises(NotFoundError, match="no graph"):
        store.predict("resnet", np.zeros((1, 3)))


def test_dry_run_writes_nothing(store: pydedup.Store) -> None:
    models = variants(2)
    dry = store.add("m", models["tenant-0"], dry_run=True)
    assert dry.dry_run
    assert store.models() == []
    assert store.stats().pages == 0
    wet = store.add("m", models["tenant-0"])
    assert (dry.stored_bytes, dry.pages, dry.blocks) == (wet.stored_bytes, wet.pages, wet.blocks)


def test_explain_says_what_removal_frees(store: pydedup.Store) -> None:
    store.add_many(variants(3), policy=policies.Exact())
    before = store.explain("tenant-1")
    assert {other.model for other in before.shared_with} == {"tenant-0@1", "tenant-2@1"}
    assert 0 < before.removal_frees_bytes < before.used_bytes
    assert before.removal_frees_bytes + before.shared_bytes == before.used_bytes
    shares = [bool(tensor.shared_with) for tensor in before.tensors]
    assert shares == [tensor.shared_bytes > 0 for tensor in before.tensors]
    assert set(shares) == {True, False}
    pages = store.stats().page_bytes
    store.remove("tenant-1")
    store.vacuum()
    freed = pages - store.stats().page_bytes
    assert freed == pytest.approx(before.removal_frees_bytes, rel=0.1)
    assert store.explain("tenant-0").tensors[0].shared_with == ("tenant-2@1",)


def test_diff_names_what_changed(store: pydedup.Store) -> None:
    a = {
        "same": np.arange(9.0),
        "moved": np.ones((80, 80)),
        "gone": np.zeros(2),
        "shape": np.zeros((2, 3)),
    }
    b = {
        "same": np.arange(9.0),
        "moved": np.ones((80, 80)),
        "new": np.zeros(2),
        "shape": np.zeros((3, 2)),
    }
    b["moved"] = b["moved"].copy()
    b["moved"][3, 3] = 3.0
    store.add_many({"a": a, "b": b})
    diff = store.diff("a", "b")
    by_name = {tensor.name: tensor for tensor in diff.tensors}
    assert {name: tensor.status for name, tensor in by_name.items()} == {
        "same": "same",
        "moved": "changed",
        "gone": "removed",
        "new": "added",
        "shape": "reshaped",
    }
    assert by_name["moved"].max_abs == 2.0
    assert by_name["moved"].relative_l2 == pytest.approx(2.0 / 80.0)
    assert 1 <= by_name["moved"].changed_blocks < by_name["moved"].blocks


def test_diff_counts_changed_blocks_of_tensors_that_are_cut_otherwise(store: pydedup.Store) -> None:
    """All blocks of such a tensor counted as changed."""
    table = np.random.default_rng(0).standard_normal((2000, 100)).astype(np.float32)
    stack = np.arange(3 * 128 * 130, dtype=np.float64).reshape(3, 128, 130)
    store.add("a", {"table": table, "stack": stack}, block_shape=(64, 64))
    table[700, 3], table[1999, 99] = 1, 2
    stack[2, 127, 129] = 0
    store.add("b", {"table": table, "stack": stack}, block_shape=(50, 100))
    for names in (("a", "b"), ("b", "a")):
        diffs = store.diff(*names).tensors
        assert {diff.name: diff.changed_blocks for diff in diffs} == {"table": 2, "stack": 1}
    assert [diff.blocks for diff in store.diff("a", "b").tensors] == [64, 18]


def test_metadata_and_certificate_are_kept(store: pydedup.Store) -> None:
    store.add(
        "m", {"w": np.zeros(3)}, metadata={"tenant": "żółw", "lr": 0.1}, policy=policies.Exact()
    )
    info = store.info("m")
    assert info.info.metadata == {"tenant": "żółw", "lr": 0.1}
    assert info.info.policy == "exact"
    assert info.certificate["policy"] == "exact"
    with pytest.raises(ArgumentError, match="JSON"):
        store.add("n", {"w": np.zeros(3)}, metadata={"bad": object()})
    json.dumps(dict(info.certificate))


def test_sharing_view_is_plain_sql(store: pydedup.Store, tmp_path: Path) -> None:
    store.add_many(variants(2))
    assert store.sharing()
    with sqlite3.connect(tmp_path / "store.db") as raw:
        for view in ("pydedup_model_sizes", "pydedup_sharing", "pydedup_page_owners"):
            assert raw.execute(f"SELECT count(*) FROM {view}").fetchone()[0] > 0  # noqa: S608
    raw.close()


def test_what_a_source_holds_beside_the_model_is_reported(
    store: pydedup.Store, tmp_path: Path
) -> None:
    import torch

    layer = torch.nn.Linear(3, 2)
    checkpoint = {"state_dict": layer.state_dict(), "optimizer": {"lr": 0.1}, "epoch": 3}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    report = store.add("m", tmp_path / "checkpoint.pt")
    assert report.left_out == ("optimizer", "epoch")
    assert sorted(store.load("m")) == ["bias", "weight"]
    assert store.add("n", {"w": np.zeros(3)}).left_out == ()


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1.0, 1e200, 1e307])
def test_diff_of_numbers_whose_squares_leave_the_range(store: pydedup.Store, scale: float) -> None:
    one = np.full((4, 4), 4.0) * scale
    store.add("a", {"w": one})
    store.add("b", {"w": one * 1.25})
    (tensor,) = store.diff("a", "b").tensors
    assert tensor.max_abs == pytest.approx(scale, rel=1e-3)
    assert tensor.relative_l2 == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("shape", [(3000, 1500), (1, 2**22), (2**22,), (40, 300, 300), (7, 0)])
@pytest.mark.parametrize("dtype", ["f4", "f8", "i8", "u1"])
def test_diff_of_tensors_that_are_cut_otherwise(
    store: pydedup.Store, shape: tuple[int, ...], dtype: str
) -> None:
    """Block by block they have nothing in common, whatever parts of them are compared at a time."""
    rng = np.random.default_rng(0)
    one = rng.integers(0, 100, shape).astype(dtype)
    two = one.copy()
    store.add("a", {"w": one})
    store.add("b", {"w": one}, block_shape=(24, 100))
    assert store.diff("a", "b").same
    if not one.size:
        return
    places = rng.choice(one.size, 5, replace=False)
    two.reshape(-1)[places] += np.arange(1, 6).astype(dtype)
    store.add("c", {"w": two}, block_shape=(24, 100))
    (found,) = store.diff("a", "c").tensors
    assert (found.status, found.max_abs) == ("changed", 5.0)
    length = np.linalg.norm(one.astype(np.float64).reshape(-1))
    assert found.relative_l2 == pytest.approx(np.sqrt(55) / length)


@pytest.mark.parametrize(
    ("before", "after", "max_abs", "relative"),
    [
        ([0, 1], [np.inf, 1], np.inf, np.inf),
        ([np.inf, 1], [np.inf, 2], np.nan, np.nan),
        ([np.inf, 1], [5, 1], np.inf, np.nan),
        ([np.nan, 1], [np.nan, 2], np.nan, np.nan),
        ([0, 0], [0, 1e-200], 1e-200, np.inf),
        ([0, 1e-200], [0, 3e200], 3e200, np.inf),
        ([0.0, 1.0], [-0.0, 1.0], 0.0, 0.0),
    ],
)
def test_diff_of_what_has_no_distance(
    store: pydedup.Store, before: list[float], after: list[float], max_abs: float, relative: float
) -> None:
    store.add("a", {"w": np.array(before, np.float64)})
    store.add("b", {"w": np.array(after, np.float64)})
    (found,) = store.diff("a", "b").tensors
    assert found.status == "changed"
    assert [found.max_abs, found.relative_l2] == pytest.approx([max_abs, relative], nan_ok=True)
