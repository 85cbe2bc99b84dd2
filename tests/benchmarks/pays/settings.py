"""The settings in which masks are tried: rows to train on, what their selection aims at, and what is measured after.

Rows are tokens, so that a corrupted token and the mask that spares it are exact. Everything is drawn from `--data`
(a folder with gsm8k_sft.jsonl, gsm8k_target.jsonl, gsm8k_preference.jsonl, lambada_retention.jsonl) and is the same for
every seed of a training; a seed only orders the rows.

    clean       GSM8K as it is
    corrupted   3 of 10 digits of the answers replaced by another digit; good: the tokens left alone
    lightly     1 of 10 digits
    mixture     half GSM8K, half passages of fiction to be continued; good: the GSM8K rows
    narrow      GSM8K alone at seven times the rate: what makes a model forget
    preference  64 GSM8K pairs for DPO
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from alphatoken_curate.models.load import find_model, load_tokenizer
from alphatoken_curate.rows.read import read_rows
from alphatoken_curate.tokens.tokenise import TokenRow, branches, tokenise

MODEL = "smollm2-135m"
LONGEST = 140
"""Tokens of the longest row, so that a training takes minutes on two cores."""

WRONG = {"corrupted": 0.3, "lightly": 0.1}
"""Share of the answers' digits that are another digit."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """`ids` (T,) int32; `response`, `good` (T,) bool: what may train, and what an oracle would let train."""

    ids: NDArray[np.int32]
    response: NDArray[np.bool_]
    good: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Setting:
    """Of preference pairs `train` and `held` hold chosen and rejected in turn."""

    name: str
    train: list[Row]
    target: list[Row]
    """Gives adaptation its direction."""
    held: list[Row]
    """On these the target loss is measured; no selection sees them."""
    retention: list[Row]
    """On these forgetting is measured; no selection sees them."""
    remember: list[Row]
    """Rows like those of `retention`, for selections that may see some."""
    beside: list[Row]
    """More rows of the target's task, to train Rho-1's reference on."""
    learning_rate: float
    epochs: int
    batch: int

    @property
    def pairs(self) -> bool:
        """Whether rows are preference pairs."""
        return self.name == "preference"

    @property
    def has_oracle(self) -> bool:
        """Whether some tokens are known to be bad."""
        return any((row.response & ~row.good).any() for row in self.train)


@cache
def setting(name: str, data: Path) -> Setting:
    """A setting by its name."""
    maths = _read(data / "gsm8k_sft.jsonl", LONGEST)
    passages = _passages(data / "lambada_retention.jsonl")
    base = Setting(
        name=name,
        train=maths[:128],
        target=_read(data / "gsm8k_target.jsonl", 2 * LONGEST)[:32],
        held=maths[-48:],
        retention=passages[:32],
        remember=passages[64:96],
        beside=maths[128:-48],
        learning_rate=3e-5,
        epochs=2,
        batch=8,
    )
    if name in WRONG:
        return replace(base, train=corrupt(base.train, WRONG[name]))
    if name == "mixture":
        other = [replace(row, good=np.zeros_like(row.good)) for row in passages[96:160]]
        return replace(base, train=[row for both in zip(base.train[:64], other, strict=True) for row in both])
    if name == "narrow":
        return replace(base, learning_rate=2e-4)
    if name == "preference":
        pairs = _read(data / "gsm8k_preference.jsonl", 160)
        return replace(base, train=pairs[:128], held=pairs[-64:], learning_rate=1e-5, batch=4)
    return base


@cache
def about(name: str, data: Path) -> dict[str, Any]:
    """What a result line says of a setting, so that a line of another one of its name is never taken for it."""
    where = setting(name, data)
    told = {key: getattr(where, key) for key in ("learning_rate", "epochs", "batch")}
    return {**told, "train_rows": len(where.train), "rows_sha256": rows_sha256(where)}


PARTS = ("train", "target", "held", "retention", "remember", "beside")


def rows_sha256(where: Setting, parts: Sequence[str] = PARTS) -> str:
    """Of the rows of a setting, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        for row in getattr(where, part):
            digest.update(f"{part} {len(row.ids)}".encode() + row.ids.tobytes() + row.response.tobytes())
    return digest.hexdigest()


def corrupt(rows: Sequence[Row], share: float) -> list[Row]:
    """Rows in which `share` of the digits of a response are another digit."""
    digits = np.sort([_tokenizer().convert_tokens_to_ids(str(n)) for n in range(10)])
    draws = np.random.default_rng(0)
    found = []
    for row in rows:
        is_digit = row.response & np.isin(row.ids, digits)
        hit = is_digit & (draws.random(len(row.ids)) < share)
        moved = (np.searchsorted(digits, row.ids[hit]) + draws.integers(1, 10, hit.sum())) % 10
        ids = row.ids.copy()
        ids[hit] = digits[moved]
        found.append(Row(ids=ids, response=row.response, good=row.response & ~hit))
    return found


def record(row: Row) -> dict[str, Any]:
    """A row as `score` reads it, pre-tokenised."""
    return {"input_ids": row.ids.tolist(), "labels": np.where(row.response, row.ids, -100).tolist()}


def pair_record(chosen: Row, rejected: Row) -> dict[str, Any]:
    """A pair as `score` reads it, pre-tokenised."""
    both = {"chosen": chosen, "rejected": rejected}
    return {f"{name}_{key}": value for name, row in both.items() for key, value in record(row).items()}


def records(rows: Sequence[Row], *, pairs: bool) -> list[dict[str, Any]]:
    """Rows, or pairs, as `score` reads them."""
    if pairs:
        return [pair_record(a, b) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    return [record(row) for row in rows]


@cache
def _tokenizer() -> Any:
    return load_tokenizer(find_model(MODEL))


def _there(path: Path) -> Path:
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; name the folder with --data")
    return path


def _read(path: Path, longest: int) -> list[Row]:
    """Rows of a file whose every branch is short enough."""
    read = read_rows([str(_there(path))])
    found, _ = tokenise(read.rows, _tokenizer(), max_length=4096, turns="all", vocab_size=None)
    short = [branches(row) for row in found if all(len(one.input_ids) <= longest for one in branches(row))]
    return [_row(one) for both in short for one in both]


def _row(row: TokenRow) -> Row:
    return Row(ids=row.input_ids.astype(np.int32), response=row.response, good=row.response)


def _passages(path: Path) -> list[Row]:
    """Passages of fiction, cut to a length, the first third of which is given."""
    texts = [orjson.loads(line)["text"] for line in _there(path).read_bytes().splitlines()]
    found = []
    for ids in _tokenizer()(texts)["input_ids"]:
        cut = np.array(ids[:LONGEST], np.int32)
        response = np.arange(len(cut)) >= len(cut) // 3
        found.append(Row(ids=cut, response=response, good=response))
    return found
