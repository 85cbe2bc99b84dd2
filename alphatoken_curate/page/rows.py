"""Rows packed for a page: a few bytes a token, in blocks that the page unpacks only when it shows them.

Each block holds some 20,000 tokens: the text of each token as a number in one list of texts, which of them are kept,
and one number of each column for every response token. A stream is deflated and in base64. Numbers are float32 as they
are stored, or, where the page would grow large, one byte: a sign and the logarithm of the size.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from alphatoken_curate.masks import responses
from alphatoken_curate.page.overview import NAMES
from alphatoken_curate.page.tokens import Floats, RunTokens, token_classes
from alphatoken_curate.reading.row import rejects
from alphatoken_curate.reading.words import CLASSES, PART, spelled
from alphatoken_curate.runs import shards
from alphatoken_curate.runs.schema import SFT, STATUSES, rows_and_turns
from alphatoken_curate.tokens.draws import keyed_uniform
from alphatoken_curate.views import heat

MOST_ROWS = 10_000
"""Rows in a page; of more, that many are drawn."""

MOST_TOKENS = 2_000_000
"""Tokens in a page, prompts among them; of more, fewer rows are drawn."""

MOST_EXACT = 1_000_000
"""Numbers that are stored whole; of more, all are rounded."""

BLOCK_TOKENS = 20_000

LEVELS_EACH_SIGN = 127
"""Sizes that a rounded number can have."""

_NONE = 128
"""The code of a number that is not there."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedRows:
    """`parts`: the streams by their names in the page, as base64; `shown` rows of `total`; whether numbers are `exact`.

    `columns`: what tokens can be coloured by.
    """

    parts: Mapping[str, str]
    shown: int
    total: int
    exact: bool
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sequence:
    """One branch of a row: T tokens and which of them respond."""

    ids: NDArray[np.int32]
    response: NDArray[np.bool_]


def pack_rows(run: Path, tokens: RunTokens) -> PackedRows:
    """The rows of a run, or a sample of them. Raises `StoredDataError` for damage."""
    chosen = _choose(run, tokens)
    sequences = _sequences(run, tokens, chosen)
    texts, streams = _spelled(sequences, tokens)
    blocks = _blocks([sum(len(one.ids) for one in row) for row in sequences])
    columns = _columns(tokens)
    places = [_places(tokens, chosen[a:b]) for a, b in blocks]
    exact = sum(map(len, places)) * len(columns) <= MOST_EXACT
    coded = {} if exact else {name: _scale_of_codes(values) for name, values in columns.items()}
    parts = {}
    branches = len(tokens.layout.branches)
    for number, ((a, b), place) in enumerate(zip(blocks, places, strict=True)):
        parts[f"d-{number}-t"] = _stream(varints(np.concatenate(streams[a * branches : b * branches])))
        if tokens.weight is not None:
            parts[f"d-{number}-k"] = _stream(np.packbits(tokens.weight[place] > 0, bitorder="little").tobytes())
        for index, (name, values) in enumerate(columns.items()):
            parts[f"d-{number}-{index}"] = _stream(
                planes(values[place]) if exact else codes(values[place], *coded[name]).tobytes()
            )
    about = {
        "rows": _row_facts(tokens, chosen, sequences),
        "blocks": [a for a, _ in blocks],
        "columns": [
            *(_column(tokens, name, values, coded.get(name)) for name, values in columns.items()),
            *_constant(tokens),
        ],
        "weight": _one_weight(tokens),
        "classes": CLASSES,
        "branches": [prefix.rstrip("_") for prefix in tokens.layout.branches],
        "statuses": STATUSES,
        "sources": [heat.readable(source, alone=True, dots=False) for source in tokens.rows.sources],
        "reasons": _reasons(run, tokens, set(rows_and_turns(tokens.rows.keys[chosen])[0].tolist())),
        "masked": tokens.weight is not None,
        "exact": exact,
        **texts,
    }
    parts["d-about"] = _stream(orjson.dumps(about))
    names = (*columns, *(one["name"] for one in _constant(tokens)))
    return PackedRows(parts=parts, shown=len(chosen), total=len(tokens.rows), exact=exact, columns=names)


# ------------------------------------------------------------------------------------------------------ which rows


def _choose(run: Path, tokens: RunTokens) -> NDArray[np.int64]:
    """Which of the rows to show, ascending: all, or those with the lowest draws, as many as there is room for."""
    lengths = np.zeros(len(tokens.rows), np.int64)
    for table in _tables(run, tokens, ["input_ids"]):
        for prefix in tokens.layout.branches:
            lengths[_rows_of(tokens, table)] += pc.list_value_length(table[prefix + "input_ids"]).to_numpy()
    return drawn_rows(lengths, MOST_ROWS, MOST_TOKENS)


def drawn_rows(lengths: NDArray[np.int64], most_rows: int, most_tokens: int) -> NDArray[np.int64]:
    """Numbers of rows, ascending: in the order of their draws, as many as both limits allow, at least one."""
    order = np.argsort(keyed_uniform(0, np.arange(len(lengths)), 0), kind="stable")
    if len(lengths) <= most_rows and lengths.sum() <= most_tokens:
        return np.sort(order)
    fits = int(np.searchsorted(np.cumsum(lengths[order]), most_tokens, side="right"))
    return np.sort(order[: max(1, min(most_rows, fits))])


