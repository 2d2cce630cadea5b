# SPDX-License-Identifier: Apache-2.0
"""`Store`: what users hold. It delegates to ingest, serving, maintenance and report.

What opening and predicting do not need is imported where it is used: a process that serves should
not wait for what adds, scores or compares.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Self, overload

from numpy.typing import NDArray

from pydedup import config
from pydedup.adapter import Adapter
from pydedup.adapter_options import tells_hidden
from pydedup.adding import StoreAdds
from pydedup.arguments import as_dtype
from pydedup.catalog import Catalog, StoredModel
from pydedup.errors import ArgumentError
from pydedup.names import check_name
from pydedup.opening import check_writable, connect_store, pool_of
from pydedup.predicting import StorePredictions
from pydedup.registry import place_of
from pydedup.replacement import DEFAULT_POLICY, Trace, check_policy
from pydedup.serving.on_demand import ArtifactOnDemand, TensorsOnDemand
from pydedup.types import GRAPH_ARTIFACT, DType, ModelInfo, Progress, check_progress
from pydedup.upkeep import StoreUpkeep
from pydedup.words import Device, FileFormat, FloatDType, OpenMode, Replacement

if TYPE_CHECKING:
    import torch

    from pydedup.quotas import Quotas
    from pydedup.report.compare import Diff, Explanation
    from pydedup.report.figures import ModelFigures, StoreStats
    from pydedup.report.page import ReportPage
    from pydedup.report.sizes import ModelSize
    from pydedup.usage import Usage

__all__ = ["Store", "open"]


def open(
    url: str | os.PathLike[str],
    *,
    mode: OpenMode = "a",
    memory: str | int = "512MiB",
    schema: str | None = None,
    replacement: Replacement = DEFAULT_POLICY,
) -> Store:
    """Open a store, or create it.

    Parameters
    ----------
    url
        ``sqlite:///models.db`` (a relative path), ``sqlite:////abs/models.db``; a plain path is a
        SQLite file. A `pathlib.Path` is taken as it is, even where it looks like it has options.
    mode
        ``"a"`` reads and writes and creates what is missing; ``"r"`` never creates or writes.
    memory
        Budget, e.g. ``"512MiB"``: the buffer pool, and buffers of adds (beside the one tensor
        that an add reads at a time).
    schema
        Schema to live in, where the database has such a thing.
    replacement
        Which page the buffer pool gives up when it is full: one of
        `pydedup.replacement.POLICIES`.

    Raises
    ------
    ArgumentError
        For a URL, mode, size or policy that cannot be understood.
    NotAStoreError, SchemaVersionError, UnavailableError, ReadOnlyError
        When there is no store, it is of a newer pydedup, the database cannot be reached, or it
        cannot be written to.
    """
    url = place_of(url)
    return Store._connect(url, mode, memory, schema, replacement)


class Store(StoreAdds, StorePredictions, StoreUpkeep):
    """One pydedup store, as `pydedup.open` returns it.

    A context manager, safe between threads. It may be used after a fork, unless another thread was
    just at its first use of a method: that imports modules, and a child waits for them for ever.
    Models are addressed as ``name`` (its newest version), ``name@version`` or ``name@alias``. Sizes
    are in bytes, spans of time in seconds, points in time in seconds since 1970. Whatever method
    talks to the database may also raise StoreError or one of its kinds (`pydedup.errors`).
    """

    def __init__(
        self, adapter: Adapter, memory_bytes: int, replacement: Replacement = DEFAULT_POLICY
    ) -> None:
        self._adapter = adapter
        self._pool = pool_of(adapter, memory_bytes, replacement)
        self._catalog = Catalog(adapter, self._pool, memory_bytes)
        self._closed = False

    @classmethod
    def _connect(
        cls,
        url: str,
        mode: OpenMode,
        memory: str | int,
        schema: str | None,
        replacement: Replacement,
    ) -> Self:
        budget = config.parse_memory(memory)
        check_policy(replacement)
        adapter = connect_store(url, mode=mode, schema=schema)
        try:
            return cls(adapter, budget, replacement)
        except BaseException:
            adapter.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<pydedup.Store {self._adapter.url}{', closed' if self._closed else ''}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ArgumentError(
            f"{self!r} cannot be pickled or copied: open it by its URL in each process that is not "
            "a fork of this one"
        )

    @property
    def url(self) -> str:
        """The URL, without credentials."""
        return self._adapter.url

    @property
    def read_only(self) -> bool:
        """Whether changes are refused."""
        return self._adapter.read_only

    def close(self) -> None:
        """Close the database and drop the pool. Idempotent."""
        self._closed = True
        self._kept = None
        self._pool.clear()
        self._adapter.close()

    # ---- out ----------------------------------------------------------------------------------

    @tells_hidden
    def load(self, name: str, dtype: FloatDType | None = None) -> dict[str, NDArray[Any]]:
        """Return all tensors of a model as numpy arrays (bf16 and f8 as ml_dtypes).

        ``dtype`` (``"f32"``, ``"bf16"``, ``np.float32``, ...) converts floating-point tensors;
        others stay as they are. Raises NotFoundError, CorruptStoreError; ArgumentError for a dtype
        that is not of floating point.
        """
        model = self._catalog.model(name)
        wanted = None if dtype is None else DType.of_floats(dtype)
        return {info.name: self._read(model, info.name, wanted) for info in model.tensors}

    @tells_hidden
    def load_torch(
        self, name: str, dtype: FloatDType | None = None, device: Device | None = None
    ) -> dict[str, torch.Tensor]:
        """Return a state dict of torch tensors; needs the extra ``torch``. See `load`.

        Tensors that were tied in the model that was added are one tensor.

        Raises UnsupportedFormatError where torch is not installed, ArgumentError for a device that
        it does not have, and what `load` does.
        """
        from pydedup.formats.torch_tensors import require_torch, to_torch

        require_torch("load_torch")
        model = self._catalog.model(name)
        wanted = None if dtype is None else DType.of_floats(dtype)
        firsts = _first_names(model)
        state: dict[str, torch.Tensor] = {}
        for info in model.tensors:
            first = state.get(firsts.get(info.name, ""))
            state[info.name] = (
                to_torch(self._read(model, info.name, wanted), device) if first is None else first
            )
        return state

    @tells_hidden
    def export(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        format: FileFormat | None = None,
        progress: Progress | None = None,
    ) -> list[str]:
        """Write a model to a file or folder of any known format, tensor by tensor.

        The format follows from the name (``.safetensors``, ``.npz``, ..., a folder for Hugging
        Face) or from ``format``. Nothing is left behind on failure. Returns the names of tied
        tensors that were written once more, since the format knows no ties; torch and HDF5 files
        do. Raises NotFoundError, UnsupportedFormatError, StorageFullError, and ArgumentError for a
        place that cannot be written.
        """
        from pydedup.formats.base import TensorEntry
        from pydedup.formats.registry import write_model

        check_progress(progress)
        model = self._catalog.model(name)
        firsts = _first_names(model)
        entries = [
            TensorEntry(info.name, info.dtype, info.shape, firsts.get(info.name, info.name))
            for info in model.tensors
        ]
        return write_model(
            path,
            TensorsOnDemand(
                lambda tensor: self._read(model, tensor, None), model.row.logical_bytes, progress
            ),
            entries,
            self._artifacts(model),
            model.graph(),
            format=format,
        )

    @tells_hidden
    def artifacts(self, name: str) -> dict[str, bytes]:
        """Return what came with a model beside its tensors (config, tokenizer), by file name.

        Raises NotFoundError, CorruptStoreError.
        """
        from pydedup.formats.base import DERIVED

        found = self._artifacts(self._catalog.model(name))
        return {item.name: item.payload for item in found if not item.name.startswith(DERIVED)}

    # ---- names --------------------------------------------------------------------------------

    def models(self) -> list[ModelInfo]:
        """Return all versions of all models, ordered by name, then age.

        Raises CorruptStoreError when the record of one cannot be read.
        """
        return self._catalog.infos()

    def versions(self, name: str) -> list[ModelInfo]:
        """Return the versions of one model, oldest first. Raises NotFoundError."""
        self._catalog.resolve(check_name(name, "model name"))
        return self._catalog.infos(name)

    def alias(self, name: str, alias: str, version: str | None) -> None:
        """Point ``name@alias`` at a version; ``None`` removes the alias.

        Raises NotFoundError for an unknown version or alias, ArgumentError when the alias is
        also a version, ReadOnlyError, ConflictError.
        """
        check_writable(self._adapter, "change an alias")
        from pydedup.maintenance import versions

        versions.set_alias(self._adapter, self._catalog, name, alias, version)

    def remove(
        self,
        name: str,
        *,
        all_versions: bool = False,
        keep: int | None = None,
        dry_run: bool = False,
    ) -> list[str]:
        """Remove a version, or several versions of a model together; returns their addresses.

        ``all_versions`` removes all, and aliases; ``keep`` all but so many of the newest, and but
        those that an alias points at; with ``dry_run`` nothing is removed. Space is given back by
        `vacuum`. Raises NotFoundError; ArgumentError when a bare name has several versions and
        neither is given, or when an alias still points there; ReadOnlyError, ConflictError.
        """
        if not dry_run:
            check_writable(self._adapter, "remove a model")
        from pydedup.maintenance import versions

        return versions.remove(
            self._adapter,
            self._catalog,
            name,
            all_versions=all_versions,
            keep=keep,
            dry_run=dry_run,
        )

    # ---- looking ------------------------------------------------------------------------------

    @tells_hidden
    def info(self, name: str) -> ModelFigures:
        """Return one model in numbers. Raises NotFoundError."""
        from pydedup.report.figures import model_figures

        return model_figures(self._adapter, self._catalog, name)

    @overload
    def stats(self) -> StoreStats: ...

    @overload
    def stats(self, *, by: str) -> Usage: ...

    def stats(self, *, by: str | None = None) -> StoreStats | Usage:
        """Return the store in numbers, or with ``by`` the bytes per value of a metadata key.

        Per value there are logical, shared and marginal bytes, the last being what removing its
        models would free; `pydedup.usage.Usage` says what adds up to what. Raises ArgumentError
        when ``by`` is not text. Damaged rows are left out, with ``by`` all models that cannot be
        read, and listed in ``damaged`` of the result.
        """
        if by is not None:
            from pydedup.usage import usage_by

            return usage_by(self._adapter, self._pool, by)
        from pydedup.report.figures import store_stats

        return store_stats(self._adapter, self._catalog, self._pool.stats())

    def sizes(self) -> list[ModelSize]:
        """Return what each version of each model takes, ordered by name, then age.

        Models whose record cannot be read are left out; ``damaged`` of `stats` lists them.
        """
        from pydedup.report.sizes import model_sizes

        return model_sizes(self._adapter, self._catalog)

    def sharing(self) -> list[dict[str, object]]:
        """Return which pairs of models share pages: the rows of the SQL view ``sharing``.

        A row has the columns of the view (docs/sql.md) as its keys.
        """
        from pydedup.report.sizes import shared_pages

        return shared_pages(self._adapter)

    @tells_hidden
    def explain(self, name: str) -> Explanation:
        """Say which tensors and blocks are shared with whom, and what removing would free.

        Other models that are damaged are left out; ``damaged`` of the result lists them. Raises
        NotFoundError, CorruptStoreError.
        """
        from pydedup.report.compare import explain_model

        return explain_model(self._adapter, self._catalog, self._pool, name)

    @tells_hidden
    def diff(self, a: str, b: str, *, progress: Progress | None = None) -> Diff:
        """Compare two models tensor by tensor. Raises NotFoundError, CorruptStoreError."""
        from pydedup.report.compare import diff_models

        check_progress(progress)
        return diff_models(self._adapter, self._catalog, self._pool, a, b, progress=progress)

    @tells_hidden
    def report(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        models: str | Sequence[str] = (),
        trace: Trace | None = None,
    ) -> ReportPage:
        """Return the store as one page of HTML that loads nothing; needs the extra ``report``.

        Damaged models are left out; the page says so, and ``damaged`` of the result lists them.

        Parameters
        ----------
        path
            Where to write it, if anywhere; an existing file is replaced when the page is whole.
        models
            The models to show block by block, or one; the four largest by default.
        trace
            Recorded uses of pages (from `recorded` or `pydedup.replacement.Trace.load`), replayed
            through every replacement policy.

        Raises
        ------
        NotFoundError, ArgumentError, UnsupportedFormatError
            For an unknown model, a damaged trace, a place that cannot be written to, or a missing
            package.
        CorruptStoreError
            When one of ``models`` is damaged.
        """
        from pydedup.report import page

        given: object = models
        if not isinstance(given, Iterable):
            raise ArgumentError(f"models must be names of models, or one, not {given!r:.100}")
        shown = (models,) if isinstance(models, str) else models
        return page.report(self._adapter, self._catalog, self._pool, path, shown, trace)

    @property
    def quotas(self) -> Quotas:
        """What models with a value of a metadata key may take: `set`, `remove`, iterate."""
        from pydedup.quotas import Quotas

        return Quotas(self._adapter)

    # ---- inside -------------------------------------------------------------------------------

    def _read(self, model: StoredModel, name: str, dtype: DType | None) -> NDArray[Any]:
        array = self._stored_tensor(model, name).numpy()
        if dtype is not None and array.dtype != dtype.numpy and DType.of(array.dtype).is_float:
            return as_dtype(array, dtype.numpy)
        return array

    def _artifacts(self, model: StoredModel) -> list[ArtifactOnDemand]:
        names = model.artifact_names()
        model.check_live()  # or some of them were gone already
        return [ArtifactOnDemand(name, model) for name in names if name != GRAPH_ARTIFACT]


def _first_names(model: StoredModel) -> dict[str, str]:
    """Return the first of its names for each tied tensor."""
    from pydedup.formats.ties import TIES, first_names

    kinds = {info.name: (info.dtype.label, info.shape) for info in model.tensors}
    return first_names(model.artifact(TIES), kinds)
