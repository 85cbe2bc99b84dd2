"""What a scoring is built from: settings, models and the place of what it keeps; and how rows become its batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from alphatoken_curate.config import FISHER_MODES, ScoreConfig
from alphatoken_curate.directions.drift import read_weights
from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.engine.placement import Placement, check_placed, load_placed, placement_of
from alphatoken_curate.engine.precision import narrow
from alphatoken_curate.errors import CurateError, StoredDataError
from alphatoken_curate.models.devices import kind_of, resolve_dtype
from alphatoken_curate.models.likeness import check_alike
from alphatoken_curate.models.load import ModelSource, find_model
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs import artifacts
from alphatoken_curate.runs.artifacts import Store
from alphatoken_curate.runs.watched import Watched
from alphatoken_curate.scoring.budget import out_of_memory
from alphatoken_curate.scoring.identity import has_drift
from alphatoken_curate.scoring.prepare import Prepared, fingerprint_fields
from alphatoken_curate.scoring.reach import check_known
from alphatoken_curate.scoring.sources import digests_of
from alphatoken_curate.tokens.plan import Batch, collate, plan_batches, sequences
from alphatoken_curate.tokens.tokenise import AnyRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerSpec:
    """All a scorer needs to know; picklable."""

    config: ScoreConfig
    model: ModelSource
    reference: ModelSource
    dtype: str
    device: str
    """Of several their names, as --device has them."""
    store: Store
    maps: Mapping[str, tuple[int, ...]] | None = None
    """Names and shapes that the linear maps of S must have, where the run knows them already."""

    @property
    def has_reference(self) -> bool:
        """Whether the reference is another model than the one that is scored."""
        return self.store.fields["model"] != self.store.fields["reference"]

    @property
    def has_drift(self) -> bool:
        """Whether the drift from the reference is a direction of this run, and not zero."""
        return has_drift(self.store.fields)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Prefixes of the signals of each direction: adaptation, stability and, beside it, the drift."""
        stability = ["stab"] if self.config.retention is not None else []
        drift = [("drift" if stability else "stab")] if self.has_drift else []
        return ("adapt", *stability, *drift)

    @property
    def groups(self) -> int:
        """Groups of target rows, and of retention rows, that errors are told by; 1 where none are."""
        found = self.store.fields.get("groups", 1)
        return found if isinstance(found, int) else 1

    @property
    def directions(self) -> int:
        """How many directions rows are scored along: one for each objective, and one for each group of its rows."""
        of_rows = 1 + (self.config.retention is not None)
        return len(self.objectives) + (of_rows * self.groups if self.groups > 1 else 0)

    @property
    def outcomes(self) -> int:
        """How many outcomes a rehearsal goes back from: one for each group of rows, and the drift."""
        return self.groups * (1 + (self.config.retention is not None)) + self.has_drift

    @property
    def passes(self) -> int:
        """How often a gradient goes over its rows: what is no linear map takes a pass of its own."""
        return 2 if self.config.parameters == "all" else 1

    @property
    def estimates_fisher(self) -> bool:
        """Whether the Fisher is ours to estimate, rather than a file the user brings."""
        return self.config.fisher in FISHER_MODES

    @property
    def dtype_of_weights(self) -> str:
        """What models are loaded in: weights that train are float32, whatever they multiply in."""
        trains = self.config.rehearses and not self.config.rehearses_lora
        return "float32" if trains and narrow(getattr(torch, self.dtype)) else self.dtype

    def reference_losses(self, shard: int, rows: Sequence[AnyRow]) -> list[NDArray[np.float32]] | None:
        """The reference's nll of each sequence's response tokens; None where it is the model itself."""
        if not self.has_reference:
            return None
        stored = self.store.require(artifacts.REFERENCE_NLL, part=shard)["nll"]
        lengths = [int(row.response.sum()) for row in sequences(rows)]
        if sum(lengths) != len(stored):
            path = self.store.path(artifacts.REFERENCE_NLL, shard)
            raise StoredDataError(f"{path}: has losses of other rows. Delete it and run the same command again.")
        return [part.numpy() for part in stored.split(lengths)]

    def load(self, source: ModelSource, dtype: str | None = None) -> PreTrainedModel:
        """A model of the run, in another dtype where one is named."""
        return self._load(source, dtype or self.dtype_of_weights, self.placement)

    @property
    def placement(self) -> Placement:
        """Where models lie."""
        return placement_of(self.device, self.config.trunk_device)

    def _load(self, source: ModelSource, dtype: str, placement: Placement) -> PreTrainedModel:
        with loading(f"{source.name} was loaded"):
            model: PreTrainedModel = load_placed(
                source,
                placement,
                dtype=getattr(torch, dtype),
                layers=self.config.layers,
                directions=self.directions,
                trust_remote_code=self.config.trust_remote_code,
            )
        return model

    def capture(self, source: ModelSource, model: PreTrainedModel | None = None) -> ScoringModel:
        """A model of the run, captured; it is loaded unless it is given.

        Where it runs in less than float32, the weights of S are as its files have them nonetheless, until it settles: a
        drift of a few steps is smaller than what rounding a weight to bfloat16 changes.
        """
        model = self.load(source) if model is None else model
        with loading(f"{source.name} was loaded"):
            return self._exact(source, self._captured(model))

    def _exact(self, source: ModelSource, scoring: ScoringModel) -> ScoringModel:
        if narrow(getattr(torch, self.dtype_of_weights)):
            exact = read_weights(source.files_read(), scoring) if source.tensors_on_disk else None
            if exact is None:
                host = replace(self.placement, devices=(torch.device("cpu"),))
                exact = self._captured(self._load(source, "float32", host)).weights
            for own, weight in zip(scoring.weights, exact, strict=True):
                own.copy_(weight)
        return scoring

    def _captured(self, model: PreTrainedModel) -> ScoringModel:
        return ScoringModel(model, self.config.layers, self.config.parameters)  # type: ignore[arg-type]


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Have memory that runs out in this block told as what it is, and not as a matter of batches (`Worker.do`)."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise CurateError(
            f"Memory ran out while {what}, before any batch. Use fewer --workers, fewer --layers or a device with more"
            " memory; what is finished is kept."
        ) from error


