"""Whether the model to train is one for the rows: their tokens are ids, and another model takes them without a word.

Rows of `as_dataset` know their run by the description of their dataset, which goes along wherever datasets copies it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from alphatoken_curate.errors import ModelError, UsageError
from alphatoken_curate.models.load import find_model, load_tokenizer, tokenizer_digest
from alphatoken_curate.reading.trainset import TrainSet, open_train
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.schema import PREFERENCE
from alphatoken_curate.tokens.likeness import check_same_tokens

if TYPE_CHECKING:
    from datasets import Dataset

_IDS = ("input_ids", *(f"{prefix}input_ids" for prefix in PREFERENCE.branches))
_MARK = "alphatoken-curate rows of the run "
_DO = "Train the model that was scored, with its tokenizer, or score the rows again with this one (--model)."


def marked(rows: Dataset, run: Path) -> Dataset:
    """Rows that know the run they are of, for `check_model`."""
    rows.info.description = f"{_MARK}{run.resolve()}"
    return rows


def check_tokenizer(opened: TrainSet, tokenizer: Any) -> None:
    """Raise ModelError where a tokenizer gives other tokens than the rows of a run are made of."""
    ids = _unique(pq.read_table(path, columns=_columns(opened)) for path in opened.files())
    check_same_tokens(opened.run, ids, tokenizer, _tokenizer_called(tokenizer), do=_DO)


def check_model(model: Any, processing_class: Any, rows: Any) -> None:
    """Raise UsageError where a trainer's model or tokenizer is none for its rows, or for one of several sets of rows.

    The tokenizer is `processing_class`, and that of the folder or Hub id the model is from, where it is on this
    machine: of that one tokens count that both have. Where the run of the rows is not known, or has no vocabulary, the
    embeddings must be enough. Rows are looked for in torch's wrappers too, and where `datasets` streams from memory; of
    others that are streamed nothing is known.
    """
    for one in _parts(rows):
        runs, ids = _runs(one), _ids(one)
        if ids is None and not runs:
            continue
        for run in runs:
            check_run(model, processing_class, run, ids)
        if ids is not None:
            _check_embeddings(model, ids, None)


def check_run(model: Any, processing_class: Any, run: Path, ids: NDArray[np.integer] | None = None) -> None:
    """The same for the rows of a run, or for some of them, which use these token ids."""
    used = ids if ids is not None else _of_run(run)
    _check_embeddings(model, used, run)
    _check_tokenizers(model, processing_class, run, used)


def _check_embeddings(model: Any, ids: NDArray[np.integer], run: Path | None) -> None:
    known, largest = _embeddings(model), int(ids.max(initial=-1))
    if known is not None and largest >= known:
        whose = f" of {run}, which are tokens of {_scored(run)}," if run is not None else ""
        raise UsageError(
            f"{_called(model)}: its embeddings are of {known:,} tokens, and the rows{whose} use token {largest:,}."
            f" {_DO} Where its tokenizer was given new tokens, call resize_token_embeddings first."
        )


def _check_tokenizers(model: Any, processing_class: Any, run: Path, ids: NDArray[np.integer]) -> None:
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        check_same_tokens(run, ids, tokenizer, _tokenizer_called(tokenizer), do=_DO)
    name = getattr(model, "name_or_path", None)
    if not name or name == getattr(tokenizer, "name_or_path", None):
        return
    try:
        source = find_model(str(name), local=True)
        if tokenizer_digest(source) == manifest.read(run).digests.get("tokenizer"):
            return
        own = load_tokenizer(source)
    except (ModelError, OSError):  # not on this machine any more, or only by code of its own
        return
    if own is not None:
        check_same_tokens(run, ids, own, str(name), do=_DO, own=False)


def _embeddings(model: Any) -> int | None:
    try:
        layer = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    known = getattr(layer, "num_embeddings", None)
    if known is None and (weight := getattr(layer, "weight", None)) is not None:
        known = len(weight)
    return known or getattr(getattr(model, "config", None), "vocab_size", None)


def _called(thing: Any) -> str:
    return str(getattr(thing, "name_or_path", "") or type(thing).__name__)


def _tokenizer_called(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "the tokenizer that was given"


def _scored(run: Path) -> str:
    return manifest.read(run).generations[0].checkpoint


def _parts(rows: Any) -> Iterator[Any]:
    """The sets of rows that these are made of: by name, or as the wrappers of torch and `datasets` hold them."""
    if isinstance(rows, Mapping):
        inner = list(rows.values())
    elif several := getattr(rows, "datasets", None):  # torch's ConcatDataset and ChainDataset
        inner = list(several.values()) if isinstance(several, Mapping) else list(several)
    elif (one := getattr(rows, "dataset", None)) is not None and not isinstance(one, str):  # torch's Subset
        inner = [one]
    else:
        inner = _streamed(rows)
    if not inner:
        yield rows
    for one in inner:
        yield from _parts(one)


def _streamed(rows: Any) -> list[Any]:
    """The sets in memory that a `datasets.IterableDataset` reads from, through whatever is done to their rows."""
    found: list[Any] = []
    left = [getattr(rows, "_ex_iterable", None)]
    while left:
        if (one := left.pop()) is None:
            continue
        left += [getattr(one, "ex_iterable", None), *(getattr(one, "ex_iterables", None) or ())]
        shards = (getattr(one, "kwargs", None) or {}).get("shards") or ()
        found += [shard for shard in shards if hasattr(shard, "column_names")]
    return found


def _runs(rows: Any) -> list[Path]:
    """The runs that rows are of, as far as they know and the runs are there."""
    if isinstance(run := getattr(rows, "run", None), Path):
        return [run]
    told = str(getattr(getattr(rows, "info", None), "description", None) or "").split("\n\n")
    runs = [Path(line.removeprefix(_MARK)) for line in told if line.startswith(_MARK)]
    return [run for run in runs if (run / manifest.NAME).is_file()]


def _ids(rows: Any) -> NDArray[np.integer] | None:
    """The token ids that rows use, ascending; None where they are not in memory or mapped."""
    if isinstance(rows, list | tuple):
        return _of_list(rows)
    table = getattr(rows, "data", None)
    names = [name for name in getattr(rows, "column_names", None) or () if name in _IDS]
    return _unique([table.select(names).table]) if table is not None and names else None


def _of_list(rows: Sequence[Any]) -> NDArray[np.integer] | None:
    """The token ids of rows that are objects, ascending; None where some are none, or have none."""
    found: set[int] = set()
    for row in rows:
        lists = [np.asarray(row[name]) for name in _IDS if name in row] if isinstance(row, Mapping) else []
        if not lists or any(ids.dtype.kind not in "iu" and ids.size for ids in lists):
            return None
        for ids in lists:
            found.update(np.unique(ids).tolist())
    return np.array(sorted(found), np.int64) if found else None


def _of_run(run: Path) -> NDArray[np.integer]:
    opened = open_train(run)
    return _unique(pq.read_table(path, columns=_columns(opened)) for path in opened.files())


def _columns(opened: TrainSet) -> list[str]:
    return [prefix + "input_ids" for prefix in opened.layout.branches]


def _unique(tables: Iterable[pa.Table]) -> NDArray[np.integer]:
    found: NDArray[np.integer] = np.empty(0, np.int64)
    for table in tables:
        for column in table.columns:
            found = np.union1d(found, pc.unique(pc.list_flatten(column)).to_numpy())
    return found
