"""Whether rows are within what models know: no sequence longer than their positions, no token beyond a reference's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from alphatoken_curate.errors import InputError
from alphatoken_curate.models.load import ModelSource, text_config, vocabulary_size
from alphatoken_curate.models.positions import reach_of
from alphatoken_curate.rows.files import visible
from alphatoken_curate.tokens.dealt import Rows
from alphatoken_curate.tokens.tokenise import AnyRow, TokenRow, branches
from alphatoken_curate.wording import count


def check_lengths(source: ModelSource, rows: Rows, kind: str, beside: Sequence[TokenRow]) -> None:
    """Raise InputError where a row, or one beside DATA, is longer than the model's positions go.

    Of a GGUF file nothing says so before it is loaded.
    """
    reach = None if source.gguf else reach_of(text_config(source))
    if reach is None:
        return
    longest = rows.columns["width"] // (2 if kind == "preference" else 1)
    places = (longest > reach.tokens).nonzero()[0].tolist()
    longer = [row for row in beside if len(row.input_ids) > reach.tokens]
    if not places and not longer:
        return
    first = rows.pick(places[:1])[0] if places else longer[0]
    end = (
        f"from there on its positions ({reach.rope_type}) go by the longest row of a batch, so that no number is a"
        " row's own"
        if reach.rope_type
        else "its positions end there"
    )
    tokens = max(len(one.input_ids) for one in branches(first))
    raise InputError(
        f"{_place(first)} has {tokens:,} tokens, the first of {count(len(places) + len(longer), 'row')} over"
        f" {source.name}'s {reach.tokens:,}: {end}. Give --max-length {reach.tokens}."
    )


def check_known(reference: ModelSource, model: ModelSource, rows: Iterable[AnyRow]) -> None:
    """Raise InputError where a row has a token that a reference of less tokens than the model does not know."""
    known, wanted = vocabulary_size(reference), vocabulary_size(model)
    if known is None or wanted is None or known >= wanted:
        return
    for row in rows:
        for one in branches(row):
            if (new := one.input_ids[one.input_ids >= known]).size:
                raise InputError(
                    f"{_place(row)} has token {new[0]}, which the reference {reference.name} does not know: it has"
                    f" {known:,} tokens, and {model.name} {wanted:,}. Resize the reference alike"
                    " (resize_token_embeddings) and save it, or leave --reference out."
                )


def _place(row: AnyRow) -> str:
    first = branches(row)[0]
    return f"{visible(first.source)}:{first.line}"
