"""A run folder of any size with random signals, written shard by shard by the functions that a real run uses."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "support"))

from small_run import FIELDS, facts, scored, write_pieces

from alphatoken_curate.config import MaskConfig
from alphatoken_curate.masks.remask import make_mask
from alphatoken_curate.runs import card, manifest
from alphatoken_curate.runs.schema import SFT
from alphatoken_curate.runs.shards import Branch, Footer, ValueRow, shard_name, values_folder, write_values
from alphatoken_curate.tokens.pieces import Piece

WORDS = ["the", "of", "and", "answer", "is", "so", "we", "have", "total", "number", "each", "cost"]
MARKS = [".", ",", "\n", " =", " +", "$", "%", "(", ")", "!", "?", ":"]


def made_run(run: Path, tokens: int, *, response: int = 500, prompt: int = 100, per_shard: int = 1024) -> Path:
    """An SFT run of at least so many response tokens, in rows of `prompt` + `response` tokens, with one mask."""
    write_shards(run, tokens, response=response, prompt=prompt, per_shard=per_shard)
    manifest.write(run, manifest.rebuild(run))
    make_mask(run, MaskConfig())
    card.write(run, manifest.read(run))
    return run


def write_shards(run: Path, tokens: int, *, response: int = 500, prompt: int = 100, per_shard: int = 1024) -> None:
    """values/ and the vocabulary of such a run, nothing else yet."""
    found = [*(f" {word}{i or ''}" for i in range(300) for word in WORDS), *map(str, range(1000)), *MARKS, "<|im_end|>"]
    rows = -(-tokens // response)
    told = facts(rows).as_json()
    metadata = Footer(fields={**FIELDS, "kind": "sft", "generation": 0}, facts=told)
    for index, start in enumerate(range(0, rows, per_shard)):
        records = [_row(i, prompt, response, len(found)) for i in range(start, min(rows, start + per_shard))]
        write_values(values_folder(run, 0) / shard_name(index), records, metadata, SFT)
    (run / "artifacts").mkdir(exist_ok=True)
    write_pieces(run, [Piece(content=text.encode(), special=text.startswith("<|")) for text in found])


def _row(number: int, prompt: int, response: int, vocabulary: int) -> ValueRow:
    # Common tokens are met far oftener than rare ones, as in text.
    drawn = np.random.default_rng(number).pareto(1.0, prompt + response)
    ids = np.minimum((drawn * 3).astype(np.int64) * 7919 % vocabulary, vocabulary - 1).astype(np.int32)
    places = np.arange(len(ids))
    branch = Branch(input_ids=ids, response=places >= prompt, end_of_turn=places == len(ids) - 1)
    row = ValueRow(row_id=number, source="rows.jsonl", line=number + 1, id=None, status="scored", branches=(branch,))
    return scored(replace(row))
