"""Read files that are one JSON array, the form of Alpaca and LLaMA-Factory, pretty-printed or not, element by element.

A scanner finds where each element ends, and `containers` reads it as it reads a line: with the same checks and caps,
and a fault stays within its own element. A streaming parser of a whole file has other rules for repeated keys and
large numbers, and stops at the first fault. No more than one element and one piece of the file are held at a time.

The number of an element, from 1, is what is called its line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain

from alphatoken_curate.errors import InputError
from alphatoken_curate.rows.containers import (
    BYTE_ORDER_MARK,
    MAX_LINE_BYTES,
    Meter,
    RawRow,
    chunks,
    json_row,
    line_rows,
)
from alphatoken_curate.rows.files import DataFile, visible
from alphatoken_curate.wording import count

_ARRAY, _OBJECT, _UTF16 = b"[", re.compile(rb"\{\s*\n"), (b"\xff\xfe", b"\xfe\xff")
_SPACE = b" \t\r\n"
_LOOKED_AT, _ENOUGH = 2**16, 64
"""Bytes that are looked at to tell lines from an array, and how many behind white space are enough."""
_PACKED = (".gz", ".zst")
# whole strings are taken in one match; a lone quotation mark begins one that ends in a later piece
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["\[\]{},]', re.DOTALL)
_IN_STRING = re.compile(rb'["\\]')


def json_rows(file: DataFile, meter: Meter, magic: bytes) -> Iterator[RawRow]:
    """The rows of a file of JSON, lines or one array; packed or not as its first bytes `magic` tell.

    A file named `.json` is an array where it begins with `[`; of any other name, where that stands alone on its line.
    Raises InputError for an array that is not whole, with the place.
    """
    pieces = filter(None, chunks(file, meter, magic))
    head, held = b"", list[bytes]()
    for piece in pieces:
        held.append(piece)
        head += piece[: _LOOKED_AT - len(head)]
        if len(head.strip(_SPACE)) >= _ENOUGH or len(head) == _LOOKED_AT:
            break
    if head.startswith(_UTF16):
        raise InputError(f"{visible(file.path)}: UTF-16 text, which is not read. Save it as UTF-8.")
    start = head.removeprefix(BYTE_ORDER_MARK).lstrip(_SPACE)
    named = _is_named_json(file.path)
    if start.startswith(_ARRAY) and (named or start[1:].lstrip(b" \t\r").startswith(b"\n")):
        yield from _elements(file, chain(held, pieces))
    elif named and _OBJECT.match(start):
        raise InputError(
            f"{visible(file.path)}: one JSON object over several lines. Rows are objects on lines of their own, or the"
            " elements of one array."
        )
    else:
        yield from line_rows(chain(held, pieces))


def _is_named_json(path: str) -> bool:
    return path.removesuffix(_PACKED[0]).removesuffix(_PACKED[1]).endswith(".json")


def _elements(file: DataFile, pieces: Iterable[bytes]) -> Iterator[RawRow]:
    scan = _Scan(visible(file.path))
    for piece in pieces:
        for number, data in scan.feed(piece):
            yield json_row(number, data)
    scan.end()


class _Scan:
    """Where the elements of an array begin and end, in pieces of any size. Raises InputError with the place."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._depth = 0  # of brackets that are open; 1 between the elements
        self._quoted = self._escaped = self._over = False
        self._held = bytearray()  # of the element that is read, from its first character
        self._comma = False  # behind one, an element must follow
        self._count, self._newlines = 0, 0

    def feed(self, piece: bytes) -> Iterator[tuple[int, bytes]]:
        """The elements that end in a piece, with their numbers."""
        place = start = 0
        while place < len(piece) and not self._over:
            if self._quoted:
                place = self._in_string(piece, place)
                continue
            found = _TOKEN.search(piece, place)
            if found is None:
                break
            mark, place = found[0][:1], found.end()
            if mark == b'"':
                self._quoted = len(found[0]) == 1
            elif self._is_border(mark):
                self._newlines += piece.count(b"\n", start, place)
                yield from self._ended(mark, piece[start : found.start()])
                start = place
        if self._over:
            self._check_nothing(piece[place:])
        else:
            self._hold(piece[start:])
            self._newlines += piece.count(b"\n", start)

    def end(self) -> None:
        """The file is over. Raises InputError where the array is not."""
        if not self._over:
            raise self._fault(
                f"the file ends within the array, after {count(self._count, 'whole element')}. Get it again"
            )

    def _in_string(self, piece: bytes, place: int) -> int:
        """The place behind the next character of a string that may end it."""
        if self._escaped:
            self._escaped = False
            return place + 1
        found = _IN_STRING.search(piece, place)
        if found is None:
            return len(piece)
        self._quoted, self._escaped = found[0] != b'"', found[0] == b"\\"
        return found.end()

    def _is_border(self, mark: bytes) -> bool:
        """Whether the array begins or ends here, or one of its elements ends."""
        if mark in b"[{":
            self._depth += 1
            return self._depth == 1
        if self._depth > 1:
            self._depth -= mark != b","
            return False
        return True

    def _hold(self, data: bytes) -> None:
        kept = data if self._held else data.lstrip(_SPACE)
        self._held += kept[: MAX_LINE_BYTES + 1 - len(self._held)]

    def _ended(self, mark: bytes, before: bytes) -> Iterator[tuple[int, bytes]]:
        """The array begins, by `[`, or an element ends, by a comma or with the array."""
        if mark == b"[":
            return
        self._hold(before)
        data, self._held = bytes(self._held).rstrip(_SPACE), bytearray()
        if mark == b"}":
            raise self._fault("a } where the array is open. Close it by ]")
        if data:
            self._count += 1
            yield self._count, data
        elif mark == b",":
            raise self._fault(f"a comma without an element before it, after element {self._count:,}. Remove it")
        elif self._comma:
            raise self._fault(f"a comma before the end of the array, after element {self._count:,}. Remove it")
        self._comma, self._over = mark == b",", mark == b"]"

    def _check_nothing(self, data: bytes) -> None:
        rest = data.lstrip(_SPACE)
        self._newlines += data.count(b"\n", 0, len(data) - len(rest))
        if rest:
            raise self._fault("text behind the end of the array. A file holds one array, or JSON lines")

    def _fault(self, found: str) -> InputError:
        return InputError(f"{self._path}: line {self._newlines + 1:,} of the file: {found}.")
