"""The reference pass: what is needed of the model that was tuned from, which is gone before the next is loaded.

It is built from a config and from files, and loads its model when first asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.directions.drift import on_disk
from alphatoken_curate.directions.fisher import fisher_sums
from alphatoken_curate.directions.generate import sample_answers
from alphatoken_curate.directions.parameters import rest_fisher_sums
from alphatoken_curate.directions.sums import Sums, sums_of
from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.models.devices import free_memory
from alphatoken_curate.progress import Progress
from alphatoken_curate.scoring.spec import ScorerSpec, counted
from alphatoken_curate.signals.stored import plain_losses
from alphatoken_curate.tokens.plan import Batch, batches_of, sequences
from alphatoken_curate.tokens.tokenise import AnyRow, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ReferencePass:
    """What is needed of the reference model: its Fisher, its weights of S and its losses. Nothing is kept here."""

    def __init__(self, spec: ScorerSpec) -> None:
        self.spec = spec
        self._model: PreTrainedModel | None = None
        self._scoring: ScoringModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The reference, loaded when first asked for."""
        if self._model is None:
            self._model = self.spec.load(self.spec.reference)
        return self._model

    @property
    def scoring(self) -> ScoringModel:
        """The reference, captured."""
        if self._scoring is None:
            self._scoring = self.spec.capture(self.spec.reference, self.model)
        return self._scoring

    @property
    def answering(self) -> PreTrainedModel:
        """The reference as it answers: given back where it is captured in more than its head computes in."""
        if self._scoring is not None and self._scoring.narrow:
            self._scoring.release_model()
            self._scoring = None
        return self.model

    def ready(self, progress: Progress) -> ScoringModel:
        """The same; that it is being loaded is said."""
        if self._scoring is None:
            progress.stage("loading reference", 0)
        return self.scoring

    def answers(self, prompts: Sequence[TokenRow], progress: Progress, batch_tokens: int) -> list[TokenRow]:
        """Answers the reference generates to some prompts."""
        config = self.spec.config
        return sample_answers(
            self.answering,
            prompts,
            new_tokens=config.fisher_new_tokens,
            seed=config.seed,
            batch_tokens=batch_tokens,
            progress=progress,
        )

    def fisher(self, rows: Sequence[TokenRow], progress: Progress, batch_tokens: int) -> Sums:
        """The squares whose mean over `rows` is F, of some of them; those whose loss is not finite are left out."""
        batches = counted(rows, batch_tokens, progress)
        found = self._fisher(rows, batches, progress.advance)
        if found.is_finite:
            return found
        losses = plain_losses(self.scoring, rows, batches_of(rows, batch_tokens))
        finite = [row for row, nll in zip(rows, losses, strict=True) if np.isfinite(nll).all()]
        return self._fisher(finite, batches_of(finite, batch_tokens)) if len(finite) < len(rows) else found

    def _fisher(
        self, rows: Sequence[TokenRow], batches: Iterable[Batch], done: Callable[[int], None] = lambda _: None
    ) -> Sums:
        sampled, seed = self.spec.config.fisher == "sampled", self.spec.config.seed
        found, count = fisher_sums(self.scoring, rows, batches, sampled=sampled, seed=seed)
        if self.scoring.rest:
            found += rest_fisher_sums(self.scoring, rows, sampled=sampled, seed=seed, done=done)
        return sums_of(self.scoring.names, found, {"rows": count})

    def weights(self, _progress: Progress, _batch_tokens: int) -> dict[str, NDArray[np.floating]] | None:
        """The reference's weights of S by name; None where the model's own files give them."""
        source = self.spec.reference
        if source.tensors_on_disk and on_disk(source.files_read(), self.scoring):
            return None
        return sums_of(self.scoring.names, self.scoring.weights, {}).arrays

    def losses(self, rows: Sequence[AnyRow], progress: Progress, batch_tokens: int) -> NDArray[np.float32]:
        """The nll of the response tokens of all sequences of rows, (N,)."""
        if not rows:
            return np.empty(0, np.float32)
        self.scoring.settle()  # the losses of the model that is scored are compared with these
        return np.concatenate(plain_losses(self.scoring, sequences(rows), counted(rows, batch_tokens, progress)))

    def close(self) -> None:
        """Drop the model."""
        if self._model is not None:
            self._model = self._scoring = None
            free_memory()
