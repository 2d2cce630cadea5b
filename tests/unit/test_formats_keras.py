# SPDX-License-Identifier: Apache-2.0
"""Keras files, written here with h5py as Keras writes them.

Keras is no test dependency (it needs a backend of its own). The structures below imitate files
that Keras 3.15.1 and 2 wrote: groups, attributes and their types, and member names. The readers
and writers were checked once against Keras 3.15.1 with the torch backend: models saved as
``.keras``, ``.h5`` and ``.weights.h5``, exported by pydedup, load there and predict the same.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import ml_dtypes
import numpy as np
import pytest

import pydedup
from pydedup.errors import ArgumentError, FormatError, NotFoundError, UnsupportedFormatError
from pydedup.formats.keras import CONFIG, STRUCTURE
from pydedup.formats.registry import open_source, write_model

from .formats_files import export

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((40, 3000)).astype(np.float32)
BIAS = RNG.standard_normal(3000).astype(np.float32)
TABLE = RNG.standard_normal((9, 40)).astype(np.float32)

CONFIG_3 = {
    "module": "keras",
    "class_name": "Sequential",
    "config": {
        "name": "sequential",
        "layers": [
            {"class_name": "InputLayer", "config": {"batch_shape": [None, 5], "name": "in"}},
            {"class_name": "Embedding", "config": {"name": "words", "mask_zero": False}},
            {"class_name": "GlobalAveragePooling1D", "config": {"name": "pool"}},
            {
                "class_name": "Dense",
                "config": {"name": "first", "activation": "relu", "use_bias": True},
            },
        ],
    },
}


def write_keras_3(file: Any) -> None:
    """A ``.weights.h5``: layers by class and number, the layer's name as an attribute."""
    for folder, name, arrays in (
        ("layers/input_layer", "in", []),
        ("layers/embedding", "words", [TABLE]),
        ("layers/global_average_pooling1d", "pool", []),
        ("layers/dense", "first", [KERNEL, BIAS]),
        ("optimizer", "adam", [np.int64(7), np.zeros((40, 3000), np.float32)]),
        ("", "sequential", []),
    ):
        variables = file.create_group(f"{folder}/vars" if folder else "vars")
        variables.attrs["name"] = name
        for index, array in enumerate(arrays):
            variables[str(index)] = array


def write_legacy(file: Any, *, whole: bool) -> None:
    """What Keras 2 and ``save("x.h5")`` of Keras 3 write: names in attributes."""
    root = file
    if whole:
        file.attrs["keras_version"] = b"2.15.0"
        file.attrs["model_config"] = json.dumps(CONFIG_3).encode()
        root = file.create_group("model_weights")
        moments = file.create_group("optimizer_weights/adam")
        moments["m:0"] = np.zeros((40, 3000), np.float32)
    root.attrs["layer_names"] = [b"in", b"words", b"pool", b"first"]
    root.attrs["backend"] = b"tensorflow"
    for layer, weights in (
        ("in", {}),
        ("words", {"words/embeddings:0": TABLE}),
        ("pool", {}),
        ("first", {"first/kernel:0": KERNEL, "first/bias:0": BIAS}),
    ):
        group = root.create_group(layer)
        group.attrs["weight_names"] = np.array([name.encode() for name in weights], dtype="S")
        for name, array in weights.items():
            group[name] = array


def write_archive(
    path: Path, compression: int = zipfile.ZIP_STORED, config: object = CONFIG_3
) -> None:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        write_keras_3(file)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("metadata.json", '{"keras_version": "3.15.1"}')
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", buffer.getvalue())
        archive.writestr("assets/layers/words/vocabulary.txt", "a\nb\n")


def make(path: Path, write: Callable[..., None], **more: Any) -> None:
    with h5py.File(path, "w") as file:
        write(file, **more)


def tree(source: Any) -> dict[str, Any]:
    """Return everything an HDF5 file holds: attributes with their types, data, kinds."""
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        for key in item.attrs:
            attribute = item.attrs.get_id(key)
            value = item.attrs[key]
            kind = attribute.get_type().get_class(), attribute.dtype, attribute.shape
            found[f"{name}@{key}"] = (kind, value.tolist() if hasattr(value, "tolist") else value)
        if isinstance(item, h5py.Dataset):
            data = item[()]
            found[name] = (item.dtype, item.shape, np.asarray(data).tobytes())
        else:
            found.setdefault(name, "group")

    with h5py.File(source, "r") as file:
        visit("", file)
        file.visititems(visit)
    return found


def without_optimizer(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if not name.startswith("optimizer")}


NAMES_3 = {
    "layers/dense/vars/0": KERNEL,
    "layers/dense/vars/1": BIAS,
    "layers/embedding/vars/0": TABLE,
}
NAMES_2 = {
    "first/first/bias:0": BIAS,
    "first/first/kernel:0": KERNEL,
    "words/words/embeddings:0": TABLE,
}


