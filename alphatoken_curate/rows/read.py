"""Read every row into its normal form, setting bad ones aside.

Shapes, found by their keys (others are left alone, except `id`, `tools`, a `system` text, or `system_prompt`, that
becomes the first message, and what `beside` looks at):

| keys | becomes |
|---|---|
| `messages` | Messages: every assistant turn responds |
| `conversations` (ShareGPT `from`/`value`, or `role`/`content`) | Messages |
| `prompt` + `completion`, both text | PromptCompletion: the completion continues the prompt, no chat template |
| `prompt` + `response`, both text | Messages: one user turn, one assistant turn |
| `prompt` + `completion` or `response`, some lists of messages | Messages; text is a user turn or an assistant turn; \
only turns behind the prompt respond |
| `instruction` (+ `input`) + `output` | Messages; `input` follows the instruction after a blank line |
| `input_ids` + `labels`, `assistant_masks` or `completion_mask` | Tokens, without what `attention_mask` leaves out at \
either end; those respond that labels and every mask (`loss_mask`, `loss_weight` and such too) leave in |

`history`, pairs of what was asked and answered, comes before a question that is text, as turns that respond like the
others. An answer of which the message says `weight` 0, or false under `train`, `loss` or `trainable`, is context. A row
whose `label` is false or 0 (KTO), or `weight` 0, is a bad one: its answer is not to be learnt.

Preference rows become a Pair of two of these:

| keys | becomes |
|---|---|
| `prompt` + `chosen` + `rejected`, all text | Messages: one user turn, one assistant turn; where the tokenizer has no \
chat template, PromptCompletion: the answer continues the prompt as it is (`chat` sees to it) |
| `prompt` + `chosen` + `rejected`, some lists of messages | Messages; a prompt of text is a user turn, an answer of \
text an assistant turn; only turns behind the prompt respond; branches that repeat the prompt are read as whole chats |
| `chosen` + `rejected`, whole chats | Messages; the messages that both begin with are the prompt |
| `chosen` + `rejected`, whole texts | PromptCompletion; what both begin with is the prompt, up to the last \
`Assistant:` of a dialogue in the manner of `Human:` and `Assistant:`, else to where a word begins |
| `instruction` (+ `input`), or `conversations`, + `chosen` + `rejected`, each text or one message | Messages; the \
answers follow what is asked; beside whole chats, or a `prompt`, `instruction` is left alone |
| `chosen_input_ids` + `chosen_labels` + `rejected_input_ids` + `rejected_labels` | Tokens |
| `messages`, or `prompt` + `response` as text, + `rejected_response` | Messages; the last answer, and what stands in \
for it |
| `messages` + `rejected_messages` | Messages; two whole chats |

`messages` beside `chosen` and `rejected` is left alone where it is the chosen chat once more.

Rows that are read only where they are asked for (`also`), and only where they are of no shape above:

| also | keys | becomes |
|---|---|---|
| `text` | `text` | Passage: every token responds |
| `prompt` | `prompt`, text or messages | Prompt: one user turn, or text as it is where there is no chat template |
| `prompt` | `messages` or `conversations` that do not end with an answer | Prompt |

`labels` are aligned with `input_ids`: each is -100 or the token at the same index. Nothing predicts token 0, so its
label is taken as -100. A row of no shape, or of two, is a bad row; so is one without an answer, and a preference row
whose answers are the same.

Messages may be JSON as text, or a list for each of their keys, as `datasets` stores a sequence of objects.

Bad rows are collected, never raised one by one, and take up a `row_id` like any other: nothing shifts.
"""

from __future__ import annotations

import datetime
import decimal
import math
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any, Literal

from alphatoken_curate.errors import InputError
from alphatoken_curate.rows.beside import check_keys, check_made, notes
from alphatoken_curate.rows.columns import NAMES, mapped, unmet
from alphatoken_curate.rows.containers import Meter, RawRow, RowFault, check_surrogates, without_nulls
from alphatoken_curate.rows.fields import BRANCHES, is_message, with_chats, wrong
from alphatoken_curate.rows.files import find_files, visible
from alphatoken_curate.rows.padding import MASKED
from alphatoken_curate.rows.pairs import PREFERENCE
from alphatoken_curate.rows.shapes import OPEN, SFT, SIDE, Also, AnyRecord, Messages, Pair, Shapes, Tokens
from alphatoken_curate.rows.tables import raw_rows
from alphatoken_curate.runs.stores import unchanged
from alphatoken_curate.wording import count, ranges

