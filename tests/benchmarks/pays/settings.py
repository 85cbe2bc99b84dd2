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
    pairs       the same for one epoch, with 244 target rows: what values over that training are tried on
    pairs dpo   the same with 62 other pairs as target: its values are of DPO's loss of these

What values over the training to come are tried on has rows of its own (`splits`). `A digits` is 64 rows of training
split A with wrong digits, `A digits 128` all of the split, `A digits few` a handful, to see that all runs:

    A                 the 128 rows that `clean` trains on; held: V, the 48 rows that it is measured on: both may tune
    B, C, D           128 rows each; held: T, 208 rows. For the last test alone
    clean             as they are
    digits            3 of 10 digits of the answers replaced by another digit; `digits-10`, `digits-5`: so many of 100
    words             3 of 10 words of the answers replaced by a word of other answers
    swapped           of every 64 rows 19 have the answer of the next of them; good: the other rows
    model-wrong       of every 64 rows 19 (of A 26) are other questions, answered wrongly by a model; good: the others
    mixture           every second row is a passage of fiction to be continued; good: the others

One epoch of 8 rows a step, 244 target rows, rows of at most 180 tokens (A and V: 140). No row is in two of A, B, C, D,
V, T and target, and none of B, C, D, T and target trained or measured one of the settings above (some of them, as
`beside`, trained a reference). Wrongly answered questions are of GSM8K's test split, and each is in one training split.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from alphatoken_curate.models.load import find_model, load_tokenizer
from alphatoken_curate.rows.read import read_rows
from alphatoken_curate.tokens.tokenise import PairRow, TokenRow, branches, tokenise

MODEL = os.environ.get("PAYS_MODEL", "smollm2-135m")
"""As `score --model` takes it; `referee.py --model` names another, for itself and the processes that it begins."""

MODEL_NAME = Path(MODEL).stem

PLAIN = """{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}Question: {{ message.content }}
Answer: {% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"""
"""The chat template of a model that has none."""

LONGEST = 140
"""Tokens of the longest row, so that a training takes minutes on two cores."""

WRONG = {"corrupted": 0.3, "lightly": 0.1}
"""Share of the answers' digits that are another digit."""

PAIRED = ("preference", "pairs")
"""Settings of preference pairs."""

SPLITS, NOISES = ("A", "B", "C", "D"), ("clean", "digits", "words", "swapped", "model-wrong")
SPLIT_ROWS, HALF, FEW = 128, 64, 16
"""Rows of a training split; of what is trained on unless it is said; and of a trial."""

TESTED, TARGETED = 208, 244
LONGEST_SPLIT, LONGEST_WRONG = 180, 160
"""Tokens of the longest row of a split, and of the longest that a model answered wrongly."""

SWAPPED, MODEL_WRONG, MOST_WRONG = 19, 19, 26
"""Of every 64 rows: 30% have another's answer, or a model's wrong one; of split A 41% are wrong so."""


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
        return self.name.split(maxsplit=1)[0] in PAIRED

    @property
    def targets_pairs(self) -> bool:
        """Whether `target` holds pairs too."""
        return self.name.startswith("pairs dpo")

    @property
    def has_oracle(self) -> bool:
        """Whether some tokens are known to be bad."""
        return any((row.response & ~row.good).any() for row in self.train)


@cache
def setting(name: str, data: Path) -> Setting:
    """A setting by its name."""
    passages = _passages(data / "lambada_retention.jsonl")
    if name.split(maxsplit=1)[0] in SPLITS:
        return _of_split(name, data, passages)
    maths = _read(data / "gsm8k_sft.jsonl", LONGEST)
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
        both = zip(base.train[:64], _of_fiction(passages), strict=True)
        return replace(base, train=[row for rows in both for row in rows])
    if name == "narrow":
        return replace(base, learning_rate=2e-4)
    if base.pairs:
        pairs = _read(data / "gsm8k_preference.jsonl", 160)
        base = replace(base, train=pairs[:128], held=pairs[-64:], learning_rate=1e-5, batch=4)
        target = pairs[128:-64] if base.targets_pairs else splits(data).target
        return base if name == "preference" else _rehearsed(base, target)
    return base


def _rehearsed(base: Setting, target: list[Row]) -> Setting:
    """A setting in one epoch, with other target rows; all of it, or a handful."""
    few = FEW if base.name.endswith(" few") else None
    parts = {"train": base.train, "held": base.held, "retention": base.retention, "target": target}
    return replace(base, epochs=1, beside=[], **{name: rows[:few] for name, rows in parts.items()})


