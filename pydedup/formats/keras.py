# SPDX-License-Identifier: Apache-2.0
"""Keras models: ``.keras`` archives, ``.weights.h5`` and legacy ``.h5`` files, with h5py alone.

A tensor is named by its path in the HDF5 file, without the ``model_weights/`` that whole legacy
models put before it. Optimizer state is left out. Everything else is kept so that the file can be
written again for the same version of Keras: the structure of the HDF5 file with its attributes
(see :mod:`pydedup.formats._hdf5`), the config, the other members of an archive.

Files that are plain HDF5 and not of Keras are read and written the same way.
"""

from __future__ import annotations

import json
import re
import tempfile
import threading
import zipfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pydedup.errors import ArgumentError, FormatError, UnsupportedFormatError
from pydedup.formats._files import RawFile, room_for_copy
from pydedup.formats._hdf5 import (
    OVERLAYS,
    Dataset,
    build_skeleton,
    fill_skeleton,
    hdf5_errors,
    import_h5py,
    is_group,
    numeric,
    open_file,
    read_dataset,
)
from pydedup.formats._paths import stays_inside
from pydedup.formats._zip import ZipMembers, zip_to_write
from pydedup.formats.base import (
    DERIVED,
    Array,
    Artifact,
    ModelSource,
    Outgoing,
    TensorEntry,
    find_artifact,
)
from pydedup.formats.infer_keras import infer_from_keras
from pydedup.graph import Graph
from pydedup.text import listed

__all__ = ["CONFIG", "MEMBER", "STRUCTURE", "KerasSource", "write_archive", "write_hdf5"]

#: The artifact with the HDF5 file without its numbers (gzip).
STRUCTURE = DERIVED + "hdf5-structure"
#: The artifact with the model's config, as JSON.
CONFIG = DERIVED + "keras-config"
#: Prefix of artifacts with the other members of a ``.keras`` archive.
MEMBER = DERIVED + "keras-member/"

_WEIGHTS = "model.weights.h5"
_CONFIG = "config.json"
_METADATA = "metadata.json"
_LEGACY_ROOT = "model_weights"
_MAX_CONFIG = 256 << 20


