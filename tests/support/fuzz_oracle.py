"""What must hold of a run and an export whatever was asked for, read with pyarrow alone and counted in plain loops."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import exported
import pyarrow.parquet as pq
from fuzz_rows_made import ODD_TEXTS, Rows
from tiny_files import Ended

Row = dict[str, Any]
CODES = (0, 2, 3, 4)
"""Exit codes that a round may see: 1 is a fault of ours, and nobody interrupts."""


class Fell(Exception):
    """Something did not hold."""


def hold(holds: bool, what: str) -> None:
    """Raise `Fell` where it does not hold."""
    if not holds:
        raise Fell(what)


def number(text: str) -> int:
    """`1,234`."""
    return int(text.replace(",", ""))


def said(pattern: str, text: str) -> tuple[int, ...]:
    """The numbers that were said by a line; 0 for those that were not. Raises `Fell` where there is no such line."""
    found = re.search(pattern, text, re.MULTILINE)
    hold(found is not None, f"nothing like {pattern!r} was said")
    return tuple(number(group or "0") for group in found.groups()) if found else ()


@dataclass(frozen=True)
class Stored:
    """What a run holds, from its manifest as JSON and its shards as rows."""

    run: Path
    manifest: dict[str, Any]
    branches: tuple[str, ...]
    values: dict[int, list[Row]]
    """By generation."""
    train: dict[int, list[Row]]
    """By mask."""


def stored(run: Path) -> Stored:
    """All of a run."""
    manifest = json.loads((run / "manifest.json").read_bytes())
    pairs = manifest["settings"]["kind"] == "preference"
    values = {one["generation"]: list(_rows(run, one["shards"])) for one in manifest["generations"]}
    train = {one["mask"]: list(_rows(run, one["shards"])) for one in manifest["masks"]}
    return Stored(run, manifest, ("chosen_", "rejected_") if pairs else ("",), values, train)


def _rows(run: Path, shards: list[Row]) -> Iterator[Row]:
    for shard in shards:
        yield from pq.read_table(run / shard["path"]).to_pylist()


# --- rows are accounted for


def check_counts(found: Stored) -> dict[str, int]:
    """Rows read and what became of them: the same in manifest and shards, each row once. Returns them by status."""
    rows = found.values[max(found.values)]
    # A row of several turns is the last of these that one of its turns is.
    order = ("rejected", "failed", "target", "scored")
    status = {row["row_id"]: row["status"] for row in sorted(rows, key=lambda row: order.index(row["status"]))}
    counts = {name: sum(one == name for one in status.values()) for name in ("scored", "target", "failed", "rejected")}
    told = found.manifest["counts"]
    hold({name: told[name] for name in counts} == counts, f"counts {told} of the manifest are not those of {counts}")
    hold(sorted(status) == list(range(told["read"])), "rows of values/ are not those read, each once")
    hold(len({(row["row_id"], row["turn"]) for row in rows}) == len(rows), "a turn stands twice in values/")
    rejects = found.run / "rejects.jsonl"
    bad = [json.loads(line) for line in rejects.read_bytes().splitlines()] if rejects.exists() else []
    wanted = [row_id for row_id, one in status.items() if one == "rejected"]
    hold(sorted(one["row_id"] for one in bad) == sorted(wanted), "rejects.jsonl holds other rows than were rejected")
    for row in rows:
        for prefix in found.branches:
            _check_response(row, prefix)
    return counts | {"read": told["read"]}


def _check_response(row: Row, prefix: str) -> None:
    response, ids = row[prefix + "response"], row[prefix + "input_ids"]
    hold(len(response) == len(ids) and not any(response[:1]), f"row {row['row_id']}: the first token responds")
    hold(row["status"] != "scored" or any(response), f"row {row['row_id']} is scored and nothing responds")
    for name in ("nll", "value"):
        numbers = row[prefix + name] or [None] * len(ids)
        there = [one is not None for one in numbers]
        hold(row["status"] != "scored" or there == response, f"row {row['row_id']}: {name} is not of the response")
        hold(all(one is None or math.isfinite(one) for one in numbers), f"row {row['row_id']}: {name} is not finite")


# --- what responds


def check_answers(found: Stored, data: Sequence[Rows], tokenizer: Any, flags: Sequence[str]) -> int:
    """Of rows that are as people have them, the answers respond to their end and nothing else does.

    By the template of ChatML, which the models have. Returns how many rows were looked at.
    """
    if {"--chat-template", "--map", "-c"} & {*flags}:
        return 0
    turns = flags[flags.index("--turns") + 1] if "--turns" in flags else "all"
    cut = int(flags[flags.index("--max-length") + 1]) if "--max-length" in flags else 2048
    plain = {(one.path.name, line): record for one in data for line, record in one.plain.items()}
    looked = 0
    for row in found.values[0]:
        record = plain.get((Path(row["source"]).name, row["line"]))
        if record is None or any("tool_calls" in one for one in record.get("messages", ())):
            continue
        looked += 1
        if row["status"] == "rejected" and not {"--max-length", "refuse"} & {*flags}:
            hold(not is_usual(record), f"row {row['row_id']} is refused: {record}")
        for prefix in found.branches if row["status"] in ("scored", "failed") else ():
            _check_answers(row, record, prefix, tokenizer, turns, cut)
    return looked


def is_usual(record: Row) -> bool:
    """Whether a row is one that everybody has: texts of some words, an answer, and nothing that is marked off."""
    if "labels" in record:
        return any(label != -100 for label in record["labels"][1:])
    messages = record.get("messages") or record.get("conversations") or [record]
    parts = [part for one in messages for part in one.items() if isinstance(part[1], str)]
    texts = [text for key, text in parts if key != "input" or text]
    is_odd = any(not text.strip() or any(odd in text for odd in ODD_TEXTS if odd.strip()) for text in texts)
    is_answered = messages == [record] or any("assistant" in one.values() or "gpt" in one.values() for one in messages)
    is_pair = any(key.startswith(("chosen", "rejected")) for key in record)
    return is_answered and not (is_odd or is_pair or any(map(_is_off, messages)))


def _check_answers(row: Row, record: Row, prefix: str, tokenizer: Any, turns: str, cut: int) -> None:
    ids, response = row[prefix + "input_ids"], row[prefix + "response"]
    hold(len(ids) <= cut, f"row {row['row_id']} has {len(ids)} tokens, of at most {cut}")
    if f"{prefix}labels" in record:
        wanted_ids = record[f"{prefix}input_ids"]
        on = [i > 0 and label != -100 for i, label in enumerate(record[f"{prefix}labels"])]
        hold((ids, response) == (wanted_ids[:cut], on[:cut]), f"row {row['row_id']}: {ids} {response} of {record}")
        return
    parts = itertools.groupby(zip(ids, response, strict=True), key=lambda pair: pair[1])
    said_ = [tokenizer.decode([token for token, _ in part]) for on, part in parts if on]
    wanted = [f"{text}<|im_end|>" for text in answers_of(record, prefix.rstrip("_"), turns, row["turn"])]
    if len(ids) == cut:  # the last of those that are left is cut, maybe within a character
        one, other = "".join(said_).rstrip("\ufffd"), "".join(wanted[: len(said_)])
        said_, wanted = [one], [other[: len(one)]]
    hold(said_ == wanted, f"row {row['row_id']}: {said_} responds for {wanted}, of {record}")


def answers_of(record: Row, branch: str, turns: str, turn: int) -> list[str]:
    """The texts of the answers that respond in a row, or in one turn of it."""
    messages = record.get("messages") or [
        {"role": {"human": "user"}.get(one["from"], "assistant"), "content": one["value"]}
        for one in record.get("conversations", ())
    ]
    if branch == "rejected" and "rejected_response" in record:
        return [record["rejected_response"]]
    if branch and "rejected_response" in record:
        turns = "last"
    elif branch:
        text = record[branch]
        if "prompt" in record or not isinstance(text, str):
            return [text] if isinstance(text, str) else [text[-1]["content"]]
        return [text.rpartition("Assistant:")[2]]
    if not messages:
        return [next(record[key] for key in ("completion", "response", "output") if key in record)]
    last = max(i for i, one in enumerate(messages) if one["role"] == "assistant")
    on = [(i, one["content"]) for i, one in enumerate(messages) if one["role"] == "assistant" and not _is_off(one)]
    if turns == "each":
        return [on[turn][1]]
    return [text for i, text in on if turns == "all" or i == last]


def _is_off(message: Row) -> bool:
    return any(message.get(key) == 0 for key in ("weight", "train", "loss"))


# --- masks


def check_mask(found: Stored, mask: int) -> tuple[int, int]:
    """A mask beside the values it was made of. Returns the tokens that it keeps, and all that respond."""
    (about,) = [one for one in found.manifest["masks"] if one["mask"] == mask]
    sources = [{_key(row): row for row in found.values[one]} for one in about["generations"]]
    scored = {key for key in sources[0] if all(source[key]["status"] == "scored" for source in sources)}
    rows = {_key(row): row for row in found.train[mask]}
    hold(rows.keys() == scored and len(rows) == len(found.train[mask]), "rows of train/ are not those scored")
    kept = total = 0
    for prefix in found.branches:
        weights = [weight for key, row in rows.items() for weight in _row_weights(row, sources[-1][key], prefix)]
        kept += sum(weight > 0 for weight in weights)
        total += sum(sum(sources[-1][key][prefix + "response"]) for key in rows)
        above = [weight for weight in weights if weight > 0]
        hold(not above or abs(sum(above) / len(above) - 1) < 1e-3, f"the mean of weights is {sum(above)}/{len(above)}")
        _check_choice(about["settings"], [*rows.values()], [sources[-1][key] for key in rows], prefix)
    hold((kept, total) == (about["kept_tokens"], about["response_tokens"]), "the manifest counts other tokens")
    return kept, total


def _key(row: Row) -> tuple[int, int]:
    return row["row_id"], row["turn"]


def _row_weights(row: Row, value: Row, prefix: str) -> list[float]:
    """The weights of a row, each of which is right by itself."""
    ids, weights = row[prefix + "input_ids"], row[prefix + "loss_weight"]
    hold(ids == value[prefix + "input_ids"], f"row {row['row_id']}: train/ has other tokens than values/")
    hold(all(math.isfinite(one) and one >= 0 for one in weights), f"row {row['row_id']}: a weight is no weight")
    on = [one > 0 for one in weights]
    hold(
        all(there or not one for one, there in zip(on, value[prefix + "response"], strict=True)), "kept off a response"
    )
    labels = [token if one else -100 for token, one in zip(ids, on, strict=True)]
    hold(row[prefix + "labels"] == labels, f"row {row['row_id']}: labels are not where weights are")
    hold(
        row[prefix + "loss_mask"] == [int(one) for one in on],
        f"row {row['row_id']}: loss_mask is not where weights are",
    )
    return list(weights)


def _check_choice(settings: Row, rows: list[Row], values: list[Row], prefix: str) -> None:
    """Which tokens a binary mask of a share keeps, by a plain sort of what it says it was made from."""
    always = settings.get("always_keep", "none")
    if settings["weights"] != "binary" or always not in ("none", "end-of-turn"):
        return
    tokens: list[tuple[int, int, float, bool]] = []
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        stays = value[prefix + "end_of_turn"] if always == "end-of-turn" else [False] * len(value[prefix + "response"])
        parts = zip(value[prefix + "response"], row[prefix + "value"], stays, strict=True)
        tokens += [(place, i, number, end) for i, (on, number, end) in enumerate(parts) if on]
    wanted = _chosen(tokens, settings["keep"], settings["scope"], settings["allow_empty_rows"])
    has = {(place, i) for place, row in enumerate(rows) for i, one in enumerate(row[prefix + "loss_mask"]) if one}
    hold(has == wanted, f"a mask of {settings} keeps {sorted(has - wanted)[:5]} for {sorted(wanted - has)[:5]}")


def _chosen(
    tokens: list[tuple[int, int, float, bool]], keep: float | str, scope: str, empty: bool
) -> set[tuple[int, int]]:
    """(row, position) of those that are kept: the best of each scope, and what a row does not lose."""
    size = 10**9 if scope == "global" else int(scope.partition(":")[2] or 1)
    groups = defaultdict(list)
    for token in tokens:
        groups[token[0] // size].append(token)
    chosen: set[tuple[int, int]] = set()
    for group in groups.values():
        stays = [one for one in group if one[3]]
        others = sorted((one for one in group if not one[3]), key=lambda one: -one[2])
        room = math.ceil(Fraction(str(keep)) * len(group)) - len(stays) if keep != "positive" else 0
        best = [one for one in others if one[2] > 0] if keep == "positive" else others[: max(0, room)]
        chosen |= {(one[0], one[1]) for one in (*stays, *best)}
    for row in {token[0] for token in tokens}:
        mine = [one for one in tokens if one[0] == row]
        others = [one for one in mine if not one[3]]
        if any((row, one[1]) in chosen for one in others):
            continue
        if empty:
            chosen -= {(row, one[1]) for one in mine}
        elif others:
            chosen.add((row, max(others, key=lambda one: (one[2], -one[1]))[1]))
    return chosen


# --- exports


def check_export(found: Stored, folder: Path, ended: Ended, flags: list[str]) -> None:
    """The rows of an export, as its trainer reads them, are those of the mask that have something to train."""
    record = json.loads((folder / "export.json").read_bytes())
    rows, tokens, trained = said(r"^  rows +([\d,]+)\n  tokens +([\d,]+), of which ([\d,]+) train", ended.out)
    told = record["rows"]["written"], record["tokens"]["written"], record["tokens"]["trained"]
    hold(told == (rows, tokens, trained), f"{told} of export.json is not what was said")
    (dropped,) = said(r"^  dropped +([\d,]+) row", ended.out)
    mask = record["mask"]["mask"]
    hold(rows + dropped == len(found.train[mask]), f"{rows} rows and {dropped} dropped of {len(found.train[mask])}")
    lost = folder / "dropped.jsonl"
    hold((len(lost.read_bytes().splitlines()) if lost.exists() else 0) == dropped, "dropped.jsonl holds others")
    trainer = record["trainer"]
    if trainer not in exported.READERS:
        return
    cut = int(flags[flags.index("--max-length") + 1]) if "--max-length" in flags else None
    wanted = exported.truth(found.run, mask=mask, max_length=cut, binarize="--binarize" in flags)
    read = exported.read(trainer, folder)
    if "--binarize" not in flags and ("--strict" in flags or flags[1] in ("axolotl", "together")):
        read = [tuple(dict.fromkeys(branch, 1.0) for branch in row) for row in read]
    hold(trained == sum(len(branch) for row in read for branch in row), f"{trained} tokens train, it said")
    if len(wanted) == rows:  # pairs that a cut makes the same are dropped besides
        hold(_rounded(read) == _rounded(wanted), f"{trainer} reads other weights than the mask has")


def _rounded(rows: list[exported.Row]) -> list[Any]:
    return [tuple({key: round(weight, 5) for key, weight in branch.items()} for branch in row) for row in rows]
