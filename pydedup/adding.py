# SPDX-License-Identifier: Apache-2.0
"""What adds models to a store: a part of `Store`.

As in `pydedup.store`, what serving does not need is imported where it is used.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from pydedup.adapter import Adapter
from pydedup.errors import ArgumentError
from pydedup.graph import Graph
from pydedup.names import parse_address
from pydedup.opening import check_writable
from pydedup.pool import PagePool
from pydedup.types import AddReport, Progress, check_progress

if TYPE_CHECKING:
    import torch

    from pydedup.formats.base import ModelSource
    from pydedup.ingest.add import Kept
    from pydedup.ingest.plan import Request, Taken
    from pydedup.policies import Policy

__all__ = ["ModelInput", "StoreAdds"]

#: A file or folder of a known format, a mapping of arrays or tensors, a torch module, or what
#: `pydedup.formats` opened.
ModelInput: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | torch.nn.Module | ModelSource"


class StoreAdds:
    """Adding of models, one or several with a joint layout."""

    _adapter: Adapter
    _pool: PagePool
    _kept: Kept | None = None

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
        workers: int | None = None,
        weights_key: str | None = None,
    ) -> AddReport:
        """Add a model, completely or not at all.

        Parameters
        ----------
        name
            ``name`` (gets the next whole number as its version) or ``name@version``.
        source
            Path of a known format, mapping of tensor names to arrays, or torch module.
        policy
            The guarantee; `policies.Lossless` by default.
        version
            The version, when ``name`` does not say it.
        graph
            Layers naming tensors, for `predict`; inferred where the source has them.
        metadata
            Kept with the model; must be representable as JSON.
        block_shape
            (rows, cols) of blocks, each of a page (1 MiB) at most; by default near-square blocks of
            at most 16 KiB, and whole rows of tables (16 times as long as wide, or more, with 65 to
            384 columns). Where the version before is cut otherwise, or all models alike among the
            newest ones are, so is this one: only blocks of one shape are shared.
        dry_run
            Report what would be stored, and write nothing.
        progress
            Called as ``progress(stage, done, total)``: in bytes when matching and writing, in
            evaluations when evaluating, in blocks when recording blocks.
        workers
            Threads that work on it, the caller's included; its computations use no more, either. By
            default one per core up to 4, and one where little is added. The store is the same, bit
            for bit, for any number.
        weights_key
            Of a torch checkpoint with several sets of weights in it, in a folder too, the key of
            those to add, such as ``"params_ema"``, or ``"generator.ema"`` of one inside of another.

        Raises
        ------
        DuplicateError, QuotaError, ArgumentError, FormatError, NotFoundError, EvaluationError,
        ReadOnlyError, ConflictError, StorageFullError, UnavailableError, CorruptStoreError
            The store is as it was before.
        """
        parse_address(name)  # before it is a key: what is not text may not be hashable
        terms = _Terms(policy, metadata, block_shape, version, graph, weights_key)
        (report,) = self._add({name: source}, terms, dry_run, progress, workers)
        return report

    def add_many(
        self,
        models: Mapping[str, ModelInput],
        *,
        policy: Policy | None = None,
        metadata: Mapping[str, Any] | None = None,
        block_shape: tuple[int, int] | None = None,
        dry_run: bool = False,
        progress: Progress | None = None,
        workers: int | None = None,
        weights_key: str | None = None,
    ) -> list[AddReport]:
        """Add several models with one joint layout, all of them or none; see `add`.

        With several ``workers``, models are read, hashed and encoded ahead of their turn; what is
        shared is decided in the order of ``models`` whatever their number.
        """
        terms = _Terms(policy, metadata, block_shape, weights_key=weights_key)
        return self._add(models, terms, dry_run, progress, workers)

    # ---- inside -------------------------------------------------------------------------------

    def _add(
        self,
        models: Mapping[str, ModelInput],
        terms: _Terms,
        dry_run: bool,
        progress: Progress | None,
        workers: int | None,
    ) -> list[AddReport]:
        check_progress(progress)
        if not dry_run:
            check_writable(self._adapter, "add a model")
        from pydedup._memory import give_back_after
        from pydedup.ingest.add import Kept, add_models
        from pydedup.ingest.plan import Taken

        given_as: object = models
        if not isinstance(given_as, Mapping):
            raise ArgumentError(
                "models must be a mapping of names to sources, such as {'sentiment@1': path}, not "
                f"{type(given_as).__name__}"
            )
        if not models:
            return []
        if self._kept is None:
            self._kept = Kept()
        with contextlib.ExitStack() as opened:
            requests: dict[str, Request] = {}  # by address
            taken = functools.cache(functools.partial(Taken.of, self._adapter))
            for name, given in models.items():
                request = terms.request(name, given, taken, opened)
                if request.address in requests:
                    raise ArgumentError(
                        f"{request.address} is named twice in one add: {name!r} means it, too; "
                        "give each model a version of its own"
                    )
                requests[request.address] = request
            reports = add_models(
                self._adapter,
                self._pool,
                list(requests.values()),
                dry_run=dry_run,
                progress=progress,
                workers=workers,
                kept=self._kept,
            )
        give_back_after(sum(report.logical_bytes for report in reports))
        return reports


@dataclass(frozen=True, slots=True)
class _Terms:
    """On which terms models are added, as `StoreAdds.add` takes them."""

    policy: Policy | None
    metadata: Mapping[str, Any] | None
    block_shape: tuple[int, int] | None
    version: str | None = None
    graph: Graph | None = None
    weights_key: str | None = None

    def request(
        self,
        name: str,
        given: ModelInput,
        taken: Callable[[str], Taken],
        opened: contextlib.ExitStack,
    ) -> Request:
        """Return what is to be added, checked; its source is ``opened``."""
        from pydedup.formats.registry import open_source
        from pydedup.ingest.plan import Request, plan_address
        from pydedup.policies import Lossless

        base, number, is_numbered = plan_address(taken, name, self.version)
        source = opened.enter_context(open_source(given, self.weights_key))
        request = Request(
            name=base,
            version=number,
            source=source,
            policy=Lossless() if self.policy is None else self.policy,
            graph=source.graph if self.graph is None else self.graph,
            metadata={} if self.metadata is None else self.metadata,
            block_shape=self.block_shape,
            is_numbered=is_numbered,
        )
        # There are modules without any, as norms may be.
        is_nothing = not source.entries and request.graph is None and not source.has_program
        if is_nothing and isinstance(given, (str, os.PathLike, Mapping)):
            raise ArgumentError(
                f"{source.description} has no tensors to store as {name!r}; "
                "a model is arrays by name"
            )
        if self.graph is not None:
            self.graph.validate({entry.name: entry.shape for entry in source.entries})
        return request