@cache
def about(name: str, data: Path) -> dict[str, Any]:
    """What a result line says of a setting, so that a line of another one of its name is never taken for it."""
    return about_of(setting(name, data))


def about_of(where: Setting) -> dict[str, Any]:
    """The same, of a setting that is at hand."""
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Splits:
    """Rows by split, no row in two of them. `wrong`: of each training split, what a model answered wrongly."""

    train: Mapping[str, list[Row]]
    validation: list[Row]
    test: list[Row]
    target: list[Row]
    wrong: Mapping[str, list[Row]]


@cache
def splits(data: Path) -> Splits:
    """Drawn once and for all."""
    every = _read(data / "gsm8k_sft.jsonl", LONGEST_SPLIT)
    short = [row for row in every if len(row.ids) <= LONGEST]
    seen = {row.ids.tobytes() for row in (*short[:SPLIT_ROWS], *short[-48:])}
    fresh = [row for row in every if row.ids.tobytes() not in seen]
    order = iter(np.random.default_rng(0).permutation(len(fresh)).tolist())

    def draw(count: int) -> list[Row]:
        return [fresh[next(order)] for _ in range(count)]

    train = {"A": short[:SPLIT_ROWS], **{name: draw(SPLIT_ROWS) for name in SPLITS[1:]}}
    # A rejected answer is the second of its pair; the right one, which is not used, may be of any length.
    answers = _read(data / "gsm8k_preference.jsonl", 4096)[1::2]
    wrong = [row for row in answers if len(row.ids) <= LONGEST_WRONG]
    each = MOST_WRONG * SPLIT_ROWS // HALF
    drawn = np.random.default_rng(0).permutation(len(wrong))
    return Splits(
        train=train,
        validation=short[-48:],
        test=draw(TESTED),
        target=draw(TARGETED),
        wrong={name: [wrong[i] for i in drawn[n * each : (n + 1) * each]] for n, name in enumerate(SPLITS)},
    )


def _of_split(name: str, data: Path, passages: list[Row]) -> Setting:
    """A setting of a training split, a noise and a size. The noise is the same at every size."""
    (split, noise, *size), dealt = name.split(), splits(data)
    rows, seed = dealt.train[split], SPLITS.index(split)
    if noise.startswith("digits"):
        share = noise.removeprefix("digits").removeprefix("-")
        rows = corrupt(rows, int(share) / 100 if share else WRONG["corrupted"], seed)
    elif noise == "words":
        rows = reworded(rows, WRONG["corrupted"], seed)
    elif noise == "swapped":
        rows = swap(rows, seed)
    elif noise == "model-wrong":
        rows = replaced(rows, dealt.wrong[split], MOST_WRONG if split == "A" else MODEL_WRONG, seed)
    elif noise == "mixture":
        rows = [row for both in zip(rows[::2], _of_fiction(passages), strict=True) for row in both]
    few = FEW if size == ["few"] else None
    if size == ["second"]:
        rows = rows[HALF:]
    return Setting(
        name=name,
        train=rows[: few or (SPLIT_ROWS if size == [str(SPLIT_ROWS)] else HALF)],
        target=dealt.target[:few],
        held=(dealt.validation if split == "A" else dealt.test)[:few],
        retention=passages[:32][:few],
        remember=passages[64:96],
        beside=[],
        learning_rate=3e-5,
        epochs=1,
        batch=8,
    )


def _of_fiction(passages: Sequence[Row]) -> list[Row]:
    """As many as are mixed with rows of a task, of which nothing is good."""
    return [replace(row, good=np.zeros_like(row.good)) for row in passages[96:160]]


def swap(rows: Sequence[Row], seed: int) -> list[Row]:
    """Rows of which some have the answer of the next of them, in a circle; nothing of these is good."""
    found = list(rows)
    for chosen in _drawn(len(rows), SWAPPED, seed):
        for i, j in zip(chosen, np.roll(chosen, -1), strict=True):
            found[i] = _answered(rows[i], rows[j])
    return found


