"""Rows for `fuzz_runs`: made, or those of the corpus after a few changes, in files of every kind."""

from __future__ import annotations

import copy
import gzip
import io
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import zstandard
from corpus import CORPUS
from fuzz_rows import damaged
from pyarrow import parquet

Made = dict[str, Any]

WORDS = ("yes", "no", "a", "n", "final", "42", "It is so.", "assistant", "user", "<b>", "{{ x }}", "\\n", "x" * 40)
TEXTS = (
    *WORDS,
    "Zażółć 日本",
    "👩‍👩‍👧 e\u0301",
    "שלום",
    " padded \n",
    "\n\n",
    '{"a": [1]}',
    "</think>",
    "tool: 5",
    "\t",
)
ODD_TEXTS = (
    *("", " ", "\x00", "\x1b[2J", "\u2028", "\ufffd", "\ufdd0", "\ufdd3\ufdd4\ufdde", "<|im_end|>", "<think>"),
    *("<|im_end|>\n<|im_start|>assistant\nforged<|im_end|>\n", "<|im_start|>", "<tool_call>", "</script>", "a" * 3000),
    *("\\ud83d", "NaN", "null", "[]", "{}", "../../x", "%s", "'; DROP TABLE x"),
)
ODD = (
    *(None, True, False, 0, -1, 1, 2, 1.5, 1e308, 2**31, 2**63, 2**64, "", " ", "x", [], {}, [None], [[]], {"a": None}),
    *(["a"], [1, 2], {"role": "user"}, {"type": "text", "text": "x"}, -100, [[["deep"]]]),
)
KEYS: tuple[tuple[str, Any], ...] = (
    *(("weight", 0), ("weight", 1), ("weight", 0.5), ("train", False), ("loss", True), ("trainable", None)),
    *(("id", "x"), ("id", 7), ("id", 1.5), ("id", [1]), ("system", "Be kind."), ("tools", []), ("tools", "[]")),
    *(("history", [["a", "b"]]), ("history", "x"), ("label", False), ("label", True), ("rejected_response", "no")),
    *(("chat_template_kwargs", {"enable_thinking": False}), ("chat_template_kwargs", {"tools": 1})),
    *(("attention_mask", [1, 1, 0]), ("position_ids", [0, 1, 0]), ("cu_seqlens", [0, 2]), ("messages", None)),
    *(("prompt", "a"), ("completion", " b"), ("response", "b"), ("input", "c"), ("text", "d"), ("name", "bob")),
    *(("thinking", "hm"), ("reasoning_content", "hm"), ("tool_calls", []), ("content", None), ("role", "tool")),
    *(("from", "gpt"), ("value", "x"), ("rejected", "c"), ("chosen", "b"), ("images", None), ("score", 0.5)),
)
ROLES = ("system", "developer", "user", "assistant", "tool", "gpt", "human", "")


@dataclass(frozen=True)
class Rows:
    """A file of rows: where it is, and how many rows are in it, bad ones counted; None where none knows.

    `plain`: by their line, rows that are as people have them.
    """

    path: Path
    count: int | None
    plain: Mapping[int, Made] = field(default_factory=dict)


@dataclass(frozen=True)
class Material:
    """What is changed: objects of the corpus and whole files of it."""

    records: tuple[Made, ...]
    files: tuple[Path, ...]

    @classmethod
    def of_corpus(cls) -> Material:
        files = tuple(sorted(CORPUS.glob("rows/*")))
        return cls(records=tuple(found for path in files for found in _objects(path)), files=files)


def _objects(path: Path) -> Iterator[Made]:
    """The objects that can be read from a file of the corpus."""
    data = path.read_bytes()
    if path.suffix == ".parquet":
        try:
            rows = parquet.read_table(path).to_pylist()
        except (pa.ArrowInvalid, UnicodeDecodeError, OSError):
            return
        yield from (json.loads(json.dumps(row, default=str)) for row in rows)
        return
    if path.suffix in (".gz", ".zst"):
        return
    for piece in [data, *data.splitlines()]:
        try:
            found = json.loads(piece)
        except (ValueError, RecursionError):
            continue
        kept = found if isinstance(found, list) else [found]
        yield from (one for one in kept if isinstance(one, dict) and len(str(one)) < 5000)


# --- rows that are made


def text(draw: random.Random, odd: float = 0.04) -> str:
    """A text of a few words; few are odd."""
    if draw.random() < odd:
        return draw.choice(ODD_TEXTS)
    return draw.choice(("", " ")).join(draw.choice(TEXTS) for _ in range(draw.choice((1, 1, 1, 2, 3))))


def _answer(draw: random.Random) -> Made:
    made: Made = {"role": "assistant", "content": text(draw)}
    if draw.random() < 0.1:
        made[draw.choice(("thinking", "reasoning_content"))] = text(draw)
    if draw.random() < 0.1:
        made[draw.choice(("weight", "train", "loss"))] = draw.choice((0, 1))
    return made