MAX_BAD_ROWS = 1_000_000
"""Most bad rows that are told one by one; a file with more is not what it should be."""

_MOST_REASONS, _MOST_RANGES = 20, 10
"""Most lines of a message, and most ranges of line numbers in each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A usable row. `row_id`: its place among all rows read, bad ones counted, from 0. `line`: from 1."""

    row_id: int
    source: str
    line: int
    id: str | None
    shape: str
    record: AnyRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot be used: where it is, a short `reason` code, a sentence, and its first characters."""

    row_id: int
    source: str
    line: int
    reason: str
    message: str
    excerpt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """A file as read. `digest`: sha256 of its bytes as stored (of a Hub dataset: of its rows as JSON lines)."""

    path: str
    source: str
    digest: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRows:
    """All that was read, in reading order; `len(rows) + len(bad)` rows were read."""

    rows: list[Row]
    bad: list[BadRow]
    files: list[InputFile]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How rows are found and named: `columns` by the names they are read by, `subset` and `split` of a dataset."""

    columns: Mapping[str, str] = field(default_factory=dict)
    subset: str | None = None
    split: str | None = None
    all_there: bool = False
    """Whether some row must have each of the columns."""


class RowStream:
    """Rows of `data` (see `find_files`) one by one; `also` names shapes that are not read otherwise.

    Only the first `limit` are read, of both kinds, and no file behind the one that has the last of them.

    What was read beside them until then: `bad` rows, whole `files`, how many rows of both kinds were `read`, and how
    many in a way that is to be told, by that (`told`).
    """

    def __init__(
        self,
        data: Sequence[str],
        also: tuple[Also, ...] = (),
        limit: int | None = None,
        reading: Reading | None = None,
    ) -> None:
        self.bad: list[BadRow] = []
        self.files: list[InputFile] = []
        self.told: Counter[str] = Counter()
        self.read = 0
        self._data, self._also, self._limit = data, also, limit
        self._reading = reading or Reading()
        self._missing = dict(self._reading.columns)  # columns that no row had until now
        self._first: tuple[str, ...] = ()
        self._samples: dict[bool, Row] = {}

    def __iter__(self) -> Iterator[Row]:
        """Once. Raises InputError where nothing is found, a file is torn or is not what it should be, or no row is.

        UsageError where a column that is named is in no row.
        """
        keys = NAMES | self._reading.columns.keys()
        for file in find_files(self._data, self._reading.subset, self._reading.split):
            if self.read == self._limit:
                break
            meter = Meter(file)
            left = None if self._limit is None else self._limit - self.read
            with unchanged(file.path):
                yield from self.sort(islice(raw_rows(file, meter, keys), left), file.source)
                if self._limit is not None:
                    meter.finish()
            digest, size = meter.digest, meter.stored_bytes
            self.files.append(InputFile(path=file.path, source=file.source, digest=digest, bytes=size))
        if not self.read:
            raise InputError(f"No row in {', '.join(visible(file.path) for file in self.files[:20])}. Name other data.")
        if self._missing and self._reading.all_there and self._first:
            raise unmet(self._reading.columns, self._missing, self._first)

    def sort(self, raws: Iterable[RawRow], source: str) -> Iterator[Row]:
        """The good ones of these rows; the others are put with the bad ones."""
        for raw in raws:
            row_id, self.read = self.read, self.read + 1
            try:
                given = self._named(raw.record)
                shape, record = normalise(given, self._also)
                name = _id(given)
            except RowFault as fault:
                self.bad.append(
                    BadRow(
                        row_id=row_id,
                        source=source,
                        line=raw.line,
                        reason=fault.reason,
                        message=fault.message,
                        excerpt=raw.excerpt,
                    )
                )
                self._check_bad(source)
                continue
            self.told.update({*raw.notes, *_notes(given, record)})
            row = Row(row_id=row_id, source=source, line=raw.line, id=name, shape=shape, record=record)
            self._samples.setdefault(isinstance(record, Pair), row)
            yield row

    def _named(self, record: dict[str, Any] | RowFault) -> dict[str, Any]:
        """The record under the names it is read by. Raises RowFault where it is one."""
        if isinstance(record, RowFault):
            raise record
        if not self._reading.columns:
            return record
        self._first = self._first or tuple(record)
        for source in self._missing.keys() & record.keys():
            del self._missing[source]
        for source in self._reading.columns.keys() & record.keys():
            self.told[f"{visible(source, 40)} is read as {self._reading.columns[source]} (--map)"] += 1
        return mapped(record, self._reading.columns)

    def _check_bad(self, source: str) -> None:
        if len(self.bad) > MAX_BAD_ROWS:
            last = self.bad[-1]
            raise InputError(
                f"{visible(source)}: more than {MAX_BAD_ROWS:,} rows cannot be used, the last at line {last.line}:"
                f" {last.reason}: {last.message}. This is not the data it should be; name other files."
            )

    @property
    def samples(self) -> list[Row]:
        """The first SFT row and the first preference row until now."""
        return list(self._samples.values())