def replaced(rows: Sequence[Row], wrong: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Rows of which `count` of every 64 are another row, of which nothing is good."""
    found, others = list(rows), iter(wrong)
    for chosen in _drawn(len(rows), count, seed):
        for i in chosen:
            other = next(others)
            found[i] = replace(other, good=np.zeros_like(other.good))
    return found


def _drawn(rows: int, count: int, seed: int) -> list[NDArray[np.int64]]:
    """So many of every 64 rows."""
    draws = np.random.default_rng(seed)
    return [first + draws.permutation(HALF)[:count] for first in range(0, rows, HALF)]


def _answered(row: Row, other: Row) -> Row:
    """The question of one and the answer of the other."""
    start, after = int(row.response.argmax()), int(other.response.argmax())
    response = np.concatenate([row.response[:start], other.response[after:]])
    ids = np.concatenate([row.ids[:start], other.ids[after:]])
    return Row(ids=ids, response=response, good=np.zeros_like(response))


def corrupt(rows: Sequence[Row], share: float, seed: int = 0) -> list[Row]:
    """Rows in which `share` of the digits of a response are another digit."""
    return exchanged(rows, _digits(), share, seed)


def reworded(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """Rows in which `share` of the words of a response, where they are one token, are such a word of any response."""
    words = np.unique(np.concatenate([row.ids[row.response & np.isin(row.ids, _words())] for row in rows]))
    return exchanged(rows, words, share, seed)


def exchanged(rows: Sequence[Row], tokens: NDArray[np.int32], share: float, seed: int) -> list[Row]:
    """Rows in which `share` of those tokens of a response that are among `tokens`, upwards, are another of these."""
    draws = np.random.default_rng(seed)
    found = []
    for row in rows:
        hit = row.response & np.isin(row.ids, tokens) & (draws.random(len(row.ids)) < share)
        moved = np.searchsorted(tokens, row.ids[hit]) + draws.integers(1, len(tokens), hit.sum())
        ids = row.ids.copy()
        ids[hit] = tokens[moved % len(tokens)]
        found.append(Row(ids=ids, response=row.response, good=row.response & ~hit))
    return found


def answer_digits(row: Row) -> NDArray[np.bool_]:
    """(T,): the digits of the last line of a response, which says the answer."""
    (newline,) = _tokenizer().encode("\n", add_special_tokens=False)
    behind = np.flatnonzero(row.response & (row.ids == newline)).max(initial=0)
    found: NDArray[np.bool_] = row.response & np.isin(row.ids, _digits()) & (np.arange(len(row.ids)) > behind)
    return found


def record(row: Row) -> dict[str, Any]:
    """A row as `score` reads it, pre-tokenised."""
    return {"input_ids": row.ids.tolist(), "labels": np.where(row.response, row.ids, -100).tolist()}


def pair_record(chosen: Row, rejected: Row) -> dict[str, Any]:
    """A pair as `score` reads it, pre-tokenised."""
    both = {"chosen": chosen, "rejected": rejected}
    return {f"{name}_{key}": value for name, row in both.items() for key, value in record(row).items()}


def token_rows(rows: Sequence[Row]) -> list[TokenRow]:
    """Rows as the package has them once they are tokens."""
    return [
        TokenRow(
            row_id=i,
            source="",
            line=i + 1,
            id=None,
            input_ids=row.ids,
            response=row.response,
            end_of_turn=np.zeros_like(row.response),
            truncated=0,
        )
        for i, row in enumerate(rows)
    ]


def records(rows: Sequence[Row], *, pairs: bool) -> list[dict[str, Any]]:
    """Rows, or pairs, as `score` reads them."""
    if pairs:
        return [pair_record(a, b) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    return [record(row) for row in rows]


def pair_rows(rows: Sequence[Row]) -> list[PairRow]:
    """Chosen and rejected in turn, as the package has pairs once they are tokens."""
    flat = [replace(row, row_id=i // 2) for i, row in enumerate(token_rows(rows))]
    return [PairRow(chosen=a, rejected=b) for a, b in zip(flat[::2], flat[1::2], strict=True)]


@cache
def _tokenizer() -> Any:
    found = load_tokenizer(find_model(MODEL))
    assert found is not None
    if not found.chat_template:
        found.chat_template = PLAIN
    return found


@cache
def _digits() -> NDArray[np.int32]:
    """Tokens that are a digit, upwards."""
    return np.sort(np.array(_tokenizer().convert_tokens_to_ids([str(n) for n in range(10)]), np.int32))


@cache
def _words() -> NDArray[np.int32]:
    """Tokens that are a space and a word of at least two letters."""
    ids = _tokenizer().get_vocab().values()
    texts = {i: _tokenizer().decode([i]) for i in ids}
    is_word = re.compile(r" [A-Za-z]{2,}")
    return np.array(sorted(i for i, text in texts.items() if is_word.fullmatch(text)), np.int32)


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
