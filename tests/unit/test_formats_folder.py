# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders: one file or shards, safetensors or torch, parts in subfolders."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from pydedup.errors import ArgumentError, FormatError, UnsupportedFormatError
from pydedup.formats.base import Artifact
from pydedup.formats.folder import GRAPH_FILE, LAYOUT
from pydedup.formats.registry import open_source, write_model

from .formats_files import export

Tensors = dict[str, torch.Tensor]


def state(seed: int, *names: str) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(30, 40, generator=generator) for name in names}


def save_safe(path: Path, tensors: Tensors) -> None:
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def shard(folder: Path, suffix: str, shards: list[Tensors], stem: str) -> None:
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        if suffix == "safetensors":
            save_safe(folder / name, tensors)
        else:
            torch.save(tensors, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2))


def side_files(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer.json").write_bytes("ü".encode())
    (folder / "README.md").write_text("# model")
    (folder / ".gitattributes").write_text("*.bin lfs")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"dim": 40}')


def make_one(folder: Path) -> Tensors:
    tensors = state(0, "embed.weight", "head.weight")
    save_safe(folder / "model.safetensors", tensors)
    return tensors


def make_safe_shards(folder: Path) -> Tensors:
    shards = [state(1, "a", "b"), state(2, "c")]
    shard(folder, "safetensors", shards, "model")
    return {**shards[0], **shards[1]}


def make_torch(folder: Path) -> Tensors:
    tensors = state(3, "a", "b")
    tensors["tied"] = tensors["a"]
    torch.save(tensors, folder / "pytorch_model.bin")
    return tensors


def make_torch_shards(folder: Path) -> Tensors:
    shards = [state(4, "a", "b"), state(5, "c")]
    shard(folder, "bin", shards, "pytorch_model")
    return {**shards[0], **shards[1]}


def make_parts(folder: Path) -> Tensors:
    """A sentence encoder with a dense module, or parts of a pipeline, each with weights."""
    root, dense = state(6, "a"), state(7, "linear.weight")
    shards = [state(8, "x"), state(9, "y")]
    save_safe(folder / "model.safetensors", root)
    (folder / "2_Dense").mkdir()
    save_safe(folder / "2_Dense" / "model.safetensors", dense)
    (folder / "unet").mkdir()
    shard(folder / "unet", "safetensors", shards, "diffusion_pytorch_model")
    return {
        **root,
        **{f"2_Dense/{name}": tensor for name, tensor in dense.items()},
        **{f"unet/{name}": tensor for part in shards for name, tensor in part.items()},
    }