def read_rows(data: Sequence[str], also: tuple[Also, ...] = ()) -> ReadRows:
    """Every row of a `RowStream` at once. Raises as it does."""
    stream = RowStream(data, also)
    rows = list(stream)
    return ReadRows(rows=rows, bad=stream.bad, files=stream.files)


def rows_of(records: Sequence[Mapping[str, Any]], source: str, also: tuple[Also, ...] = ()) -> ReadRows:
    """Rows that are in memory already, read as those of a file `source` would be, one a line."""
    stream = RowStream((), also)
    raws = (RawRow(line, _sound(dict(record)), record) for line, record in enumerate(records, 1))
    rows = list(stream.sort(raws, source))
    return ReadRows(rows=rows, bad=stream.bad, files=[])


def _sound(record: dict[str, Any]) -> dict[str, Any] | RowFault:
    try:
        check_surrogates(record)
    except RowFault as fault:
        return fault
    return without_nulls(record)


_SET_ASIDE = "Correct them, or set them aside with --bad-rows quarantine, which lists them in rejects.jsonl."


def refuse(bad: Sequence[BadRow], beside: Sequence[BadRow] = (), advice: str = _SET_ASIDE) -> InputError:
    """The error that names bad rows as `grouped` does; those of files `beside` DATA cannot be set aside."""
    if beside:
        advice = "Correct them. Rows of DATA can be set aside with --bad-rows quarantine, those of --target cannot."
    between = ["  and of files beside DATA:"] if bad and beside else []
    told = [*grouped(bad), *between, *grouped(beside)]
    return InputError("\n".join([f"{count(len(bad) + len(beside), 'row')} cannot be used:", *told, advice]))


def grouped(bad: Sequence[BadRow]) -> Iterator[str]:
    """A line for each reason in each file, in order of first appearance, with the lines it holds for."""
    groups: dict[tuple[str, str, str], list[BadRow]] = {}
    for row in bad:
        groups.setdefault((row.source, row.reason, row.message), []).append(row)
    told = list(groups.items())
    for (source, reason, message), rows in told[:_MOST_REASONS]:
        lines = [row.line for row in rows]
        more = f" (lines {ranges(lines, _MOST_RANGES)})" if len(lines) > 1 else ""
        yield f"  {visible(source)}:{lines[0]}: {reason}: {message}{more}"
    if left := sum(len(rows) for _, rows in told[_MOST_REASONS:]):
        yield f"  and {left:,} more"


def kind_of(rows: Sequence[Row]) -> Literal["sft", "preference"]:
    """The kind of all rows, `sft` where there is none. Raises InputError where some are of either kind."""
    pair = next((row for row in rows if isinstance(row.record, Pair)), None)
    other = next((row for row in rows if not isinstance(row.record, Pair)), None)
    if pair is not None and other is not None:
        places = (f"{visible(row.source)}:{row.line}" for row in (other, pair))
        raise InputError(
            "{} is an SFT row, {} is a preference row; a run holds SFT rows or preference rows, never both: split the"
            " data.".format(*places)
        )
    return "sft" if pair is None else "preference"