def check(path: Path, expected: dict[str, Any], left_out: tuple[str, ...]) -> None:
    with open_source(path) as source:
        assert sorted(entry.name for entry in source.entries) == sorted(expected)
        for name, array in expected.items():
            read = source.read(name)
            assert read.tobytes() == array.tobytes()
            assert (read.dtype, read.shape) == (array.dtype, array.shape)
            assert not read.flags.writeable
        assert source.left_out == left_out


@pytest.mark.parametrize("whole", [True, False])
def test_legacy_files_round_trip(whole: bool, tmp_path: Path) -> None:
    make(tmp_path / "m.h5", write_legacy, whole=whole)
    check(tmp_path / "m.h5", NAMES_2, ("optimizer_weights",) if whole else ())
    export(tmp_path / "m.h5", tmp_path / "out.h5")
    assert tree(tmp_path / "out.h5") == without_optimizer(tree(tmp_path / "m.h5"))


def test_weights_of_keras_3_round_trip(tmp_path: Path) -> None:
    make(tmp_path / "m.weights.h5", write_keras_3)
    check(tmp_path / "m.weights.h5", NAMES_3, ("optimizer",))
    export(tmp_path / "m.weights.h5", tmp_path / "out.weights.h5")
    assert tree(tmp_path / "out.weights.h5") == without_optimizer(tree(tmp_path / "m.weights.h5"))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives_round_trip(compression: int, tmp_path: Path) -> None:
    write_archive(tmp_path / "m.keras", compression)
    check(tmp_path / "m.keras", NAMES_3, ("optimizer",))
    export(tmp_path / "m.keras", tmp_path / "out.keras")
    with (
        zipfile.ZipFile(tmp_path / "m.keras") as old,
        zipfile.ZipFile(tmp_path / "out.keras") as new,
    ):
        assert new.testzip() is None
        assert sorted(new.namelist()) == sorted(old.namelist())
        for name in old.namelist():
            if name != "model.weights.h5":
                assert new.read(name) == old.read(name)
        weights = [io.BytesIO(archive.read("model.weights.h5")) for archive in (old, new)]
    assert tree(weights[1]) == without_optimizer(tree(weights[0]))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["m.keras", "out.keras"]


def test_an_export_of_an_archive_to_h5_holds_its_weights(tmp_path: Path) -> None:
    write_archive(tmp_path / "m.keras")
    export(tmp_path / "m.keras", tmp_path / "out.weights.h5")
    check(tmp_path / "out.weights.h5", NAMES_3, ())


@pytest.mark.parametrize("kind", ["legacy", "archive"])
def test_layers_are_inferred(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("m.h5" if kind == "legacy" else "m.keras")
    if kind == "legacy":
        make(path, write_legacy, whole=True)
    else:
        write_archive(path)
    kernel = "first/first/kernel:0" if kind == "legacy" else "layers/dense/vars/0"
    with open_source(path) as source:
        graph = source.graph
        artifacts = {artifact.name: artifact.payload for artifact in source.artifacts()}
        shapes = {entry.name: entry.shape for entry in source.entries}
    assert graph is not None
    assert [node.op for node in graph.nodes] == ["embedding", "mean", "linear", "relu"]
    assert graph.nodes[2].weights["weight"] == kernel
    assert graph.nodes[2].attrs == {"transpose": True}
    graph.validate(shapes)
    assert json.loads(artifacts[CONFIG]) == CONFIG_3
    assert STRUCTURE in artifacts


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (["Dense", "LSTM"], r"layers LSTM; export it with model\.export\('model\.onnx'"),
        (["LSTM", "Conv2D", "LSTM"], r"layers Conv2D, LSTM; export it"),
        (["Dense"], "from an ONNX file, or from Keras"),  # of which another option is not known
        ([None], "from an ONNX file, or from Keras"),
        ([["Dense"]], "from an ONNX file, or from Keras"),
    ],
)
def test_layers_that_are_not_run_are_named(kinds: list[Any], said: str, tmp_path: Path) -> None:
    layers = [{"class_name": kind, "config": {}} for kind in kinds]
    write_archive(tmp_path / "m.keras", config={"class_name": "Sequential", "config": layers})
    layers = {"layers": layers}  # type: ignore[assignment]
    write_archive(tmp_path / "n.keras", config={"class_name": "Functional", "config": layers})
    with pydedup.open(tmp_path / "s.db") as store:
        for name in "mn":
            store.add(name, tmp_path / f"{name}.keras")
            with pytest.raises(NotFoundError, match=said):
                store.predict(name, np.ones((1, 2), np.float32))