def _tables(run: Path, tokens: RunTokens, lists: Sequence[str]) -> Iterator[pa.Table]:
    names = ["row_id", "turn", *(prefix + name for prefix in tokens.layout.branches for name in lists)]
    for shard in tokens.generation.shards:
        yield shards.read_shard(run, shard, tokens.layout.values, names)


def _rows_of(tokens: RunTokens, table: pa.Table) -> NDArray[np.int64]:
    """Which of the run's rows those of a shard are, (r,)."""
    return tokens.rows.places(responses.sequences_of(table))


def _sequences(run: Path, tokens: RunTokens, chosen: NDArray[np.int64]) -> list[list[_Sequence]]:
    """Of each chosen row, its branches."""
    found: list[list[_Sequence]] = []
    for whole in _tables(run, tokens, ["input_ids", "response"]):
        table = whole.filter(pa.array(np.isin(_rows_of(tokens, whole), chosen)))
        branches = []
        for prefix in tokens.layout.branches:
            ids, lengths = shards.entries(table[prefix + "input_ids"])
            response, _ = shards.entries(table[prefix + "response"])
            ends = np.cumsum(lengths)[:-1]
            pairs = zip(np.split(ids, ends), np.split(response, ends), strict=True)
            branches.append(
                [_Sequence(ids=one.astype(np.int32), response=there.astype(np.bool_)) for one, there in pairs]
            )
        found += map(list, zip(*(one[: table.num_rows] for one in branches), strict=True))
    return found