def reference_of(prepared: Prepared) -> ModelSource:
    """The reference of a run of these rows. Raises ModelError where it is not there, or does not go with the model."""
    config = prepared.config
    reference = prepared.source if config.reference in (None, config.model) else find_model(str(config.reference))
    check_alike(prepared.source, reference)
    check_known(reference, prepared.source, prepared.every_row)
    return reference


def spec_of(
    prepared: Prepared, folder: Path, device: str, reuse: Path | None = None, watched: Watched | None = None
) -> ScorerSpec:
    """What scores the rows of a run whose artifacts/ are in `folder`; those in `reuse` are taken over.

    `device`: where they are scored (`Engine.device`). `watched`: all files it is made from, since before they were
    read. Raises FingerprintError where one changed since, UsageError and ModelError where the models or dtype named are
    not there or do not go together.
    """
    config = prepared.config
    dtype = resolve_dtype(config.dtype, kind_of(device), in_full=config.in_full)
    reference = reference_of(prepared)
    for source in (prepared.source, reference):
        check_placed(source, placement_of(device, config.trunk_device))
    fields = fingerprint_fields(prepared, reference, dtype)
    if watched is not None:
        watched.settle(digests_of(fields, prepared.inputs))
    return ScorerSpec(
        config=config,
        model=prepared.source,
        reference=reference,
        dtype=dtype,
        device=device,
        store=Store(
            folder=folder, fields=fields, reuse=reuse, rows=prepared.rows.numbered(prepared.kind), watched=watched
        ),
    )


def count_tokens(rows: Sequence[AnyRow]) -> int:
    """Tokens of all sequences of rows: what progress is told in."""
    return sum(len(sequence.input_ids) for sequence in sequences(rows))


def counted(rows: Sequence[AnyRow], batch_tokens: int, progress: Progress) -> Iterator[Batch]:
    """The planned batches of rows, each reported when it is done."""
    for indices in plan_batches(rows, batch_tokens):
        yield collate(rows, indices)
        progress.advance(count_tokens([rows[i] for i in indices]))