LAYOUTS: dict[str, Callable[[Path], Tensors]] = {
    "one-file": make_one,
    "shards": make_safe_shards,
    "torch": make_torch,
    "torch-shards": make_torch_shards,
    "parts": make_parts,
}


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_each_layout(layout: str, folder: Path) -> None:
    expected = LAYOUTS[layout](folder)
    side_files(folder)
    with open_source(folder) as source:
        assert source.format == "huggingface"
        assert {entry.name for entry in source.entries} == set(expected)
        for name, tensor in expected.items():
            assert source.read(name).tobytes() == tensor.numpy().tobytes()
        artifacts = {artifact.name: artifact for artifact in source.artifacts()}
        keys = {entry.name: entry.key for entry in source.entries}
        assert source.left_out == ()
    assert artifacts["tokenizer.json"].payload == "ü".encode()
    assert artifacts["1_Pooling/config.json"].media_type == "application/json"
    assert {"config.json", "README.md", ".gitattributes", LAYOUT} <= set(artifacts)
    assert not any(name.endswith((".safetensors", ".bin")) for name in artifacts)
    if "tied" in keys:
        assert keys["tied"] == keys["a"] != keys["b"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_has_the_same_files(layout: str, folder: Path, tmp_path: Path) -> None:
    LAYOUTS[layout](folder)
    side_files(folder)
    export(folder, tmp_path / "out")
    before, after = files(folder), files(tmp_path / "out")
    assert set(after) == set(before)
    for name, raw in before.items():
        if name.endswith(".bin"):  # a zip archive with its own name inside
            old = torch.load(folder / name, weights_only=True)
            new = torch.load(tmp_path / "out" / name, weights_only=True)
            assert list(old) == list(new)
            assert all(torch.equal(old[key], new[key]) for key in old)
        else:
            assert after[name] == raw, name


def test_a_model_from_elsewhere_becomes_a_folder(tmp_path: Path) -> None:
    tensors = {"a": np.ones((2, 3), np.float32)}
    with open_source(tensors) as source:
        artifacts = [Artifact("config.json", "application/json", b"{}")]
        write_model(f"{tmp_path}/out.v1/", tensors, source.entries, artifacts)
    assert set(files(tmp_path / "out.v1")) == {"model.safetensors", "config.json"}
    loaded = safetensors.torch.load_file(tmp_path / "out.v1" / "model.safetensors")
    assert torch.equal(loaded["a"], torch.ones(2, 3))


def test_known_layers_stay_known(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with open_source(module) as source:
        tensors = {entry.name: source.read(entry.name) for entry in source.entries}
        graph = source.graph
        write_model(tmp_path / "out", tensors, source.entries, (), graph)
    with open_source(tmp_path / "out") as source:
        assert source.graph == graph is not None
        assert GRAPH_FILE not in {artifact.name for artifact in source.artifacts()}
    (tmp_path / "out" / GRAPH_FILE).write_text('{"version": 1}')
    with pytest.raises(FormatError, match=GRAPH_FILE):
        open_source(tmp_path / "out")


def test_the_same_weights_in_other_formats_are_left_out(folder: Path) -> None:
    expected = make_one(folder)
    torch.save(expected, folder / "pytorch_model.bin")
    shard(folder, "bin", [expected], "pytorch_model")
    save_safe(folder / "model.fp16.safetensors", expected)
    (folder / "onnx").mkdir()
    for name in ("tf_model.h5", "onnx/model.onnx", "rust_model.ot", "flax_model.msgpack"):
        (folder / name).write_bytes(b"weights")
    torch.save({"args": 1}, folder / "training_args.bin")
    (folder / "checkpoint-500").mkdir()
    save_safe(folder / "checkpoint-500" / "model.safetensors", expected)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("secret")
    with open_source(folder) as source:
        assert {entry.name for entry in source.entries} == set(expected)
        names = {artifact.name for artifact in source.artifacts()}
        left_out = set(source.left_out)
    assert names == {LAYOUT}
    assert left_out == {
        "checkpoint-500/",
        "flax_model.msgpack",
        "model.fp16.safetensors",
        "onnx/model.onnx",
        "pytorch_model-00001-of-00001.bin",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "rust_model.ot",
        "tf_model.h5",
        "training_args.bin",
    }


@pytest.mark.parametrize("name", ["pydedup:graph.json", "pydedup:folder-layout", "pydedup:x/y"])
def test_files_with_names_of_what_is_no_file_are_left_out(folder: Path, name: str) -> None:
    """One was taken for the model's graph, and verify called the model damaged."""
    make_one(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"mine")
    with open_source(folder) as source:
        assert source.left_out == (name,)
        assert b"mine" not in {artifact.payload for artifact in source.artifacts()}


def test_large_files_of_other_kinds_are_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pydedup.formats import folder as module

    make_one(folder)
    monkeypatch.setattr(module, "_MAX_ARTIFACT", 10)
    (folder / "spiece.model").write_bytes(bytes(10))
    (folder / "corpus.txt").write_bytes(bytes(11))
    with open_source(folder) as source:
        assert source.left_out == ("corpus.txt",)
        assert "spiece.model" in {artifact.name for artifact in source.artifacts()}


def test_one_file_of_another_name_is_taken(folder: Path) -> None:
    tensors = state(0, "lora")
    save_safe(folder / "adapter_model.safetensors", tensors)
    with open_source(folder) as source:
        assert [entry.name for entry in source.entries] == ["lora"]
    save_safe(folder / "second.safetensors", tensors)
    with pytest.raises(FormatError, match="several weight files"):
        open_source(folder)


def test_tensors_beside_the_index_are_kept(folder: Path, tmp_path: Path) -> None:
    shard(folder, "safetensors", [state(1, "a", "extra"), state(2, "c")], "model")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["extra"]
    index.write_text(json.dumps(content))
    with open_source(folder) as source:
        assert {entry.name for entry in source.entries} == {"a", "extra", "c"}
    export(folder, tmp_path / "out")
    assert files(tmp_path / "out") == files(folder)


# ---- bad input ---------------------------------------------------------------------------------


def _index(folder: Path, content: Any) -> None:
    make_safe_shards(folder)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "model.safetensors.index.json").write_text(text)


FIRST = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", r"no index of weights: it is no JSON \(Expecting property name"),
        ("[" * 100_000, "no index of weights: it is no JSON"),
        ("[]", "no index of weights: it has no object 'weight_map'"),
        ({}, "no index of weights: it has no object 'weight_map'"),  # it was KeyError('weight_map')
        ({"weight_map": {}}, "no index of weights: it has no object 'weight_map'"),
        ({"weight_map": {"a": 3}}, "not in its folder"),
        ({"weight_map": {"a": "../secret.safetensors"}}, "not in its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "not in its folder"),
        ({"weight_map": {"a": "missing.safetensors"}}, "which is missing"),
        (
            {"weight_map": {"a": FIRST, "gone": FIRST}},
            r"/model.safetensors.index.json lists tensor 'gone' .* not have it",
        ),
    ],
)
def test_bad_indexes_are_refused(content: Any, says: str, folder: Path) -> None:
    _index(folder, content)
    with pytest.raises(FormatError, match=says):
        open_source(folder)


@pytest.mark.parametrize("layout", ["one-file", "shards", "torch", "torch-shards"])
def test_pointers_of_git_lfs_are_named(layout: str, folder: Path) -> None:
    LAYOUTS[layout](folder)
    weights = sorted(path for path in folder.iterdir() if path.suffix != ".json")
    weights[-1].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UnsupportedFormatError, match="is a Git LFS pointer; run: git lfs pull"):
        open_source(folder)


