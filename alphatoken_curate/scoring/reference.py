"""The reference pass: what is needed of the model that was tuned from, which is gone before the next is loaded.

It is built from a config and from files, and loads its model when first asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from alphatoken_curate.directions.drift import on_disk
from alphatoken_curate.directions.fisher import fisher_diagonal
from alphatoken_curate.directions.generate import answer_room, pack, sample_answers, unpack
from alphatoken_curate.directions.parameters import rest_fisher
from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.errors import InputError
from alphatoken_curate.models.devices import free_memory
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs import artifacts
from alphatoken_curate.scoring.spec import ScorerSpec, by_name, count_tokens, counted
from alphatoken_curate.signals.stored import plain_losses
from alphatoken_curate.tokens.plan import sequences
from alphatoken_curate.tokens.tokenise import AnyRow, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ReferencePass:
    """What is needed of the reference model: its Fisher, its weights of S and its losses. One model at a time."""

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

    def ready(self, progress: Progress) -> ScoringModel:
        """The same; that it is being loaded is said."""
        if self._scoring is None:
            progress.stage("loading reference", 0)
        return self.scoring

    def answers(self, part: int, prompts: Sequence[TokenRow], progress: Progress, batch_tokens: int) -> list[TokenRow]:
        """Answers the reference generates to some prompts, kept in a part of their own."""
        store, config = self.spec.store, self.spec.config
        if (stored := store.find(artifacts.FISHER_SAMPLES, part)) is not None:
            progress.advance(int(answer_room(prompts, new_tokens=config.fisher_new_tokens, limit=None).sum()))
            return unpack(stored, prompts, where=store.path(artifacts.FISHER_SAMPLES, part))
        found = sample_answers(
            self.model,
            prompts,
            new_tokens=config.fisher_new_tokens,
            seed=config.seed,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        store.save(artifacts.FISHER_SAMPLES, pack(found), part)
        return found

    def fisher(self, rows: Sequence[TokenRow], progress: Progress, batch_tokens: int) -> None:
        """Estimate F from rows and keep it. Raises InputError where it is not finite."""
        sampled, seed = self.spec.config.fisher == "sampled", self.spec.config.seed
        self.ready(progress)
        progress.stage("Fisher of the reference", self.spec.passes * sum(len(row.input_ids) for row in rows))
        batches = counted(rows, batch_tokens, progress)
        found = fisher_diagonal(self.scoring, rows, batches, sampled=sampled, seed=seed)
        if self.scoring.rest:
            found += rest_fisher(self.scoring, rows, sampled=sampled, seed=seed, done=progress.advance)
        if not all(torch.isfinite(f).all() for f in found):
            raise InputError(
                "The Fisher of the reference is not finite, so stability cannot be scored: some row's loss under"
                " --reference is not, or its squared gradient overflows. Check its weights, or give a --fisher FILE."
            )
        self.spec.store.save(artifacts.FISHER, by_name(self.scoring, found))

    def weights(self) -> None:
        """Keep the reference's weights of S, unless its files give them tensor by tensor under the model's names."""
        reference, store = self.spec.reference, self.spec.store
        if store.has(artifacts.REFERENCE) or (reference.tensors_on_disk and self._model is None):
            return  # whoever needs them reads them, and no model is loaded for that alone
        if not (reference.tensors_on_disk and on_disk(reference.weight_files(), self.scoring)):
            store.save(artifacts.REFERENCE, by_name(self.scoring, self.scoring.weights))

    def losses(self, shard: int, rows: Sequence[AnyRow], progress: Progress, batch_tokens: int) -> None:
        """Keep the reference's nll of a shard's response tokens, sequence by sequence, in one tensor."""
        if self.spec.store.has(artifacts.REFERENCE_NLL, shard):
            progress.advance(count_tokens(rows))
            return
        self.scoring.settle()  # the losses of the model that is scored are compared with these
        found = plain_losses(self.scoring, sequences(rows), counted(rows, batch_tokens, progress))
        nll = torch.cat([torch.empty(0), *map(torch.from_numpy, found)])
        self.spec.store.save(artifacts.REFERENCE_NLL, {"nll": nll}, shard)

    def close(self) -> None:
        """Drop the model."""
        self._model = self._scoring = None
        free_memory()
