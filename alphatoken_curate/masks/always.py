"""Which response tokens a mask always keeps: `--always-keep`, told from what the scoring stored. No model is needed.

Arrays have one entry per response token of one branch, or of some shards of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from alphatoken_curate.config import MaskConfig
from alphatoken_curate.errors import UsageError
from alphatoken_curate.masks import choose, criteria, formulas
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.manifest import Manifest
from alphatoken_curate.runs.schema import PREFERENCE, SFT, VOCABULARY, VOCABULARY_COLUMNS, Components, Layout, absent
from alphatoken_curate.wording import nearest

END_OF_TURN = "end_of_turn"
"""The column of values/ that says which tokens end an answer."""

BY_KIND = ("end-of-turn", "special")
"""What keeps a token for what it is, and says nothing of what it teaches."""

_WORDS = (*BY_KIND, "none")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Always:
    """What is always kept. `columns`: the stored columns that `of` needs."""

    name: str
    columns: tuple[str, ...]
    special: NDArray[np.int32] | None = None

    def of(self, columns: Mapping[str, NDArray[Any]], **how: Any) -> NDArray[np.bool_]:
        """Whether each token is, (n,); `how`: as `criteria.selection` takes it. Raises `UsageError` as that does."""
        if self.name == "end-of-turn":
            return columns[END_OF_TURN]
        if self.special is not None:
            return np.isin(columns["token_id"], self.special)
        with _told_of(self.name):
            found: NDArray[np.bool_] = (
                criteria.selection(criteria.as_number(self.name, how["layout"]), columns, **how) > 0
            )
        return found


def check(name: str, components: Components, layout: Layout = SFT) -> None:
    """Raise `UsageError` for what `--always-keep` cannot be in such a run."""
    if name not in _WORDS:
        _columns(name, components, layout)


def columns_named(name: str) -> frozenset[str]:
    """Columns that `--always-keep` names, where it is an expression."""
    return frozenset() if name in _WORDS else criteria.columns_named(criteria.as_number(name, PREFERENCE))


def depends_on_value(name: str) -> bool:
    """Whether the stability settings of a mask change what it always keeps."""
    return any(map(criteria.depends_on_value, columns_named(name)))


def always_kept(run: Path, stored: Manifest, config: MaskConfig) -> Always | None:
    """What the mask of these settings always keeps; None where it drops nothing, or end-of-turn tokens are not stored.

    Raises `UsageError` for what cannot be told of this run, `StoredDataError` where its vocabulary is damaged.
    """
    name = config.always_keep
    if name == "none" or (choose.parse_keep(config.keep) == 1 and not formulas.drops(config.weights)):
        return None
    if name == "end-of-turn":
        return None if END_OF_TURN in absent(stored.schema_version) else Always(name=name, columns=(END_OF_TURN,))
    if name == "special":
        return Always(name=name, columns=("token_id",), special=special_ids(run, stored))
    return Always(name=name, columns=_columns(name, manifest.components(stored), manifest.layout(stored)))


def _columns(name: str, components: Components, layout: Layout) -> tuple[str, ...]:
    with _told_of(name):
        number = criteria.as_number(name, layout)
        if name == "random" or not criteria.is_of_single_tokens(number, layout):
            raise UsageError(
                f"{name!r} is not told of each token alone. Give {', '.join(_WORDS)}, or an expression of single"
                ' tokens, such as "nll < 0.1"'
            )
        return criteria.columns_needed(number, components, layout)


@contextmanager
def _told_of(name: str) -> Iterator[None]:
    """What is wrong is said of the setting as it was given, and of a word that it may stand for."""
    try:
        yield
    except UsageError as error:
        told = str(error).replace(f"CAST(({name}) AS INT)", name).removeprefix("by: ")
        raise UsageError(f"always-keep:{nearest(name, _WORDS)} {told}") from error


def special_ids(run: Path, stored: Manifest) -> NDArray[np.int32]:
    """(S,) the special tokens of the run's vocabulary."""
    if VOCABULARY not in {file.path for file in stored.files} or "special" in absent(stored.schema_version):
        raise UsageError(
            f"always-keep: {run} does not say which tokens are special: it was scored without a tokenizer, or by an"
            ' early release. Give end-of-turn, none or an expression, such as "token_id = 2"'
        )
    manifest.check_file(run, stored, VOCABULARY)
    table = pq.read_table(run / VOCABULARY, schema=VOCABULARY_COLUMNS, columns=["token_id", "special"])
    ids: NDArray[np.int32] = table["token_id"].filter(table["special"]).to_numpy()
    return ids