def test_renamed_layers_are_not_guessed(tmp_path: Path) -> None:
    write_archive(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as old:
        members = {name: old.read(name) for name in old.namelist()}
    buffer = io.BytesIO(members["model.weights.h5"])
    with h5py.File(buffer, "r+") as file:
        file["layers/dense/vars"].attrs["name"] = "another"
    members["model.weights.h5"] = buffer.getvalue()
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as new:
        for name, data in members.items():
            new.writestr(name, data)
    with open_source(tmp_path / "m.keras") as source:
        assert source.graph is None


def test_weights_alone_have_no_layers(tmp_path: Path) -> None:
    make(tmp_path / "m.weights.h5", write_keras_3)
    with open_source(tmp_path / "m.weights.h5") as source:
        assert source.graph is None


def test_the_structure_has_no_weights_and_is_the_same_each_time(tmp_path: Path) -> None:
    payloads = []
    for kernel_seed in (1, 2):
        make(tmp_path / "m.h5", write_legacy, whole=True)
        with h5py.File(tmp_path / "m.h5", "r+") as file:
            data = np.random.default_rng(kernel_seed).standard_normal((40, 3000))
            file["model_weights/first/first/kernel:0"][...] = data
        with open_source(tmp_path / "m.h5") as source:
            payloads.append(next(a.payload for a in source.artifacts() if a.name == STRUCTURE))
    assert payloads[0] == payloads[1]
    assert len(payloads[0]) < 5000


def test_other_layouts_of_datasets_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.h5"
    big = RNG.standard_normal((300, 401))
    with h5py.File(path, "w") as file:
        file.create_dataset("chunked", data=big, chunks=(64, 64))
        file.create_dataset("packed", data=big, compression="gzip", shuffle=True, fletcher32=True)
        file.create_dataset("big-endian", data=big.astype(">f4"))
        file.create_dataset("packed-big-endian", data=big.astype(">f8"), compression="gzip")
        file.create_dataset("never-written", shape=(3, 2), dtype="f4", fillvalue=1.5)
        file["scalar"] = np.float16(2)
        file["flags"] = np.array([True, False])
        file["empty"] = np.zeros((0, 4), np.int8)
        file["nested/deep/ids"] = np.arange(3, dtype=np.uint16)
        file["linked"] = file["chunked"]
        file["text"] = np.array([b"ab", b"c"])
        file["null"] = h5py.Empty("f4")
        file["words"] = ["wörter", "b"]
    expected = {
        "chunked": big,
        "linked": big,
        "packed": big,
        "big-endian": big.astype(np.float32),
        "packed-big-endian": big,
        "never-written": np.full((3, 2), 1.5, np.float32),
        "scalar": np.array(2, np.float16),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 4), np.int8),
        "nested/deep/ids": np.arange(3, dtype=np.uint16),
    }
    check(path, expected, ())
    with open_source(path) as source:
        keys = {entry.name: entry.key for entry in source.entries}
        assert keys["chunked"] == keys["linked"]
        assert len(set(keys.values())) == len(keys) - 1
    export(path, tmp_path / "out.h5")
    check(tmp_path / "out.h5", expected, ())
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["linked"].id.get_offset() == file["chunked"].id.get_offset()
        assert file["text"][()].tolist() == [b"ab", b"c"]
        assert file["words"].asstr()[()].tolist() == ["wörter", "b"]
        assert file["null"].shape is None


def test_numbers_of_types_that_numpy_lacks_are_read(tmp_path: Path) -> None:
    short = h5py.h5t.IEEE_F32LE.copy()  # bfloat16 as a float type of HDF5
    short.set_fields(15, 7, 8, 0, 7)
    short.set_size(2)
    short.set_ebias(127)
    twelve = h5py.h5t.STD_I32LE.copy()
    twelve.set_precision(12)
    twelve.set_offset(4)
    expected = {
        "float": np.array([1, 2, 3.5, -1, 0], np.float32),
        "int": np.arange(-3, 5, dtype=np.int32),
    }
    with h5py.File(tmp_path / "m.h5", "w") as file:
        for name, kind in (("float", short), ("int", twelve)):
            space = h5py.h5s.create_simple(expected[name].shape)
            dataset = h5py.h5d.create(file.id, name.encode(), kind, space)
            dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, expected[name])
    check(tmp_path / "m.h5", expected, ())
    export(tmp_path / "m.h5", tmp_path / "out.h5")
    check(tmp_path / "out.h5", expected, ())