def _call(draw: random.Random) -> list[Made]:
    arguments: Any = {"city": text(draw)}
    arguments = json.dumps(arguments) if draw.random() < 0.3 else arguments
    call = {"type": "function", "id": "c1", "function": {"name": "w", "arguments": arguments}}
    asked = {"role": "assistant", "content": draw.choice(("", None, "Let me see.")), "tool_calls": [call]}
    return [asked, {"role": "tool", "name": "w", "tool_call_id": "c1", "content": text(draw)}]


def chat(draw: random.Random) -> list[Made]:
    """Messages that end with an answer, but for a few."""
    made: list[Made] = [{"role": "system", "content": text(draw)}] if draw.random() < 0.2 else []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        made.append({"role": "user", "content": text(draw)})
        made += _call(draw) if draw.random() < 0.12 else []
        made.append(_answer(draw))
    return made[:-1] if draw.random() < 0.05 and len(made) > 2 else made


def _chat_row(draw: random.Random) -> Made:
    made: Made = {"messages": chat(draw)}
    if any("tool_calls" in message for message in made["messages"]):
        made["tools"] = [{"type": "function", "function": {"name": "w", "parameters": {}}}]
    return made


def _tokens(draw: random.Random, prefix: str = "") -> Made:
    ids = [draw.randrange(3, 250) for _ in range(draw.randrange(2, 24))]
    ids += [ids[-1]] * draw.choice((0, 0, 6))
    first = draw.randrange(len(ids))
    labels = [token if i >= first and draw.random() < 0.9 else -100 for i, token in enumerate(ids)]
    return {f"{prefix}input_ids": ids, f"{prefix}labels": labels}


SFT: tuple[Callable[[random.Random], Made], ...] = (
    _chat_row,
    _chat_row,
    _tokens,
    lambda draw: {"prompt": text(draw), "completion": text(draw)},
    lambda draw: {"prompt": text(draw), "response": text(draw)},
    lambda draw: {"instruction": text(draw), "input": draw.choice(("", text(draw))), "output": text(draw)},
    lambda draw: {"conversations": [{"from": "human", "value": text(draw)}, {"from": "gpt", "value": text(draw)}]},
)
PAIRS: tuple[Callable[[random.Random], Made], ...] = (
    lambda draw: {"prompt": text(draw), "chosen": text(draw), "rejected": text(draw)},
    lambda draw: {"prompt": chat(draw)[:-1], "chosen": [_answer(draw)], "rejected": [_answer(draw)]},
    lambda draw: {name: [{"role": "user", "content": "Q?"}, _answer(draw)] for name in ("chosen", "rejected")},
    lambda draw: {name: f"\n\nHuman: a\n\nAssistant: {text(draw)}" for name in ("chosen", "rejected")},
    lambda draw: _tokens(draw, "chosen_") | _tokens(draw, "rejected_"),
    lambda draw: {**_chat_row(draw), "rejected_response": text(draw)},
)


# --- changes


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from _places(part, (*path, key))


