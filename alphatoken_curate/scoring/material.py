"""What a rehearsal is made of: all rows, and those of its outcomes; in memory, or put away for other processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.directions.groups import deal
from alphatoken_curate.directions.step_losses import TOKENS, StepLoss
from alphatoken_curate.runs.artifacts import REHEARSAL, Store
from alphatoken_curate.scoring.courses import pair_loss
from alphatoken_curate.scoring.job import Job
from alphatoken_curate.scoring.spec import ScorerSpec
from alphatoken_curate.tokens.packed import pack, unpack
from alphatoken_curate.tokens.plan import token_starts
from alphatoken_curate.tokens.tokenise import AnyRow, TokenRow, branches, chosen

_ROWS, _REFERENCE = "rows", "reference"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Training:
    """The rows that train, those whose losses are finite, and the loss that their steps take."""

    rows: Sequence[AnyRow]
    places: NDArray[np.int64]
    """(N,) where their response tokens are among those of all rows."""
    begins: NDArray[np.float32]
    """(N,) their nll where the training begins."""
    loss: StepLoss


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Material:
    """All rows, those of `target` and `retention`, and of pairs the reference's nll of all response tokens, (N,).

    `reference` is None of other rows, and where the model is its own.
    """

    rows: Sequence[AnyRow]
    target: Sequence[TokenRow]
    retention: Sequence[TokenRow]
    reference: NDArray[np.float32] | None

    def put_away(self, store: Store) -> None:
        """Among the artefacts, where whoever has the store finds it (`put_away_in`)."""
        if not store.is_made(REHEARSAL, _ROWS):
            parts = {name: _packed(getattr(self, name)) for name in (_ROWS, "target", "retention")}
            parts |= {} if self.reference is None else {_REFERENCE: torch.from_numpy(self.reference)}
            store.save(REHEARSAL, parts, _ROWS)

    def groups(self, spec: ScorerSpec) -> dict[str, list[list[TokenRow]]]:
        """The rows of each outcome but the drift, by the prefix of its signals; all in one without errors."""
        found = {"adapt": self.target} | ({"stab": self.retention} if self.retention else {})
        return {name: deal(rows, spec.groups, spec.config.seed) for name, rows in found.items()}

    def training(self, config: ScoreConfig, nll: NDArray[np.float32]) -> Training:
        """What trains, by the nll of all response tokens where the training begins, (N,)."""
        reference = nll if self.reference is None else self.reference
        known = np.isfinite(nll) & np.isfinite(reference)
        each = len(branches(self.rows[0])) if self.rows else 1
        places = [np.arange(*both) for both in pairwise(token_starts(self.rows)[::each].tolist())]
        mine = [i for i, of_row in enumerate(places) if known[of_row].all()]
        rows, taken = [self.rows[i] for i in mine], np.concatenate([np.empty(0, np.int64), *(places[i] for i in mine)])
        loss = pair_loss(config, rows, reference[taken]) if each > 1 else TOKENS
        return Training(rows=rows, places=taken, begins=nll[taken], loss=loss)


def material_of(job: Job, spec: ScorerSpec) -> Material:
    """That of a job, whose reference's losses are there."""
    reference = None
    if job.layout.kind == "preference" and spec.has_reference:
        kept = (spec.reference_losses(n, rows) for n, rows in enumerate(job.shards) if rows)
        reference = np.concatenate([part for parts in kept for part in parts or ()])
    return Material(rows=[*job.rows], target=job.target, retention=job.retention, reference=reference)


def put_away_in(store: Store) -> Material:
    """What another process put away."""
    found = store.require(REHEARSAL, part=_ROWS)
    reference = found.get(_REFERENCE)
    return Material(
        rows=_unpacked(found[_ROWS]),
        target=[chosen(row) for row in _unpacked(found["target"])],
        retention=[chosen(row) for row in _unpacked(found["retention"])],
        reference=None if reference is None else reference.numpy(),
    )


def _packed(rows: Sequence[AnyRow]) -> Tensor:
    """Rows as the bytes of an Arrow file."""
    table, sink = pack(rows), pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return torch.from_numpy(np.frombuffer(sink.getvalue(), np.uint8).copy())


def _unpacked(data: Tensor) -> list[AnyRow]:
    return unpack(pa.ipc.open_file(pa.py_buffer(data.numpy())).read_all())
