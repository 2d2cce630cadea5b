# SPDX-License-Identifier: Apache-2.0
"""`Store`: what users hold. It delegates to ingest, serving, maintenance and report."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydedup import codec, config, registry
from pydedup.adapter import SCHEMA_VERSION, Adapter
from pydedup.catalog import Catalog, StoredModel, listed, page_readers
from pydedup.errors import (
    ArgumentError,
    NotAStoreError,
    NotFoundError,
    PydedupError,
    ReadOnlyError,
    SchemaVersionError,
)
from pydedup.formats.base import Artifact, TensorEntry
from pydedup.formats.registry import open_source, write_model
from pydedup.graph import Graph
from pydedup.hashing import HASH_VERSION
from pydedup.ingest.add import add_models
from pydedup.ingest.plan import Request, plan_address
from pydedup.jobs import LEASE_SECONDS
from pydedup.maintenance import versions
from pydedup.maintenance.blocks_from import block_source
from pydedup.maintenance.recheck import Evaluate, recheck
from pydedup.maintenance.repair import repair
from pydedup.maintenance.vacuum import VacuumReport, plan_vacuum, vacuum_store
from pydedup.maintenance.verify import VerifyReport, verify_store
from pydedup.moving.backup import backup_store, restore_store
from pydedup.moving.copy import copy_models
from pydedup.moving.plan import plan_copy
from pydedup.moving.source import End
from pydedup.names import check_name
from pydedup.policies import Lossless, Policy
from pydedup.pool import PagePool
from pydedup.quotas import Quotas
from pydedup.report.compare import Diff, Explanation, diff_models, explain_model
from pydedup.report.figures import ModelFigures, StoreStats, model_figures, store_stats
from pydedup.report.sizes import ModelSize, model_sizes
from pydedup.serving.engine import run_graph
from pydedup.serving.tensor import StoredTensor, TensorsOnDemand
from pydedup.types import GRAPH_ARTIFACT, AddReport, CopyReport, DType, ModelInfo, Progress
from pydedup.usage import Usage, usage_by

if TYPE_CHECKING:
    import torch

__all__ = ["ModelInput", "Store", "open"]

# Part of the memory budget that is not the pool's: buffers of adds and of kernels.
_SCRATCH_BYTES = 48 * 1024 * 1024

# Budget of the store at the other end of a backup, where only bases and what is compared is read.
_OTHER_END_BYTES = 128 * 1024 * 1024

#: A file or folder of a known format, a mapping of arrays or tensors, or a torch module.
ModelInput = Any


def open(
    url: str | os.PathLike[str],
    *,
    mode: str = "a",
    memory: str | int = "512MiB",
    schema: str | None = None,
) -> Store:
    """Open a store, or create it.

    Parameters
    ----------
    url
        ``sqlite:///models.db`` (a relative path), ``sqlite:////abs/models.db``; a plain path is a
        SQLite file.
    mode
        ``"a"`` reads and writes and creates what is missing; ``"r"`` never creates or writes.
    memory
        Budget, e.g. ``"512MiB"``: the buffer pool, and buffers of adds (beside the one tensor
        that an add reads at a time).
    schema
        Schema to live in, where the database has such a thing.

    Raises
    ------
    ArgumentError
        For a URL, mode or size that cannot be understood.
    NotAStoreError, SchemaVersionError, UnavailableError, ReadOnlyError
        When there is no store, one of a newer pydedup, no database, or no way to write it.
    """
    if mode not in ("a", "r"):
        raise ArgumentError(
            f"mode {mode!r} is unknown; use 'a' (read and write) or 'r' (read only)"
        )
    budget = config.parse_bytes(memory)
    adapter = registry.connect(str(os.fspath(url)), mode=mode, schema=schema)
    try:
        _check_schema(adapter, mode)
        return Store(adapter, budget)
    except BaseException:
        adapter.close()
        raise


def _check_schema(adapter: Adapter, mode: str) -> None:
    version = adapter.schema_version()
    if version is None:
        if mode == "r":
            raise NotAStoreError(
                f"{adapter.url} holds no pydedup store; open it with mode 'a' to create one"
            )
        adapter.create_schema(
            {
                "store_id": uuid.uuid4().hex,
                "hash_version": str(HASH_VERSION),
                "page_format": str(codec.PAGE_VERSION),
            }
        )
    elif version > SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{adapter.url} was written by a newer pydedup (schema {version}, this one knows "
            f"{SCHEMA_VERSION}); upgrade pydedup"
        )


def _connect_to_read(url: str) -> Adapter:
    """Open a store to read from, with nothing but its adapter."""
    adapter = registry.connect(url, mode="r")
    try:
        _check_schema(adapter, "r")
        return adapter
    except BaseException:
        adapter.close()
        raise


class Store:
    """One pydedup store. Safe between threads; usable after a fork; a context manager."""

    def __init__(self, adapter: Adapter, memory_bytes: int) -> None:
        self._adapter = adapter
        self._catalog = Catalog(adapter)
        scratch = min(_SCRATCH_BYTES, memory_bytes // 2)
        self._pool = PagePool(adapter.read_pages, memory_bytes - scratch, self._of_damaged)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<pydedup.Store {self._adapter.url}>"

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
        self._pool.clear()
        self._adapter.close()

    # ---- in -----------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        source: ModelInput,
        *,
        policy: Policy | None = None,
        version: str | None = None,
        graph: Graph | None = None,
        metadata: Mapping[str, Any] | None = None,
        block_shape: tuple[int, int] | None = None,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> AddReport:
        """Add a model, all of it or nothing.

        Parameters
        ----------
        name
            ``name`` (gets the next whole number as its version) or ``name@version``.
        source
            Path of a known format, mapping of tensor names to arrays, or torch module.
        policy
            The guarantee; `policies.Lossless` by default.
        graph
            Layers naming tensors, for `predict`; inferred where the source tells.
        metadata
            JSON-able; kept with the model.
        block_shape
            (rows, cols) of blocks; by default near-square blocks of at most 16 KiB.
        dry_run
            Say what would be stored, and write nothing.
        progress
            Called as ``progress(stage, done, total)``, in bytes.

        Raises
        ------
        DuplicateError, QuotaError, ArgumentError, FormatError, NotFoundError, ReadOnlyError,
        ConflictError, StorageFullError
            The store is as it was before.
        """
        return self._add(
            {name: source}, policy, version, graph, metadata, block_shape, dry_run, progress
        )[0]

    def add_many(
        self,
        models: Mapping[str, ModelInput],
        *,
        policy: Policy | None = None,
        metadata: Mapping[str, Any] | None = None,
        block_shape: tuple[int, int] | None = None,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> list[AddReport]:
        """Add several models with one joint layout, all of them or none; see `add`."""
        return self._add(models, policy, None, None, metadata, block_shape, dry_run, progress)

    def _add(
        self,
        models: Mapping[str, ModelInput],
        policy: Policy | None,
        version: str | None,
        graph: Graph | None,
        metadata: Mapping[str, Any] | None,
        block_shape: tuple[int, int] | None,
        dry_run: bool,
        progress: Progress | None,
    ) -> list[AddReport]:
        if not dry_run:
            self._check_writable("add a model")
        with contextlib.ExitStack() as opened:
            requests: list[Request] = []
            for name, given in models.items():
                base, number = plan_address(self._adapter, name, version)
                source = opened.enter_context(open_source(given))
                request = Request(
                    name=base,
                    version=number,
                    source=source,
                    policy=policy or Lossless(),
                    graph=graph or source.graph,
                    metadata=metadata or {},
                    block_shape=block_shape,
                )
                request.metadata_json()
                if graph is not None:
                    graph.validate({entry.name: entry.shape for entry in source.entries})
                if any(other.address == request.address for other in requests):
                    raise ArgumentError(f"{request.address} is named twice in one add")
                requests.append(request)
            return add_models(
                self._adapter, self._pool, requests, dry_run=dry_run, progress=progress
            )

    # ---- out ----------------------------------------------------------------------------------

    def load(self, name: str, dtype: str | None = None) -> dict[str, NDArray[Any]]:
        """Return all tensors of a model as numpy arrays (bf16 and f8 as ml_dtypes).

        ``dtype`` (e.g. ``"f32"``) converts floating-point tensors; others stay as they are.
        Raises NotFoundError, CorruptStoreError.
        """
        model = self._catalog.model(name)
        wanted = None if dtype is None else DType.of_label(dtype)
        return {info.name: self._read(model, info.name, wanted) for info in model.tensors}

    def load_torch(
        self, name: str, dtype: str | None = None, device: str | None = None
    ) -> dict[str, torch.Tensor]:
        """Return a state dict of torch tensors; needs the extra ``torch``. See `load`."""
        from pydedup.formats.torch import to_torch

        return {key: to_torch(array, device) for key, array in self.load(name, dtype).items()}

    def export(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        format: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Write a model to a file or folder of any known format, tensor by tensor.

        The format follows from the name (``.safetensors``, ``.npz``, ..., a folder for Hugging
        Face) or from ``format``. Nothing is left behind on failure. Raises UnsupportedFormatError.
        """
        model = self._catalog.model(name)
        entries = [
            TensorEntry(info.name, info.dtype, info.shape, info.name) for info in model.tensors
        ]
        write_model(
            path,
            TensorsOnDemand(
                lambda tensor: self._read(model, tensor, None), model.row.logical_bytes, progress
            ),
            entries,
            self._artifacts(model),
            model.graph(),
            format=format,
        )

    def tensor(self, name: str, tensor: str) -> StoredTensor:
        """Return one tensor to compute with where it lies. Raises NotFoundError."""
        return self._stored_tensor(self._catalog.model(name), tensor)

    def predict(self, name: str, x: ArrayLike | Mapping[str, ArrayLike]) -> Any:
        """Predict with a model whose graph the store knows, streaming its weights.

        ``x`` is an array, or a mapping of input names to arrays; the result takes the same form.
        Raises NotFoundError (also when the model has no graph), ArgumentError for inputs that do
        not fit.
        """
        model = self._catalog.model(name)
        graph = model.graph()
        if graph is None:
            raise NotFoundError(
                f"{model.address} has no graph to predict with; give add(..., graph=...), "
                "or add it from a torch.nn.Sequential, Keras or ONNX model"
            )
        if isinstance(x, Mapping):
            inputs = {key: np.asarray(value) for key, value in x.items()}
        elif len(graph.inputs) == 1:
            inputs = {graph.inputs[0]: np.asarray(x)}
        else:
            raise ArgumentError(f"{model.address} takes several inputs: {', '.join(graph.inputs)}")
        outputs = run_graph(graph, lambda tensor: self._stored_tensor(model, tensor), inputs)
        if isinstance(x, Mapping):
            return outputs
        return outputs[graph.outputs[0]] if len(graph.outputs) == 1 else outputs

    def graph(self, name: str) -> Graph | None:
        """Return the graph that `predict` runs, if the store knows one."""
        return self._catalog.model(name).graph()

    def warm(self, name: str) -> int:
        """Read a model's pages into the pool, as many as fit; returns how many it holds."""
        model = self._catalog.model(name)
        pages = [page for _, page, _, _ in self._adapter.model_pages(model.row.id)]
        return self._pool.warm(pages)

    # ---- names --------------------------------------------------------------------------------

    def models(self) -> list[ModelInfo]:
        """Return all versions of all models, ordered by name, then age."""
        return self._catalog.infos()

    def versions(self, name: str) -> list[ModelInfo]:
        """Return the versions of one model, oldest first. Raises NotFoundError."""
        self._catalog.resolve(check_name(name, "model name"))
        return self._catalog.infos(name)

    def alias(self, name: str, alias: str, version: str | None) -> None:
        """Point ``name@alias`` at a version; ``None`` removes the alias.

        Raises NotFoundError for an unknown version or alias, ArgumentError when the alias is
        also a version.
        """
        self._check_writable("change an alias")
        versions.set_alias(self._adapter, self._catalog, name, alias, version)

    def remove(self, name: str, *, all_versions: bool = False) -> list[str]:
        """Remove a version, or all versions of a model; returns their addresses.

        Space is given back by `vacuum`. Raises NotFoundError; ArgumentError when a bare name has
        several versions and ``all_versions`` is not set, or when an alias still points there.
        """
        self._check_writable("remove a model")
        return versions.remove(self._adapter, self._catalog, name, all_versions=all_versions)

    # ---- looking ------------------------------------------------------------------------------

    def info(self, name: str) -> ModelFigures:
        """Return one model in numbers. Raises NotFoundError."""
        return model_figures(self._adapter, self._catalog, name)

    @overload
    def stats(self) -> StoreStats: ...

    @overload
    def stats(self, *, by: str) -> Usage: ...

    def stats(self, *, by: str | None = None) -> StoreStats | Usage:
        """Return the store in numbers, or with ``by`` the bytes per value of a metadata key.

        Per value there are logical, shared and marginal bytes, the last being what removing its
        models would free; `pydedup.usage.Usage` says what adds up to what.
        """
        if by is not None:
            return usage_by(self._adapter, self._pool, by)
        return store_stats(self._adapter, self._pool.stats())

    def sizes(self) -> list[ModelSize]:
        """Return what each version of each model takes, ordered by name, then age."""
        return model_sizes(self._adapter, self._catalog)

    def sharing(self) -> list[dict[str, object]]:
        """Return which pairs of models share pages, as the SQL view ``sharing`` has it."""
        return self._adapter.view("sharing")

    def explain(self, name: str) -> Explanation:
        """Say which tensors and blocks are shared with whom, and what removing would free."""
        return explain_model(self._adapter, self._catalog, self._pool, name)

    def diff(self, a: str, b: str, *, progress: Progress | None = None) -> Diff:
        """Compare two models tensor by tensor."""
        return diff_models(self._adapter, self._catalog, self._pool, a, b, progress=progress)

    @property
    def quotas(self) -> Quotas:
        """Limits on what models with a value of a metadata key may take: set, remove, list."""
        return Quotas(self._adapter)

    # ---- upkeep -------------------------------------------------------------------------------

    def verify(
        self,
        *,
        evaluate: Mapping[str, Evaluate] | None = None,
        repair_from: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> VerifyReport:
        """Check every page, block and block map against what was recorded.

        Changes nothing without ``repair_from``: the URL of another store on any database, a backup,
        or the file or folder of a model. Blocks of damaged pages are then restored from it by their
        hash, as far as it has them; ``repair`` of the report says what was, and which models still
        miss what. All else goes on being served meanwhile. The other findings are those after the
        repair.

        ``evaluate`` gives the metric of models that were added with `policies.Accuracy`, by their
        address: they are evaluated again and held against their certificates. Raises NotFoundError,
        ArgumentError (another policy) and EvaluationError for these.
        """
        if repair_from is None:
            report = verify_store(self._adapter, progress=progress)
        else:
            self._check_writable("repair")
            report = self._repaired(os.fspath(repair_from), progress)
        for name, function in (evaluate or {}).items():
            model = self._catalog.model(name)
            recheck(model, self.load(model.address), function, report)
        return report

    def vacuum(
        self,
        *,
        grace_seconds: float = 0.0,
        lease_seconds: float = LEASE_SECONDS,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> VacuumReport:
        """Free what nobody uses and repack where models read too many pages.

        With ``dry_run`` only say what that would save; the store may be open for reading only.
        """
        if dry_run:
            return plan_vacuum(
                self._adapter, self._pool, grace_seconds=grace_seconds, lease_seconds=lease_seconds
            )
        self._check_writable("vacuum")
        report = vacuum_store(
            self._adapter,
            self._catalog,
            self._pool,
            grace_seconds=grace_seconds,
            lease_seconds=lease_seconds,
            progress=progress,
        )
        self._pool.clear()
        return report

    # ---- moving -------------------------------------------------------------------------------

    def copy_to(
        self,
        target: str | os.PathLike[str],
        names: Sequence[str] | None = None,
        *,
        all_versions: bool = False,
        on_conflict: str = "error",
        memory: str | int = "512MiB",
        schema: str | None = None,
        progress: Progress | None = None,
    ) -> CopyReport:
        """Copy models to another store of any database; it is created when it is not there.

        Into an empty store pages go as they are; into another one blocks that it does not have.
        Each model is published when it is complete, with its name, version, policy, certificate,
        metadata, aliases and source hashes, once what arrived was read back and held against its
        hashes. After a failure, run it again: models that are there are not copied again.

        Parameters
        ----------
        target
            URL, or path of a SQLite file.
        names
            ``name`` (its newest version), ``name@version`` or ``name@alias``; all models by
            default.
        all_versions
            Take all versions of ``names``.
        on_conflict
            What to do where the other store has another model under a ``name@version``, or another
            version under an alias: ``"error"`` before anything is copied, ``"skip"`` it, or
            ``"replace"`` that one.
        memory, schema
            For the other store, as in `pydedup.open`.
        progress
            Called as ``progress(stage, done, total)``, in bytes.

        Raises
        ------
        NotFoundError, DuplicateError, ArgumentError, CorruptStoreError, ReadOnlyError,
        ConflictError, StorageFullError, UnavailableError
            Models that were published before stay.
        """
        plan_copy(
            self._adapter, None, names, all_versions=all_versions, on_conflict=on_conflict
        )  # what is wrong with the names must not create a store
        with open(target, memory=memory, schema=schema) as other:
            other._check_writable("copy models there")
            items = plan_copy(
                self._adapter,
                other._adapter,
                names,
                all_versions=all_versions,
                on_conflict=on_conflict,
            )
            return copy_models(self._end(), other._end(), items, progress=progress)

    def backup(
        self,
        path: str | os.PathLike[str],
        *,
        replace: bool = False,
        progress: Progress | None = None,
    ) -> CopyReport:
        """Write the whole store to one file, which is a store in SQLite.

        It appears under its name when it is complete and checked. What a backup that was killed
        left in ``NAME.partial`` is gone on with. Reading and adding go on meanwhile; what is added
        after the start is not in it. A file that exists is only replaced with ``replace``. Raises
        ArgumentError, ConflictError (another backup to that file goes on) and what `copy_to` does.
        """
        return backup_store(self._end(), path, _opened, replace=replace, progress=progress)

    def restore(
        self, path: str | os.PathLike[str], *, progress: Progress | None = None
    ) -> CopyReport:
        """Copy a backup into this store, which must be empty, or hold part of that backup.

        Raises ArgumentError when it has other models, NotAStoreError when the file is no backup,
        and what `copy_to` does.
        """
        self._check_writable("restore a backup")
        return restore_store(path, self._end(), _opened, progress=progress)

    # ---- inside -------------------------------------------------------------------------------

    def _end(self) -> End:
        return End(self._adapter, self._pool)

    def _check_writable(self, what: str) -> None:
        if self._adapter.read_only:
            raise ReadOnlyError(f"cannot {what}: {self._adapter.url} is open for reading only")

    def _repaired(self, place: str, progress: Progress | None) -> VerifyReport:
        """Verify, repair what is damaged, and verify again."""
        with block_source(place, _connect_to_read, self._pool.memory_bytes) as source:
            report = verify_store(self._adapter, progress=progress)
            damaged = report.damaged_pages
            done = repair(self._adapter, self._pool, damaged, source, progress=progress)
        if damaged:
            self._catalog.refresh()
            self._adapter.checkpoint()
            report = verify_store(self._adapter, progress=progress)
        report.repair = done
        return report

    def _of_damaged(self, page_id: int) -> str:
        """Say for an error who reads a damaged page, and what to do."""
        advice = "; verify --repair-from restores it from another store, a backup or a model's file"
        try:
            readers = page_readers(self._adapter).get(page_id)
        except PydedupError:
            return advice
        return (f"; read by {listed(readers)}" if readers else "") + advice

    def _stored_tensor(self, model: StoredModel, name: str) -> StoredTensor:
        info = model.tensor(name)
        return StoredTensor(info, lambda: model.block_map(name), self._pool, model.refresh)

    def _read(self, model: StoredModel, name: str, dtype: DType | None) -> NDArray[Any]:
        array = self._stored_tensor(model, name).numpy()
        if dtype is not None and array.dtype != dtype.numpy and DType.of(array.dtype).is_float:
            return array.astype(dtype.numpy)
        return array

    def _artifacts(self, model: StoredModel) -> list[Artifact]:
        artifacts = []
        for name, media_type in self._adapter.artifacts(model.row.id):
            payload = self._adapter.artifact(model.row.id, name)
            if payload is not None and name != GRAPH_ARTIFACT:
                artifacts.append(Artifact(name, media_type, payload))
        return artifacts


@contextlib.contextmanager
def _opened(url: str, mode: str) -> Iterator[End]:
    """Open the store at the other end of a backup."""
    with open(url, mode=mode, memory=_OTHER_END_BYTES) as store:
        yield store._end()