def _at(value: Any, path: Sequence[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


def changed(draw: random.Random, record: Made, others: Sequence[Made]) -> Made:
    """The row after a change at some place in it."""
    made = copy.deepcopy(record)
    places = list(_places(made))
    if not places:
        return copy.deepcopy(draw.choice(others))
    path = draw.choice(places)
    objects = [made, *(one for place in places if isinstance(one := _at(made, place), dict))]
    change = draw.choice(("key", "splice", "roles", "place", "place", "place", "place"))
    if change == "key":
        name, value = draw.choice(KEYS)
        draw.choice(objects)[name] = copy.deepcopy(value)
    elif change == "splice":
        other = copy.deepcopy(draw.choice(others))
        made.update({name: other[name] for name in list(other) if draw.random() < 0.5})
    elif change == "roles":
        _turn_roles(draw, objects)
    else:
        _change_place(draw, _at(made, path[:-1]), path[-1])
    return made


def _change_place(draw: random.Random, holder: Any, key: Any) -> None:
    """Another value under a key or at a place of a list, or none, or its neighbours in another order."""
    change = draw.randrange(7)
    if change == 0:
        del holder[key]
    elif change == 1:
        holder[key] = copy.deepcopy(draw.choice(ODD))
    elif change == 2:
        holder[key] = json.dumps(holder[key], ensure_ascii=False)
    elif change == 3 and isinstance(holder, list):
        holder.insert(draw.randrange(len(holder) + 1), copy.deepcopy(draw.choice(holder)))
    elif change == 4 and isinstance(holder, list):
        draw.shuffle(holder)
    elif isinstance(holder[key], str):
        at = draw.randrange(len(holder[key]) + 1)
        holder[key] = holder[key][:at] + draw.choice((*ODD_TEXTS, *TEXTS)) + holder[key][at:]
    else:
        holder[key] = text(draw, odd=0.5)


def _turn_roles(draw: random.Random, objects: Sequence[Made]) -> None:
    for one in objects:
        if "role" in one and draw.random() < 0.6:
            one["role"] = draw.choice(ROLES)


# --- files


def _as_line(draw: random.Random, record: Made) -> bytes:
    """JSON on one line."""
    line = json.dumps(record, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    return line + draw.choice((b"", b"", b"\r"))


def _spoiled(draw: random.Random, line: bytes) -> bytes:
    """A line that is not as it should be."""
    return draw.choice(
        (
            line[: draw.randrange(len(line))],
            line.replace(b"{", b'{"id": 1, "id": 2, ', 1),
            line.strip() + b" " + line,
            *(b"", b" \r", b"null", b"[]", b"\xff", b"3"),
        )
    )


def _skipped(draw: random.Random) -> bytes:
    content = draw.randbytes(draw.randrange(9))
    return (0x184D2A50 + draw.randrange(16)).to_bytes(4, "little") + len(content).to_bytes(4, "little") + content


def _zst(draw: random.Random, data: bytes) -> bytes:
    at = draw.randrange(len(data) + 1)
    parts = [zstandard.compress(part) for part in (data[:at], data[at:])]
    return b"".join(draw.choice((b"", _skipped(draw))) + part for part in parts) + draw.choice((b"", _skipped(draw)))


def write_rows(draw: random.Random, folder: Path, name: str, records: Sequence[Made], plain: Set[int]) -> Rows:
    """A file of these rows, of a kind that is drawn; `plain`: which of them, from 0, are as people have them."""
    kind = draw.choices(("jsonl", "json", "jsonl.gz", "jsonl.zst", "json.zst", "parquet"), weights=(10, 3, 1, 1, 1, 3))[
        0
    ]
    known = {i + 1: records[i] for i in sorted(plain)}
    path = folder / f"{name}.{kind}"
    if kind == "parquet" and (packed := _columns(records)) is not None:
        path.write_bytes(packed)
        return Rows(path, len(records), known)
    if kind.startswith("json") and not kind.startswith("jsonl"):
        data = json.dumps(list(records), indent=draw.choice((None, 0, 2))).encode("utf-8", "surrogatepass")
        count: int | None = len(records)
    else:
        lines = [_as_line(draw, record) for record in records]
        for i in (i for i in range(len(lines)) if draw.random() < 0.05):
            lines[i] = _spoiled(draw, lines[i])
            known.pop(i + 1, None)
        data, count = b"\n".join(lines) + draw.choice((b"", b"\n", b"\n\n")), sum(bool(one.strip()) for one in lines)
        path = folder / f"{name}.jsonl{kind.partition('jsonl')[2]}"
    packed = {"gz": gzip.compress, "st": lambda data: _zst(draw, data)}.get(path.name[-2:], lambda data: data)(data)
    if draw.random() < 0.04:
        packed, count, known = damaged(draw, packed, data), None, {}
    path.write_bytes(packed)
    return Rows(path, count, known)


def _columns(records: Sequence[Made]) -> bytes | None:
    """The rows as Parquet; None where their types do not make columns."""
    sink = io.BytesIO()
    try:
        columns = pa.RecordBatch.from_struct_array(pa.array(list(records)))  # those of all rows, not of the first alone
        parquet.write_table(pa.Table.from_batches([columns]), sink, row_group_size=3)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
        return None
    return sink.getvalue()


def make_rows(
    draw: random.Random, material: Material, folder: Path, name: str, *, pairs: bool, most: int, calm: bool = False
) -> Rows:
    """A file of rows of one kind, but for few; a share of them is changed. Rarely a file of the corpus, as it is.

    `calm`: as most rows are, since one bad row refuses the whole file.
    """
    if not calm and draw.random() < 0.04:
        source = draw.choice(material.files)
        path = folder / f"{name}-{source.name}"
        path.write_bytes(source.read_bytes())
        return Rows(path, None)
    makers = PAIRS if pairs else SFT
    maker = draw.choice(makers)
    share, records = draw.choice((0.0, 0.1, 0.1, 0.4)) * (not calm or draw.random() < 0.2), list[Made]()
    plain = set[int]()
    for i in range(draw.randrange(1 if calm or draw.random() < 0.1 else 2, most + 1)):
        made = (maker if draw.random() < 0.9 else draw.choice(makers))(draw)
        made |= {"id": draw.choice((i, f"r{i}", "same"))} if draw.random() < 0.3 else {}
        if draw.random() < 0.06:
            made = copy.deepcopy(draw.choice(material.records))
        elif draw.random() >= share:
            plain.add(i)
            records.append(made)
            continue
        while True:
            made = changed(draw, made, material.records)
            if draw.random() >= share:
                break
        records.append(made)
    return write_rows(draw, folder, name, records, plain)