def _blocks(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """First and last row (not included) of each block."""
    starts, held = [0], 0
    for row, length in enumerate(lengths):
        if held and held + length > BLOCK_TOKENS:
            starts.append(row)
            held = 0
        held += length
    return list(zip(starts, [*starts[1:], len(lengths)], strict=True)) if lengths else []


def _places(tokens: RunTokens, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the response tokens of these rows are among all, row by row and branch by branch."""
    spans = tokens.spans(rows).reshape(-1, 2).tolist()
    return np.concatenate([np.empty(0, np.int64), *(np.arange(*span) for span in spans)])


# ------------------------------------------------------------------------------------------------------------- texts


def _spelled(sequences: Sequence[Sequence[_Sequence]], tokens: RunTokens) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    """The texts that tokens add to their rows, commonest first, and for each sequence the numbers of its own."""
    flat = [one.ids for row in sequences for one in row]
    ids = np.unique(np.concatenate([np.empty(0, np.int32), *flat]))
    vocabulary = tokens.vocabulary
    kind_of = dict(zip(ids.tolist(), token_classes(ids, vocabulary).tolist(), strict=True))
    known: dict[tuple[str, int], int] = {}

    def number_of(text: str, token_id: int) -> int:
        return known.setdefault((text, kind_of[token_id]), len(known))

    alone = [vocabulary.texts.get(number) or f"<{number}>" for number in ids.tolist()]
    numbers = np.array([number_of(text, i) for text, i in zip(alone, ids.tolist(), strict=True)], np.int64)
    cut = np.array([PART in text for text in alone], np.bool_)
    streams = []
    for one in flat:
        where = np.searchsorted(ids, one)
        stream = numbers[where]
        if cut[where].any():
            whole = zip(spelled(one, vocabulary), one.tolist(), strict=True)
            stream = np.array([number_of(text, i) for text, i in whole], np.int64)
        streams.append(stream)
    count = np.bincount(np.concatenate([np.empty(0, np.int64), *streams]), minlength=len(known))
    order = np.argsort(-count, kind="stable")
    new = np.empty(len(known), np.int64)
    new[order] = np.arange(len(known))
    entries = list(known)
    texts = [entries[i][0] for i in order]
    shown = {str(i): heat.readable(text, dots=False) for i, text in enumerate(texts)}
    return {
        "texts": [text.replace(PART, "") for text in texts],
        "shown": {i: text for i, text in shown.items() if text != texts[int(i)]},
        "kinds": [entries[i][1] for i in order],
    }, [new[stream] for stream in streams]


# ----------------------------------------------------------------------------------------------------------- columns


def _columns(tokens: RunTokens) -> dict[str, Floats]:
    """What the page holds a number of for each token; weights only where they are not all one."""
    found = {"value": tokens.signals["value"], **tokens.signals} if "value" in tokens.signals else {}
    if tokens.weight is not None and _one_weight(tokens) is None:
        found["loss_weight"] = tokens.weight
    return found


def _one_weight(tokens: RunTokens) -> float | None:
    """The weight that all kept tokens have, None where they have several or there is no mask."""
    if tokens.weight is None:
        return None
    kept = tokens.weight[tokens.weight > 0]
    return float(kept[0]) if len(kept) and kept.min() == kept.max() else None


def _constant(tokens: RunTokens) -> list[dict[str, Any]]:
    """The column of weights where kept tokens all have one: it follows from what is kept."""
    weight = _one_weight(tokens)
    return (
        []
        if weight is None
        else [{**_column(tokens, "loss_weight", np.array([weight], np.float32), None), "constant": True}]
    )


def _column(tokens: RunTokens, name: str, values: Floats, code: tuple[float, float] | None) -> dict[str, Any]:
    scale = heat.scale_of(values)
    unit = heat.unit_of(name, scale, tokens.layout.unit)
    field = (SFT.train if name == "loss_weight" else SFT.values).field(name)
    return {
        "name": name,
        "label": NAMES[name],
        "unit": unit.label,
        "exponent": unit.exponent,
        "decimals": unit.decimals,
        "signed": unit.signed,
        "scale": scale,
        "doc": field.metadata[b"doc"].decode(),
        "code": code,
    }


def planes(values: Floats) -> bytes:
    """Float32 with the first bytes of all before the second ones and so on, which deflates better."""
    whole: NDArray[np.uint8] = np.ascontiguousarray(values, "<f4").view(np.uint8).reshape(-1, 4)
    return whole.T.tobytes()


def _scale_of_codes(values: Floats) -> tuple[float, float]:
    """The largest size, and the ratio of each size to the next: all but 1 in 200 numbers are within these sizes."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)]).astype(np.float64)
    if not len(sizes):
        return 1.0, 2.0
    top = float(sizes.max())
    low = max(float(np.percentile(sizes, 0.5)), top * 1e-5)
    return top, max((top / low) ** (1 / (LEVELS_EACH_SIGN - 1)), 1.0001)


def codes(values: Floats, top: float, ratio: float) -> NDArray[np.uint8]:
    """One byte each: 0 is 0, 1 to 127 sizes above 0, 129 to 255 below, 128 none. Size i is top / ratio^(127 - i).

    What is smaller than half of the smallest size is 0.
    """
    sizes = np.abs(values.astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        level = LEVELS_EACH_SIGN + np.rint(np.log(sizes / top) / np.log(ratio))
    small = top / ratio ** (LEVELS_EACH_SIGN - 1)
    level = np.where(np.isfinite(level), np.clip(level, 1, LEVELS_EACH_SIGN), 0)
    level = np.where(sizes < small / 2, 0, level)
    signed = np.where((values < 0) & (level > 0), level + _NONE, level)
    return np.where(np.isnan(values), _NONE, signed).astype(np.uint8)


def varints(numbers: NDArray[np.int64]) -> bytes:
    """Numbers below 2^21 in 1 to 3 bytes: 7 bits each, the lowest first, the high bit set where more follow."""
    parts = np.stack([numbers & 127, numbers >> 7 & 127, numbers >> 14 & 127], axis=1).astype(np.uint8)
    more = np.stack([numbers > 127, numbers > 16383, np.zeros(len(numbers), np.bool_)], axis=1)
    there = np.stack([np.ones(len(numbers), np.bool_), more[:, 0], more[:, 1]], axis=1)
    found: NDArray[np.uint8] = (parts | more.astype(np.uint8) << 7)[there]
    return found.tobytes()


def _stream(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 9)).decode()


# -------------------------------------------------------------------------------------------------------------- rows


def _row_facts(
    tokens: RunTokens, chosen: NDArray[np.int64], sequences: Sequence[Sequence[_Sequence]]
) -> dict[str, Any]:
    rows = tokens.rows
    own = [rows.own[i] for i in chosen.tolist()]
    out = np.zeros(len(rows), np.bool_)
    if tokens.weight is not None:
        out[tokens.row[np.isnan(tokens.weight)]] = True
    pair, (row_id, turn) = len(tokens.layout.branches) == 2, rows_and_turns(rows.keys)
    return {
        "id": row_id[chosen].tolist(),
        **({"turn": turn[chosen].tolist()} if tokens.stored.settings.get("turns") == "each" else {}),
        "source": rows.source[chosen].tolist(),
        "line": rows.line[chosen].tolist(),
        "own": own,
        "shownOwn": [None if one is None else heat.readable(one, alone=True, dots=False) for one in own],
        "status": rows.status[chosen].tolist(),
        "out": np.flatnonzero(out[chosen]).tolist(),
        "runs": [[_runs(one.response) for one in row] for row in sequences],
        **({name: _numbers(getattr(rows, name)[chosen]) for name in ("omega", "margin")} if pair else {}),
    }


def _runs(response: NDArray[np.bool_]) -> list[int]:
    """Lengths of what does not respond and what does, in turn."""
    ends = np.flatnonzero(np.diff(response, prepend=False))
    runs: list[int] = np.diff(ends, prepend=0, append=len(response)).tolist()
    return runs


def _numbers(values: Floats) -> list[float | None]:
    return [None if np.isnan(one) else float(one) for one in values]


def _reasons(run: Path, tokens: RunTokens, chosen: set[int]) -> dict[str, str]:
    """Why rows were refused, by their number."""
    lines = [one for one in rejects(run, tokens.stored) if one.get("row_id") in chosen]
    told = {one["row_id"]: str(one.get("message")) for one in lines}
    return {str(number): heat.readable(why, alone=True, dots=False) for number, why in told.items()}
