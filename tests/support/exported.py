"""What trainers make of an export, each by its own rule, and what the run says they should.

A row is told as its predictions, so that nothing depends on how a file is aligned: branch by branch a mapping of
(how many tokens stand before, the token to predict) to the weight of that loss. The readers follow the trainers'
sources and share no code with the exporters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from small_run import published

from alphatoken_curate.exports.export import FORMS

Predictions = dict[tuple[int, int], float]
Row = tuple[Predictions, ...]

TOKEN_FORMS = sorted(FORMS.keys() - {"jsonl-weights"})
FOR_PAIRS = ["hf", "llamafactory", "ms-swift", "tinker"]
SOFT = published(keep=0.6, weights="rank")
HALF = published(keep=0.5)


def truth(run: Path, *, mask: int = 0, max_length: int | None = None, binarize: bool = False) -> list[Row]:
    """The rows of train/ that have something to train in every branch, as they are after a cut."""
    found = []
    for path in sorted((run / "train" / f"mask={mask:04d}").iterdir()):
        for row in pq.read_table(path).to_pylist():
            prefixes = ("chosen_", "rejected_") if "chosen_labels" in row else ("",)
            branches = []
            for prefix in prefixes:
                tokens = list(zip(row[prefix + "labels"], row[prefix + "loss_weight"], strict=True))[:max_length]
                trained = {(i, label): weight for i, (label, weight) in enumerate(tokens) if label != -100}
                branches.append({key: 1.0 if binarize else weight for key, weight in trained.items()})
            if all(branches):
                found.append(tuple(branches))
    return found


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        yield from pq.read_table(path).to_pylist()
    else:
        yield from map(json.loads, path.read_text().splitlines())


def _by_labels(row: dict[str, Any], prefix: str, weights: Sequence[float] | None) -> Predictions:
    """transformers, TRL, LLaMA-Factory: position p is compared with labels[p + 1], unless that is -100."""
    labels = row[prefix + "labels"]
    weights = [1.0] * len(labels) if weights is None else weights
    shifted = list(zip(labels, weights, strict=True))[1:]
    return {(p + 1, label): weight for p, (label, weight) in enumerate(shifted) if label != -100}


def read_hf(folder: Path) -> Iterator[Row]:
    for row in _records(folder / "train.parquet"):
        prefixes = ("chosen_", "rejected_") if "chosen_labels" in row else ("",)
        yield tuple(_by_labels(row, prefix, row.get(prefix + "loss_weight")) for prefix in prefixes)


def read_llamafactory(folder: Path) -> Iterator[Row]:
    import datasets

    for row in datasets.load_from_disk(str(folder))["train"]:
        assert row["images"] is row["videos"] is row["audios"] is None
        prefixes = ("chosen_", "rejected_") if "chosen_labels" in row else ("",)
        yield tuple(_by_labels(row, prefix, None) for prefix in prefixes)


def read_swift(folder: Path) -> Iterator[Row]:
    """Labels are -100 where the scale is not above 0, and scales are rolled by one; DPO takes the labels alone."""
    for row in _records(folder / "train.jsonl"):
        pair = "rejected_messages" in row
        branches = []
        for key in ("messages", "rejected_messages")[: 1 + pair]:
            (message,) = row[key]
            ids, scale = (np.array(message["content"][name]) for name in ("token_ids", "loss_scale"))
            scale = scale.astype(np.float32)
            scale[0] = 0
            targets, rolled = np.roll(ids, -1), np.roll(scale, -1)
            alive = np.flatnonzero(rolled > 0)
            branches.append({(int(p) + 1, int(targets[p])): 1.0 if pair else float(rolled[p]) for p in alive})
        yield tuple(branches)


def read_levanter(folder: Path) -> Iterator[Row]:
    """loss_weights times the causal mask, which is 0 at the last position; position p predicts token p + 1."""
    for row in _records(folder / "train.parquet"):
        ids, weights = row["input_ids"], row["loss_weights"]
        assert len(ids) == len(weights) and weights[-1] == 0
        yield ({(p + 1, ids[p + 1]): weights[p] for p in range(len(ids) - 1) if weights[p]},)


def read_megatron(folder: Path) -> Iterator[Row]:
    """Each sequence of a pack without its last token, against itself without its first; the mask as integers."""
    for row in _records(folder / "train.idx.parquet"):
        bounds = [*row["seq_start_id"], len(row["input_ids"])]
        assert bounds[0] == 0 and len(row["loss_mask"]) == bounds[-1]
        (start, end) = bounds
        labels, mask = row["input_ids"][start + 1 : end], row["loss_mask"][start : end - 1]
        yield ({(p + 1, label): 1.0 for p, (label, on) in enumerate(zip(labels, mask, strict=True)) if int(on)},)


def read_tinker(folder: Path) -> Iterator[Row]:
    """Position p of the model input predicts target p with weight p."""
    for row in _records(folder / "train.jsonl"):
        branches = []
        for datum in (row["chosen"], row["rejected"]) if "chosen" in row else (row,):
            assert datum["model_input"][1:] == datum["target_tokens"][:-1]
            pairs = enumerate(zip(datum["target_tokens"], datum["weights"], strict=True))
            branches.append({(p + 1, target): float(np.float32(weight)) for p, (target, weight) in pairs if weight})
        yield tuple(branches)


def read_verl(folder: Path) -> Iterator[Row]:
    """All rows of a batch are joined and the mask is rolled by one over all of them."""
    rows = list(_records(folder / "train.parquet"))
    ids = np.concatenate([row["input_ids"] for row in rows])
    lengths = [len(row["input_ids"]) for row in rows]
    place = np.concatenate([np.arange(length) for length in lengths])
    rolled = np.roll(np.concatenate([np.array(row["loss_mask"], np.float32) for row in rows]), -1)
    targets, which = np.roll(ids, -1), np.repeat(np.arange(len(rows)), lengths)
    for i in range(len(rows)):
        alive = np.flatnonzero((which == i) & (rolled != 0))
        yield ({(int(place[p]) + 1, int(targets[p])): float(rolled[p]) for p in alive},)


def read_skyrl(folder: Path) -> Iterator[Row]:
    """Integers of 0 and 1; the first 1 opens the window of actions, which runs to the end."""
    for row in _records(folder / "train.parquet"):
        mask = [int(on) for on in row["loss_mask"]]
        assert set(mask) <= {0, 1} and len(mask) == len(row["input_ids"])
        window = range(mask.index(1), len(mask))
        yield ({(i, row["input_ids"][i]): 1.0 for i in window if mask[i]},)


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "hf": read_hf,
    "llamafactory": read_llamafactory,
    "ms-swift": read_swift,
    "levanter": read_levanter,
    "megatron": read_megatron,
    "tinker": read_tinker,
    "verl": read_verl,
    "skyrl": read_skyrl,
}


def read(trainer: str, folder: Path) -> list[Row]:
    """The rows of an export, as that trainer makes them out."""
    return list(READERS[trainer](folder))