def test_a_dataset_that_was_never_written_cannot_claim_any_size(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.create_dataset("w", shape=(1 << 28,), dtype="f4")
    with pytest.raises(FormatError, match="'w' claims 1073741824 bytes out of 0; it is damaged"):
        open_source(tmp_path / "m.h5")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
def test_floats_that_hdf5_lacks(dtype: Any, tmp_path: Path) -> None:
    values = RNG.standard_normal((5, 3)).astype(dtype)
    if dtype is ml_dtypes.bfloat16:  # as Keras writes it
        with h5py.File(tmp_path / "m.h5", "w") as file:
            file.create_dataset("w", data=values).attrs["dtype"] = "bfloat16"
    else:
        with open_source({"w": values}) as source:
            write_model(tmp_path / "m.h5", {"w": values}, source.entries)
    check(tmp_path / "m.h5", {"w": values}, ())
    export(tmp_path / "m.h5", tmp_path / "out.h5")
    assert tree(tmp_path / "out.h5") == tree(tmp_path / "m.h5")


def test_models_of_other_formats_become_plain_hdf5(tmp_path: Path) -> None:
    tensors = {"layer.0/kernel": KERNEL, "scale": np.array(2.0), "none": np.zeros((0, 2))}
    with open_source(tensors) as source:
        write_model(tmp_path / "out.h5", tensors, source.entries)
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["layer.0/kernel"][()].tobytes() == KERNEL.tobytes()
    check(tmp_path / "out.h5", tensors, ())
    clash = {"a": BIAS, "a/b": BIAS}
    with open_source(clash) as source:
        with pytest.raises(UnsupportedFormatError, match="names are paths"):
            write_model(tmp_path / "clash.h5", clash, source.entries)
        with pytest.raises(UnsupportedFormatError, match="needs the Keras config"):
            write_model(tmp_path / "clash.keras", clash, source.entries)
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5"]


def test_bfloat16_whose_type_is_not_told_is_refused(tmp_path: Path) -> None:
    """Keras leaves it so in legacy files: it was left out, and a model without weights stored."""
    with h5py.File(tmp_path / "m.h5", "w") as file:
        layer = file.create_group("model_weights").create_group("dense")
        layer.attrs["weight_names"] = ["kernel"]
        layer["kernel"] = np.ones((4, 2), np.uint16).view("V2")
    with pytest.raises(UnsupportedFormatError, match=r"'model_weights/dense/kernel' has bytes"):
        open_source(tmp_path / "m.h5")


@pytest.mark.parametrize("dtype", ["complex64", "longdouble"])
def test_numbers_that_no_store_has_are_refused(dtype: str, tmp_path: Path) -> None:
    """They were left out of the model without a word, where other formats refuse them."""
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["vars/0"] = np.ones((4, 4), dtype)
        file["vars/1"] = np.ones(4, np.float32)
        file["words"] = [b"a", b"b"]
    says = rf"m.h5: dataset 'vars/0' has dtype {np.dtype(dtype)}, which cannot be stored; "
    says += "give its real" if dtype == "complex64" else "convert it"
    with pytest.raises(UnsupportedFormatError, match=says):
        open_source(tmp_path / "m.h5")


@pytest.mark.parametrize("name", ["/a", "./a", "a//b"])
def test_names_that_hdf5_would_change_are_refused(name: str, tmp_path: Path) -> None:
    """They came back under others."""
    tensors = {name: BIAS}
    refused = pytest.raises(UnsupportedFormatError, match=f"tensor '{name}' .* would become 'a")
    with open_source(tensors) as source, refused:
        write_model(tmp_path / "out.h5", tensors, source.entries)
    assert not (tmp_path / "out.h5").exists()


def test_a_legacy_file_cannot_become_an_archive(tmp_path: Path) -> None:
    make(tmp_path / "m.h5", write_legacy, whole=True)
    with pytest.raises(UnsupportedFormatError, match="needs the Keras config"):
        export(tmp_path / "m.h5", tmp_path / "out.keras")


def test_a_converted_model_cannot_fill_the_structure(tmp_path: Path) -> None:
    make(tmp_path / "m.h5", write_legacy, whole=False)
    with open_source(tmp_path / "m.h5") as source:
        artifacts = list(source.artifacts())
    tensors = {name: array.astype(np.float16) for name, array in NAMES_2.items()}
    with open_source(tensors) as source, pytest.raises(ArgumentError, match="without converting"):
        write_model(tmp_path / "out.h5", tensors, source.entries, artifacts)
    assert not (tmp_path / "out.h5").exists()


def test_split_attributes_are_joined(tmp_path: Path) -> None:
    """Keras splits lists of names beyond 64 KiB into numbered attributes."""
    with h5py.File(tmp_path / "m.h5", "w") as file:
        write_legacy(file, whole=True)
        root = file["model_weights"]
        del root.attrs["layer_names"]
        root.attrs["layer_names0"] = [b"in", b"words"]
        root.attrs["layer_names1"] = [b"pool", b"first"]
    with open_source(tmp_path / "m.h5") as source:
        assert source.graph is not None
