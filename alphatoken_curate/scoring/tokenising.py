"""Rows become tokens a thousand at a time: in this process, and where that goes on for long in several.

Whoever makes them, they are the same tokens, bad rows and counts, in the order of rows.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import pyarrow as pa

from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.load import ModelSource, load_tokenizer
from alphatoken_curate.rows.read import BadRow, Row
from alphatoken_curate.scoring.spawned import environment, interrupts_ignored, portable, settle
from alphatoken_curate.tokens.chat import ChatSettings, Tokenizer
from alphatoken_curate.tokens.packed import pack
from alphatoken_curate.tokens.tokenise import Runaways, speller_of, tokenise

_ROWS = 1000
"""Rows that are handed over together."""

ALONE = 10.0
"""Seconds of tokenising after which others help: to begin takes them some."""

_PATIENCE = 5.0
"""Seconds that a process has to end."""


def tokenizer_with(template: str | None, source: ModelSource, *, trust_remote_code: bool) -> Tokenizer | None:
    """The tokenizer of a model, with a chat template in place of its own if one is given; None where it has none."""
    found = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if found is not None and template is not None:
        found.chat_template = template
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that tokens are made by; picklable."""

    source: ModelSource
    trust_remote_code: bool
    template: str | None
    """A chat template in place of the tokenizer's own."""
    chats: ChatSettings
    turns: str
    max_length: int
    vocab_size: int | None
    stop_ids: frozenset[int]

    def tokenizer(self) -> Tokenizer | None:
        """As `tokenizer_with`."""
        return tokenizer_with(self.template, self.source, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What came of some rows: a table of their tokens (`packed`), and what `tokenise` tells beside them."""

    table: pa.Table
    bad: list[BadRow]
    told: Counter[str] = field(default_factory=Counter)
    runaways: list[str] = field(default_factory=list)
    day_written: bool = False


class Tokeniser:
    """Makes tokens by a recipe, with its `tokenizer` as it is loaded."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer | None) -> None:
        self._recipe, self._tokenizer = recipe, tokenizer

    def __call__(self, rows: list[Row]) -> Made:
        """The tokens of some rows; of none where a template runs away at too many of them."""
        recipe, told, runaways = self._recipe, Counter[str](), Runaways()
        try:
            good, bad = tokenise(
                rows,
                self._tokenizer,
                max_length=recipe.max_length,
                turns=recipe.turns,
                vocab_size=recipe.vocab_size,
                stop_ids=recipe.stop_ids,
                told=told,
                runaways=runaways,
                # Advice about bad rows is that of the first of a kind: of those handed over, whoever had others before
                speller=speller_of(self._tokenizer, recipe.chats, turns=recipe.turns),
            )
        except ModelError:
            if not runaways.enough:
                raise
            good, bad = [], []
        day = recipe.chats.day
        written = day is not None and day.written
        return Made(table=pack(good), bad=bad, told=told, runaways=runaways.told, day_written=written)


def tokenised(rows: Iterable[Row], recipe: Recipe, tokenizer: Tokenizer | None, processes: int = 1) -> Iterator[Made]:
    """The tokens of all rows, some at a time, in order; `processes` besides this one where it takes long.

    Raises ModelError where a template runs away at too many rows, and what reading the rows raises.
    """
    runaways = Runaways()
    for one in _in_turn(_chunks(rows), recipe, Tokeniser(recipe, tokenizer), processes):
        for told in one.runaways:
            runaways.note(told)
        yield one


def _in_turn(chunks: Iterator[list[Row]], recipe: Recipe, here: Tokeniser, processes: int) -> Iterator[Made]:
    began = time.monotonic()
    for chunk in chunks:
        yield here(chunk)
        if processes > 1 and time.monotonic() - began >= ALONE:
            helpers = _Helpers(recipe, processes)
            try:
                yield from helpers.made(chunks, here)
            finally:
                helpers.end()


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    waiting = iter(rows)
    while chunk := list(islice(waiting, _ROWS)):
        yield chunk


@dataclass(slots=True, eq=False)
class _Helper:
    process: BaseProcess
    pipe: Connection
    ready: bool = False
    task: tuple[int, list[Row]] | None = None


class _Helpers:
    """Processes that tokenise. What one was at that died is done here."""

    def __init__(self, recipe: Recipe, processes: int) -> None:
        self._helpers = [_started(recipe) for _ in range(processes)]
        self._ahead = 2 * processes

    def made(self, chunks: Iterator[list[Row]], here: Tokeniser) -> Iterator[Made]:
        """What came of chunks, in their order."""
        todo, done, next_in, next_out = deque[tuple[int, list[Row]]](), dict[int, Made](), 0, 0
        while True:
            while next_in - next_out < self._ahead and (chunk := next(chunks, None)) is not None:
                todo.append((next_in, chunk))
                next_in += 1
            self._hand(todo)
            if next_out in done:
                yield done.pop(next_out)
                next_out += 1
            elif next_out == next_in:
                return
            elif any(helper.task is not None for helper in self._helpers):
                done |= self._heard(todo)
            else:  # none is ready yet, or none is left
                number, chunk = todo.popleft()
                done[number] = here(chunk)
                done |= self._heard(todo, timeout=0.0)

    def end(self) -> None:
        """End all."""
        for helper in self._helpers:
            helper.pipe.close()
            helper.process.terminate()
        for helper in self._helpers:
            helper.process.join(_PATIENCE)
            if helper.process.is_alive():
                helper.process.kill()
                helper.process.join()

    def _hand(self, todo: deque[tuple[int, list[Row]]]) -> None:
        for helper in self._helpers:
            if helper.ready and helper.task is None and todo:
                helper.task = todo.popleft()
                with suppress(OSError):  # it died: its end of the pipe tells
                    helper.pipe.send(helper.task[1])

    def _heard(self, todo: deque[tuple[int, list[Row]]], timeout: float | None = None) -> dict[int, Made]:
        """What helpers say, by the number of the chunk; the chunks of those that died are to be done again."""
        found: dict[int, Made] = {}
        pipes = {helper.pipe: helper for helper in self._helpers}
        for pipe in wait(list(pipes), timeout):
            assert isinstance(pipe, Connection)
            helper = pipes[pipe]
            try:
                said = pipe.recv()
            except (EOFError, OSError):
                self._helpers.remove(helper)
                pipe.close()
                if helper.task is not None:
                    todo.appendleft(helper.task)
                continue
            if isinstance(said, Exception):
                raise said
            helper.ready = True
            if isinstance(said, Made) and helper.task is not None:
                found[helper.task[0]], helper.task = said, None
        return found


def _started(recipe: Recipe) -> _Helper:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # Its tokenizer would take all cores by itself.
    with environment({"TOKENIZERS_PARALLELISM": "false"}), interrupts_ignored():
        process = context.Process(target=serve, args=(theirs, recipe), name="tokenising", daemon=True)
        process.start()
    theirs.close()
    return _Helper(process, ours)


def serve(pipe: Connection, recipe: Recipe) -> None:
    """What such a process does: rows in, what came of them out, until the other end is gone."""
    settle()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        made = Tokeniser(recipe, recipe.tokenizer())
        pipe.send(None)
        while True:
            pipe.send(_answer(made, pipe.recv()))


def _answer(made: Tokeniser, rows: list[Row]) -> Made | Exception:
    try:
        return made(rows)
    except Exception as error:
        return portable(error)