# --- shapes ---


def normalise(record: dict[str, Any], also: tuple[Also, ...] = ()) -> tuple[str, AnyRecord]:
    """The name of the shape and the normal form of one row as read. Raises RowFault."""
    whole, side = _shapes(also)
    given = _given(record)
    fitting = [keys for keys in whole if given.issuperset(keys)] or [keys for keys in side if given.issuperset(keys)]
    if len(fitting) > 1:
        fitting = [keys for keys in fitting if not any(set(keys) < set(others) for others in fitting)]
    known = {**whole, **side}
    if len(fitting) == 1:
        record = with_chats(record, fitting[0])
        check_keys(record, fitting[0])
        shape, made = known[fitting[0]](record)
        check_made(record, fitting[0], made)
        return shape, made
    found = visible(", ".join(record) or "none")
    if fitting:
        both = " and ".join(" + ".join(keys) for keys in fitting)
        raise RowFault("ambiguous_shape", f"the row has {both} at once (keys: {found}); leave one of them")
    for keys in known:
        if record.keys() >= set(keys):
            empty = ", ".join(key for key in keys if record[key] is None)
            raise RowFault("null_field", f"{empty} is null; give it a value or drop the row")
    listed = "; ".join(" + ".join(keys) for keys in known)
    message = f"keys found: {found} (--map reads a column under another name); a row has one of: {listed}"
    raise RowFault("unknown_shape", message)


def _given(record: dict[str, Any]) -> set[str]:
    """The keys with a value by which a row's shape is found."""
    given = {key for key, value in record.items() if value is not None}
    if given.issuperset(("messages", "chosen", "rejected")) and record["messages"] == record["chosen"]:
        given.remove("messages")
    if given.issuperset(("instruction", *BRANCHES)) and ("prompt" in given or _are_chats(record)):
        given.remove("instruction")
    if given.issuperset(("input_ids", "labels")):
        return given.difference(MASKED)  # then they only take away
    return given.difference(MASKED[1:]) if given.issuperset(("input_ids", MASKED[0])) else given


def _are_chats(record: dict[str, Any]) -> bool:
    """Whether a branch is a list, which a prompt may be the beginning of."""
    return not all(isinstance(record[name], str) or is_message(record[name]) for name in BRANCHES)


def _notes(given: Mapping[str, Any], record: AnyRecord) -> Iterator[str]:
    """How the row was read, where a user would not expect it."""
    parts = [record.chosen, record.rejected] if isinstance(record, Pair) else [record]
    if any(isinstance(part, Messages) and part.context for part in parts):
        yield "answers that are marked off (weight, train, loss or trainable) are context"
    if isinstance(parts[0], Messages) and given.get("history"):
        yield "history is read as earlier turns"
    names = [key for key in ("input_ids", "chosen_input_ids", "rejected_input_ids") if given.get(key) is not None]
    found = sum(len(part.input_ids) for part in parts if isinstance(part, Tokens))
    if names and isinstance(parts[0], Tokens) and found < sum(len(given[key]) for key in names):
        yield "padding that attention_mask leaves out is trimmed"
    yield from notes(dict(given), record)


@cache
def _shapes(also: tuple[Also, ...]) -> tuple[Shapes, Shapes]:
    """Shapes that are read, and those that are where a row is of none of the first."""
    whole = {**SFT, **PREFERENCE, **(OPEN if "prompt" in also else {})}
    return whole, {keys: make for name in also for keys, make in SIDE[name].items()}


def _id(record: dict[str, Any]) -> str | None:
    """The row's own id as text: numbers as Python writes them (1.0), times in ISO form."""
    value = record.get("id")
    if value is None or (isinstance(value, float) and math.isnan(value)):  # no value, in columns of numbers
        return None
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bool) or not isinstance(value, int | float | str | decimal.Decimal | uuid.UUID):
        raise wrong("id", "text, a number or a time", value)
    return str(value)
