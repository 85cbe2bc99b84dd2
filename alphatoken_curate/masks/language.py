"""The words, operators and functions of `--by`, and what comes of reading them: all that `expression` knows.

Each is polars' own, of one name here and in its SQL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

import polars as pl

from alphatoken_curate.errors import UsageError

MOST_CHARACTERS = 4_000
MOST_NESTED = 50
MOST_PARTS = 1_000
"""What polars computes in less than a second beside the arithmetic itself, however the parts are nested."""

TOKEN = re.compile(
    r"(?P<space>[ \t\r\n]+)|(?P<comment>--|/\*)|(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?(?![\w.]))"
    r"|(?P<name>[a-z_]\w*)|(?P<sign><=|>=|<>|!=|//|\|\||[-+*/%=<>(),])",
    re.IGNORECASE | re.ASCII,
)

OF_ONE: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys(("ABS", "CEIL", "EXP", "FLOOR", "LN", "LOG10", "LOG1P", "LOG2", "SIGN", "SQRT"), (1, 1)),
    "ROUND": (1, 2),
    **dict.fromkeys(("NULLIF", "POWER"), (2, 2)),
    "IF": (3, 3),
    **dict.fromkeys(("COALESCE", "GREATEST", "LEAST"), (2, 99)),
}
"""Functions of one token: the least and the most numbers that each takes."""

OF_MANY: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys(("AVG", "COUNT", "MAX", "MEDIAN", "MIN", "STDDEV", "SUM", "VARIANCE"), (1, 1)),
    "QUANTILE_CONT": (2, 2),
}
"""Functions of all tokens, or of those that a PARTITION BY puts together."""

OF_ROW: Mapping[str, tuple[int, int]] = dict.fromkeys(("ROW_MEAN", "ROW_SUM"), (1, 1))
"""AVG and SUM OVER (PARTITION BY row_id), by a name of their own."""

ORDERED: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys(("DENSE_RANK", "RANK", "ROW_NUMBER"), (0, 0)),
    **dict.fromkeys(("LAG", "LEAD"), (1, 2)),
}
"""Functions that need an ORDER BY."""

FUNCTIONS = tuple(sorted((*OF_ONE, *OF_MANY, *OF_ROW, *ORDERED)))

PARTITIONS = ("row_id", "turn", "position", "token_id")
"""Columns that PARTITION BY takes."""

WORDS = (
    *("AND", "AS", "ASC", "BETWEEN", "BY", "CASE", "CAST", "DESC", "ELSE", "END"),
    *("IN", "NOT", "OR", "ORDER", "OVER", "PARTITION", "THEN", "WHEN"),
)
"""What else has a meaning, and is no name."""

ALIASES = {"CEILING": "CEIL", "POW": "POWER"}

LEVELS = {"OR": 1, "AND": 2, "+": 5, "-": 5, "*": 6, "/": 6, "%": 6}
NOT, COMPARISON, UNARY = 3, 4, 7
"""How tightly operators bind: the larger the tighter."""

COMPARE: Mapping[str, Callable[[pl.Expr, pl.Expr], pl.Expr]] = {
    "=": pl.Expr.eq,
    "<>": pl.Expr.ne,
    "!=": pl.Expr.ne,
    "<": pl.Expr.lt,
    "<=": pl.Expr.le,
    ">": pl.Expr.gt,
    ">=": pl.Expr.ge,
}
JOIN: Mapping[str, Callable[[pl.Expr, pl.Expr], pl.Expr]] = {
    "+": pl.Expr.add,
    "-": pl.Expr.sub,
    "*": pl.Expr.mul,
    "/": pl.Expr.truediv,
    "%": pl.Expr.mod,
    "AND": pl.Expr.and_,
    "OR": pl.Expr.or_,
}
SINGLE: Mapping[str, Callable[[pl.Expr], pl.Expr]] = {
    "ABS": pl.Expr.abs,
    "CEIL": pl.Expr.ceil,
    "EXP": pl.Expr.exp,
    "FLOOR": pl.Expr.floor,
    "LN": pl.Expr.log,
    "LOG10": lambda x: x.log(10.0),
    "LOG1P": pl.Expr.log1p,
    "LOG2": lambda x: x.log(2.0),
    "SIGN": pl.Expr.sign,
    "SQRT": pl.Expr.sqrt,
    "AVG": pl.Expr.mean,
    "MAX": pl.Expr.max,
    "MEDIAN": pl.Expr.median,
    "MIN": pl.Expr.min,
    "STDDEV": pl.Expr.std,
    "ROW_MEAN": pl.Expr.mean,
    "ROW_SUM": pl.Expr.sum,
    "SUM": pl.Expr.sum,
    "VARIANCE": pl.Expr.var,
}

HINTS = {
    "--": "-- begins a comment in SQL; write - (-1) for the minus of a minus",
    "/*": "there are no comments here",
    "//": "write FLOOR(a / b)",
    "||": "nothing here is text",
    "'": "nothing here is text: every column holds numbers",
    '"': "names stand without quotes",
    "`": "names stand without quotes",
    ";": "it takes one expression, and no statement",
    "[": "columns hold one number a token",
    "LOG": "write LN, LOG2 or LOG10",
    "NULL": "a CASE without ELSE gives none",
    "IS": "COALESCE(a, b) gives b where a is none",
    "SELECT": "it takes one expression, and reads no tables",
    "FROM": "it takes one expression, and reads no tables",
    "OVER": "OVER (...) follows a function of many tokens; ROW_MEAN and ROW_SUM are over their row as they are",
    "FILTER": "put a CASE inside the function",
    "RANDOM": "`random` is a draw by itself, and no part of an expression",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Expression:
    """What was read, as polars computes it from integer columns made Float64.

    `columns`: that it names; `reach`: 0 where it tells each token alone, 1 with a function OVER others, 2 with one of
    all tokens; `is_truth`: a condition, no number; `per_token`: more than one number for all; `parts`, `depth`: its
    size; `is_leaf`: a column or a number, which is never NaN; `across_turns`: it orders the tokens of a row by position
    alone, and each of its turns counts from 0.
    """

    expr: pl.Expr
    columns: frozenset[str] = frozenset()
    reach: int = 0
    is_truth: bool = False
    per_token: bool = False
    parts: int = 1
    depth: int = 1
    is_leaf: bool = False
    across_turns: bool = False


class Words:
    """The tokens of an expression, one at a time: each of a `kind`, a `text`, a `word` in capitals and a `place`."""

    def __init__(self, by: str) -> None:
        self.by, self.at = by, 0
        self.tokens = list(self._cut())

    def _cut(self) -> Iterator[tuple[str, str, int]]:
        place = 0
        while place < len(self.by):
            found = TOKEN.match(self.by, place)
            if found is None or found.lastgroup == "comment":
                self.refuse(place, found[0] if found else self.by[place])
            if found.lastgroup != "space":
                yield str(found.lastgroup), found[0], place
            place = found.end()
        yield "end", "", place

    @property
    def kind(self) -> str:
        """`number`, `name`, `sign`, or `end` behind the last."""
        return self.tokens[self.at][0]

    @property
    def text(self) -> str:
        """As it stands there."""
        return self.tokens[self.at][1]

    @property
    def word(self) -> str:
        """In capitals: words and functions may be written in either case."""
        return self.text.upper()

    @property
    def place(self) -> int:
        """Of its first character, from 0."""
        return self.tokens[self.at][2]

    def fail(self, place: int, why: str) -> NoReturn:
        """Raise for what stands at a place, the first is 0."""
        shown = self.by if len(self.by) <= 100 else f"...{self.by[max(0, place - 40) : place + 40]}..."
        where = f" at character {place + 1}" if place else ""
        raise UsageError(f"by: {shown!r}{where}: {why}")

    def refuse(self, place: int, found: str) -> NoReturn:
        """Raise for a word that is not of the language."""
        word = found.upper()
        what = f"found {found!r}" if found else "it ends too early"
        if word in HINTS:
            self.fail(place, f"{what}; {HINTS[word]}")
        self.fail(
            place,
            f"{what}; not an expression of --by. It takes columns, numbers, + - * / %, comparisons, AND, OR, NOT,"
            f" BETWEEN, IN, CASE, CAST(condition AS INT), and {', '.join(FUNCTIONS)}",
        )

    def take(self, *words: str) -> str | None:
        """The next token where it is one of these, which then is read."""
        if self.kind in ("name", "sign") and self.word in words:
            self.at += 1
            return self.tokens[self.at - 1][1].upper()
        return None

    def need(self, *words: str) -> None:
        """Read these tokens. Raises `UsageError` where another stands."""
        for word in words:
            if not self.take(word):
                found = f"found {self.text!r}" if self.text else "it ends"
                self.fail(
                    self.place,
                    f"{found} where {word} has to stand" + (f"; {HINTS[self.word]}" if self.word in HINTS else ""),
                )

    @property
    def following(self) -> str:
        """The token behind this one, in capitals."""
        return self.tokens[self.at + 1][1].upper() if self.kind != "end" else ""