@pytest.mark.parametrize("layout", ["one-file", "shards", "torch", "torch-shards"])
def test_damaged_weights_are_refused(layout: str, folder: Path) -> None:
    LAYOUTS[layout](folder)
    weights = sorted(path for path in folder.iterdir() if path.suffix != ".json")
    raw = weights[-1].read_bytes()
    for damaged in (b"", raw[:5], raw[: len(raw) // 2], b"no weights at all"):
        weights[-1].write_bytes(damaged)
        with pytest.raises(FormatError) as caught:
            open_source(folder)
        assert weights[-1].name in str(caught.value)


@pytest.mark.parametrize("names", [[], ["config.json"], ["model.onnx"], ["sub/config.json"]])
def test_folders_without_weights_are_refused(names: list[str], folder: Path) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    with pytest.raises(FormatError, match="holds no model weights") as caught:
        open_source(folder)
    assert ("'model.onnx'" in str(caught.value)) == (names == ["model.onnx"])


def test_no_file_is_named_that_would_be_refused(folder: Path) -> None:
    """Of a SavedModel, saved_model.pb was to be given, which is in no format that is read."""
    (folder / "variables").mkdir()
    (folder / "saved_model.pb").write_bytes(b"\x08\x01")
    with pytest.raises(FormatError, match=r"that we read \('saved_model\.pb' is in none"):
        open_source(folder)
    (folder / "saved_model.pb").rename(folder / "__0_0.distcp")  # of torch.distributed.checkpoint
    with pytest.raises(FormatError, match=r"that we read \('__0_0\.distcp' is in none"):
        open_source(folder)
    (folder / "flax_model.msgpack").write_bytes(b"\x81")
    (folder / "tf_model.h5").write_bytes(b"")
    with pytest.raises(FormatError, match=r"give the path of a file, such as 'tf_model\.h5'"):
        open_source(folder)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_the_index_of_a_folder_names_the_folder(name: str, folder: Path) -> None:
    """It was said to be in no format that pydedup knows."""
    (folder / name).write_text('{"metadata": {}, "weight_map": {}}')
    with pytest.raises(FormatError, match=f"several files; give its folder, '{folder}'$"):
        open_source(folder / name)


def test_a_folder_of_checkpoints_is_told_to_be_one(folder: Path) -> None:
    """Of what a Trainer's `output_dir` holds, it was said that there are no weights."""
    for step in (500, 1000):
        (folder / f"checkpoint-{step}").mkdir()
        save_safe(folder / f"checkpoint-{step}" / "model.safetensors", state(0, "x"))
    with pytest.raises(FormatError, match="of a folder in it, such as 'checkpoint-1000/'"):
        open_source(folder)


@pytest.mark.parametrize("names", [("2026-11-01", "2026-11-02"), ("best", "checkpoint-500")])
def test_a_folder_of_several_models_is_told_to_be_one(folder: Path, names: tuple[str, ...]) -> None:
    """One model with the tensors of all of them was made, or one with those of ``best`` alone."""
    for i, name in enumerate(names):
        (folder / name).mkdir()
        save_safe(folder / name / "model.safetensors", state(i, "x"))
    (folder / "train.log").write_text("")
    said = f"has no weights of its own, .* one by one, as versions, say: {'/, '.join(names)}/$"
    with pytest.raises(FormatError, match=said):
        open_source(folder)
    (folder / "modules.json").write_text("[]")  # parts of one model, which may be alike
    with open_source(folder) as source:
        found = {entry.name.partition("/")[0] for entry in source.entries}
    assert found == {name for name in names if not name.startswith("checkpoint-")}


def test_one_of_several_files_of_a_model_is_told_to_be_that(folder: Path) -> None:
    """A half of a model was stored without a word."""
    for i in range(3):
        save_safe(folder / f"model-0000{i + 1}-of-00003.safetensors", state(i, f"x{i}"))
    with open_source(folder / "model-00002-of-00003.safetensors") as source:
        others = ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")
        assert source.left_out == others
    (folder / "model-00002-of-00003.safetensors").rename(folder / "model-00001-of-00001.pt")
    with open_source(folder / "model-00001-of-00001.pt") as source:
        assert source.left_out == ()


def test_a_folder_with_one_of_several_files_is_refused(folder: Path) -> None:
    """Of a download that was cut off before the index, a part was stored as the model."""
    first = folder / "model-00001-of-00002.safetensors"
    save_safe(first, state(0, "x"))
    said = r"alone of a model in 2 files, .* fetch the others, model-00002-of-00002.safetensors, or"
    with pytest.raises(FormatError, match=said):
        open_source(folder)
    first.rename(folder / "model-00001-of-00001.safetensors")
    with open_source(folder) as source:
        assert len(source.entries) == len(state(0, "x"))


def test_names_that_two_folders_could_claim_are_refused(folder: Path) -> None:
    save_safe(folder / "model.safetensors", state(0, "unet/x"))
    (folder / "unet").mkdir()
    save_safe(folder / "unet" / "model.safetensors", state(1, "y"))
    with pytest.raises(FormatError, match="named like one of folder 'unet'"):
        open_source(folder)


def test_what_is_no_file_is_told(folder: Path) -> None:
    """A tokenizer whose link leads nowhere was not stored, without a word."""
    (folder / "tokenizer.json").symlink_to("../blobs/gone")
    with pytest.raises(FormatError, match="no model weights: no"):
        open_source(folder)
    make_one(folder)
    os.mkfifo(folder / "pipe")
    with open_source(folder) as source:
        assert source.left_out == ("pipe", "tokenizer.json")


def test_links_that_lead_out_are_not_followed(folder: Path, tmp_path: Path) -> None:
    make_one(folder)
    (tmp_path / "secret").write_text("secret")
    (folder / "README.md").symlink_to(tmp_path / "secret")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "key").write_text("secret")
    (folder / "linked").symlink_to(tmp_path / "outside")
    (folder / "config.json").symlink_to(folder / "real.json")
    (folder / "real.json").write_text("{}")
    with open_source(folder) as source:
        artifacts = {artifact.name: artifact.payload for artifact in source.artifacts()}
        assert source.left_out == ("linked/", "README.md")
    assert set(artifacts) == {"config.json", "real.json", LAYOUT}
    (folder / "model.safetensors").rename(tmp_path / "m.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match="leads outside"):
        open_source(folder)


def test_a_snapshot_of_the_hub_cache_is_read(tmp_path: Path) -> None:
    repository = tmp_path / "models--me--m"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    expected = state(0, "a")
    save_safe(repository / "blobs" / "1", expected)
    (repository / "blobs" / "2").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "config.json").symlink_to("../../blobs/2")
    with open_source(snapshot) as source:
        assert source.read("a").tobytes() == expected["a"].numpy().tobytes()
        assert "config.json" in {artifact.name for artifact in source.artifacts()}


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/../../escaped", "", "a\x00b"])
def test_artifacts_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    tensors = {"a": np.ones(2)}
    with (
        open_source(tensors) as source,
        pytest.raises(ArgumentError, match="outside of the folder"),
    ):
        write_model(tmp_path / "out", tensors, source.entries, [Artifact(name, "text/plain", b"")])
    assert list(tmp_path.iterdir()) == []


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    tensors = {"a": np.ones(2)}
    twice = [Artifact("model.safetensors", "text/plain", b"x")]
    with open_source(tensors) as source, pytest.raises(ArgumentError, match="the same place"):
        write_model(tmp_path / "out", tensors, source.entries, twice)
    assert list(tmp_path.iterdir()) == []


def test_only_an_empty_folder_is_replaced(folder: Path, tmp_path: Path) -> None:
    make_one(folder)
    (tmp_path / "empty").mkdir()
    export(folder, tmp_path / "empty")
    assert files(tmp_path / "empty") == files(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    with pytest.raises(ArgumentError, match="no empty folder"):
        export(folder, tmp_path / "full")
    assert files(tmp_path / "full") == {"mine": b"precious"}
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ArgumentError, match="no empty folder"):
        export(folder, tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full", "model"]


def test_tensors_that_no_file_had_are_refused(folder: Path, tmp_path: Path) -> None:
    make_safe_shards(folder)
    with open_source(folder) as source:
        artifacts = list(source.artifacts())
    tensors = {"a": np.ones(2), "b": np.ones(2), "c": np.ones(2), "new": np.ones(2)}
    with (
        open_source(tensors) as source,
        pytest.raises(ArgumentError, match="'new' belongs to none"),
    ):
        write_model(tmp_path / "out", tensors, source.entries, artifacts)
    del tensors["new"], tensors["b"]
    with open_source(tensors) as source, pytest.raises(ArgumentError, match="'b' is missing"):
        write_model(tmp_path / "out", tensors, source.entries, artifacts)
    assert not (tmp_path / "out").exists()


def test_without_torch_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_torch(folder)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UnsupportedFormatError, match=r"pip install 'pydedup\[torch\]'"):
        open_source(folder)