class KerasSource(ModelSource):
    """Reader of a ``.keras`` archive or an HDF5 file. HDF5 itself runs one thread at a time."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.format = "keras-h5"
        self._lock = threading.Lock()
        self._zip: ZipMembers | None = None
        self._file: Any = None
        self._base = 0
        import_h5py()
        self._raw = RawFile(path)
        with self._closed_on_failure():
            size = self._raw.size
            if self._raw.read_at(0, min(4, size)) == b"PK\x03\x04":
                self.format = "keras"
                self._zip = ZipMembers(path)
                size = self._open_weights(self._zip)
            self._file = open_file(self._raw, self._base, size)
            with hdf5_errors(self.description):
                self._legacy = _LEGACY_ROOT in self._file
                self._config_text = self._read_config()
                self._config = self._parse_config()
                self.has_program = self._config_text is not None
                self.left_out = tuple(key for key in self._file if _skip(key))
                datasets = list(numeric(self._file, _skip, self.description))
                self._structure = build_skeleton(self._file, _skip, self.description)
            self._datasets = {self._name(item.path): item for item in datasets}
            self._set_entries(
                TensorEntry(self._name(item.path), item.dtype, item.shape, key=item.address)
                for item in datasets
            )

    @property
    def graph(self) -> Graph | None:
        """The layers, for Sequential and Functional chains of known layers."""
        if not isinstance(self._config, Mapping):
            return None
        with self._lock, hdf5_errors(self.description):
            weights = self._layer_weights(self._config)
        return infer_from_keras(self._config, weights)

    def artifacts(self) -> Iterator[Artifact]:
        """Yield structure, config, and the other members of an archive."""
        yield Artifact(STRUCTURE, "application/x-hdf5+gzip", self._structure)
        if self._config_text is not None:
            yield Artifact(CONFIG, "application/json", self._config_text)
        if self._zip is not None:
            for name in self._zip.members:
                if name not in (_WEIGHTS, _CONFIG):
                    payload = self._zip.read(name, _MAX_CONFIG)
                    yield Artifact(MEMBER + name, "application/octet-stream", payload)

    def close(self) -> None:
        """Close the files; arrays from them stay valid."""
        with hdf5_errors(self.description):
            for item in (self._file, self._zip, self._raw):
                if item is not None:
                    item.close()

    def _open_weights(self, archive: ZipMembers) -> int:
        """Point ``_raw`` and ``_base`` at the HDF5 file inside the archive; return its size."""
        if _WEIGHTS not in archive.members:
            found = listed(list(archive.members))
            raise FormatError(
                f"{self.description} holds no {_WEIGHTS}; it holds {found or 'nothing'}"
            )
        if archive.is_stored(_WEIGHTS):
            archive.verify(_WEIGHTS)
            self._base = archive.offset(_WEIGHTS)
            return archive.members[_WEIGHTS].file_size
        # HDF5 reads at random, which a compressed member cannot give.
        with tempfile.TemporaryFile(prefix="pydedup-") as spool:
            # Within: what comes of reading the archive is said of that.
            with archive.stream(_WEIGHTS) as member, room_for_copy(archive.path):
                while piece := member.read(1 << 20):
                    spool.write(piece)
                spool.flush()
            self._raw.close()
            self._raw = RawFile(Path(f"/proc/self/fd/{spool.fileno()}"))
        return self._raw.size

    def _read(self, entry: TensorEntry) -> Array:
        dataset = self._datasets[entry.name]
        if dataset.offset is not None:
            array = self._raw.array(self._base + dataset.offset, dataset.stored, dataset.shape)
            return array.view(entry.dtype.numpy) if dataset.stored.kind == "V" else array
        with self._lock, hdf5_errors(self.description):
            return read_dataset(self._file, dataset)

    def _name(self, path: str) -> str:
        return tensor_name(path, self._legacy)

    def _read_config(self) -> bytes | None:
        if self._zip is not None:
            found = _CONFIG in self._zip.members
            return self._zip.read(_CONFIG, _MAX_CONFIG) if found else None
        text = self._file.attrs.get("model_config")
        if isinstance(text, str):
            return text.encode("utf-8", "surrogateescape")
        return bytes(text) if isinstance(text, bytes) else None

    def _parse_config(self) -> Any:
        if self._config_text is None:
            return None
        try:
            return json.loads(self._config_text)
        except (ValueError, TypeError, RecursionError) as exc:
            raise FormatError(f"{self.description}: the Keras config is damaged: {exc}") from exc

    def _layer_weights(self, config: Mapping[str, Any]) -> dict[str, list[str]]:
        """Return layer name -> tensor names in the order of ``layer.weights``."""
        root = self._file[_LEGACY_ROOT] if self._legacy else self._file
        names = _text_list(root.attrs, "layer_names")
        if names:
            legacy: dict[str, list[str]] = {}
            for layer in names:
                if layer in root:
                    weights = _text_list(root[layer].attrs, "weight_names")
                    legacy[layer] = [f"{layer}/{weight}" for weight in weights]
            return legacy
        inner = config.get("config")
        layers = inner.get("layers") if isinstance(inner, Mapping) else None
        result: dict[str, list[str]] = {}
        for name, folder in _layer_folders(layers if isinstance(layers, list) else []):
            variables = f"layers/{folder}/vars"
            if variables in self._file and is_group(self._file[variables]):
                # Newer versions write the layer's name; the folder must then be that layer's.
                if self._file[variables].attrs.get("name", name) != name:
                    return {}
                keys = sorted(self._file[variables], key=_numeric_key)
                result[name] = [f"{variables}/{key}" for key in keys]
        return result


def tensor_name(path: str, legacy: bool) -> str:
    """Return the name of the tensor at a path of the HDF5 file."""
    return path.removeprefix(_LEGACY_ROOT + "/") if legacy else path


def write_hdf5(path: Path, outgoing: Outgoing) -> None:
    """Write an HDF5 file: as it was where its structure is known, else a dataset per tensor."""
    h5py = import_h5py()
    structure = find_artifact(outgoing.artifacts, STRUCTURE)
    if structure is not None:
        _fill(path, structure, outgoing)
        return
    with h5py.File(path, "w") as target:
        written: dict[Hashable, Any] = {}
        for entry in outgoing.entries:
            tied = written.get(entry.key) if entry.nbytes else None
            # Under no name: it would stay until the next one is there.
            written[entry.key] = _write_dataset(
                target, entry, outgoing.fetch(entry) if tied is None else tied
            )


def _write_dataset(target: Any, entry: TensorEntry, content: Any) -> Any:
    """Write an array, or one more link to a dataset, and return the dataset."""
    name = entry.dtype.numpy.name
    try:
        if isinstance(content, np.ndarray):
            data = content.view(f"V{content.itemsize}") if name in OVERLAYS else content
            target.create_dataset(entry.name, data=data)
        else:
            target[entry.name] = content
        dataset = target[entry.name]
    except (ValueError, TypeError, OSError) as exc:
        if isinstance(exc, OSError) and exc.errno is not None:  # the file's; of a path it has none
            raise
        raise UnsupportedFormatError(
            f"tensor {entry.name!r} cannot be written to HDF5, where names are paths: {exc}"
        ) from exc
    if dataset.name != f"/{entry.name}":
        raise UnsupportedFormatError(
            f"tensor {entry.name!r} cannot be written to HDF5, where names are paths: it would "
            f"become {dataset.name[1:]!r}; export to safetensors"
        )
    if name in OVERLAYS:
        dataset.attrs["dtype"] = name
    return dataset


def write_archive(path: Path, outgoing: Outgoing) -> None:
    """Write a ``.keras`` archive of a model that was added from one."""
    structure = find_artifact(outgoing.artifacts, STRUCTURE)
    members = [item for item in outgoing.artifacts if item.name.startswith(MEMBER)]
    config = find_artifact(outgoing.artifacts, CONFIG)
    # A legacy file has a config too, but one that only the legacy loader understands.
    metadata = any(item.name == MEMBER + _METADATA for item in members)
    if structure is None or config is None or not metadata:
        raise UnsupportedFormatError(
            "a .keras archive needs the Keras config, which is kept for models that were added "
            "from one; export to .h5 or safetensors"
        )
    weights = path.with_name(path.name + ".h5")
    try:
        _fill(weights, structure, outgoing)
        with zip_to_write(path) as archive:
            for item in members:
                name = item.name.removeprefix(MEMBER)
                if not stays_inside(name):
                    raise FormatError(f"member {name!r:.80} would be unpacked outside of a folder")
                archive.writestr(zipfile.ZipInfo(name), item.payload)
            archive.writestr(zipfile.ZipInfo(_CONFIG), config)
            info = zipfile.ZipInfo(_WEIGHTS)
            with weights.open("rb") as source, archive.open(info, "w", force_zip64=True) as target:
                while piece := source.read(1 << 20):
                    target.write(piece)
    finally:
        weights.unlink(missing_ok=True)


def _fill(path: Path, structure: bytes, outgoing: Outgoing) -> None:
    by_name = {entry.name: entry for entry in outgoing.entries}

    def fetch(file: Any, dataset: Dataset) -> Array:
        name = tensor_name(dataset.path, _LEGACY_ROOT in file)
        entry = by_name.get(name)
        if entry is None or entry.dtype != dataset.dtype or entry.shape != dataset.shape:
            raise ArgumentError(
                f"the stored Keras structure expects tensor {name!r} as {dataset.dtype.label} "
                f"{dataset.shape}; export without converting"
            )
        return outgoing.fetch(entry)

    fill_skeleton(path, structure, fetch, "the stored Keras structure")


def _skip(path: str) -> bool:
    return path in ("optimizer", "optimizer_weights", "_optimizer")


def _text_list(attributes: Any, name: str) -> list[str]:
    """Return a list attribute, which Keras splits into numbered ones when it is long."""
    values: list[Any] = []
    if name in attributes:
        values = list(attributes[name])
    else:
        part = 0
        while f"{name}{part}" in attributes:
            values += list(attributes[f"{name}{part}"])
            part += 1
    return [item.decode("utf-8") if isinstance(item, bytes) else str(item) for item in values]


def _layer_folders(layers: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """Yield (layer name, folder): Keras 3 numbers layers per class, whatever their names."""
    used: dict[str, int] = {}
    for layer in layers:
        if not isinstance(layer, Mapping) or not isinstance(layer.get("class_name"), str):
            continue
        config = layer.get("config")
        name = config.get("name") if isinstance(config, Mapping) else layer.get("name")
        snake = _snake_case(layer["class_name"])
        used[snake] = used.get(snake, -1) + 1
        yield str(name), f"{snake}_{used[snake]}" if used[snake] else snake


def _snake_case(name: str) -> str:
    # Keras's rule: a word begins at a capital before a small letter, or after one.
    return re.sub(r"(?<=.)(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _numeric_key(key: str) -> tuple[int, str]:
    return (int(key), "") if key.isdigit() else (1 << 31, key)
