"""The language of `--by`: a small part of SQL, read here word by word and made into one polars expression.

polars' own SQL is never asked: it has tables, files and the network in it. Whatever is not in `language` is refused,
with its place. What is accepted means what it means in polars' SQL, but that all numbers are floating point, and that
a comparison with what is no number (a logarithm of -1) is neither true nor false.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Literal, NoReturn

import polars as pl

from alphatoken_curate.errors import UsageError
from alphatoken_curate.masks.language import (
    ALIASES,
    COMPARE,
    COMPARISON,
    FUNCTIONS,
    HINTS,
    JOIN,
    LEVELS,
    MOST_CHARACTERS,
    MOST_NESTED,
    MOST_PARTS,
    NOT,
    OF_MANY,
    OF_ONE,
    OF_ROW,
    ORDERED,
    PARTITIONS,
    SINGLE,
    UNARY,
    WORDS,
    Expression,
    Words,
)
from alphatoken_curate.wording import nearest


def read(by: str, columns: Sequence[str], named: Mapping[str, str]) -> Expression:
    """An expression of these columns, and of the `named` expressions of them: one number for each token.

    Raises `UsageError` that names the place where it is anything else. Nothing is computed.
    """
    if len(by) > MOST_CHARACTERS:
        raise UsageError(f"by: an expression of {len(by):,} characters; at most {MOST_CHARACTERS:,} are read")
    reader = _Reader(by, columns, named)
    found = reader.whole()
    if found.is_truth:
        reader.fail(0, "a condition is no number; give one number per token, as CASE WHEN ... THEN 1 ELSE 0 END does")
    if not found.columns:
        reader.fail(0, f"it names no column at all. The columns are {', '.join((*columns, *named))}")
    if not found.per_token:
        reader.fail(0, "it gives one number for all tokens together; give one number per token")
    return found


def is_condition(by: str, columns: Sequence[str], named: Mapping[str, str]) -> bool:
    """Whether it is a condition in place of a number. Raises `UsageError` for what is neither."""
    return _Reader(by, columns, named).whole().is_truth


class _Reader(Words):
    """Reads by precedence climbing."""

    def __init__(self, by: str, columns: Sequence[str], named: Mapping[str, str]) -> None:
        super().__init__(by)
        self._columns, self._named, self._nested = columns, named, 0

    def whole(self) -> Expression:
        found = self._expression(0)
        if self.kind != "end":
            self.refuse(self.place, self.text)
        return found

    def _made(self, expr: pl.Expr, *parts: Expression, twice: int = 0, **more: object) -> Expression:
        """An expression of others, of which the first `twice` stand in it that many times more."""
        size = 1 + sum(one.parts for one in parts) + twice * sum(one.parts for one in parts[:1])
        deep = 1 + max((one.depth for one in parts), default=0)
        if size > MOST_PARTS or deep > MOST_NESTED * 2:
            self._too_large()
        about = {
            "columns": frozenset[str]().union(*(one.columns for one in parts)),
            "reach": max((one.reach for one in parts), default=0),
            "per_token": any(one.per_token for one in parts),
            "across_turns": any(one.across_turns for one in parts),
        }
        return Expression(expr=expr, parts=size, depth=deep, **{**about, **more})  # type: ignore[arg-type]

    def _too_large(self) -> NoReturn:
        self.fail(
            self.place,
            f"too large to be computed in a bounded time: at most {MOST_PARTS:,} parts, {MOST_NESTED} nested and"
            f" {MOST_NESTED * 2} in a chain; give a shorter one",
        )

    def _number(self, level: int) -> Expression:
        place = self.place
        found = self._expression(level)
        if found.is_truth:
            self.fail(place, "a condition where a number has to stand; CAST(condition AS INT) makes 1 and 0 of it")
        return found

    def _truth(self, level: int) -> Expression:
        place = self.place
        found = self._expression(level)
        if not found.is_truth:
            self.fail(place, "a number where a condition has to stand, such as nll > 1")
        return found

    # ------------------------------------------------------------------------------------------------------- operators

    def _expression(self, level: int) -> Expression:
        """All that binds tighter than `level`."""
        self._nested += 1
        if self._nested > MOST_NESTED:
            self._too_large()
        left = self._operand()
        while True:
            place = self.place
            if level < COMPARISON and self._compares():
                left = self._comparison(left, place)
                continue
            operator = self.word if self.kind in ("name", "sign") else ""
            binds = LEVELS.get(operator, 0)
            if binds <= level:
                break
            self.at += 1
            left = self._joined(left, operator, binds, place)
        self._nested -= 1
        return left

    def _joined(self, left: Expression, operator: str, binds: int, place: int) -> Expression:
        truth = operator in ("AND", "OR")
        if left.is_truth != truth:
            self.fail(place, f"{operator} joins {'conditions' if truth else 'numbers'}")
        right = self._truth(binds) if truth else self._number(binds)
        return self._made(JOIN[operator](left.expr, right.expr), left, right, is_truth=truth)

    def _compares(self) -> bool:
        return self.word in (*COMPARE, "BETWEEN", "IN") or (self.word == "NOT" and self.following in ("BETWEEN", "IN"))

    def _comparison(self, left: Expression, place: int) -> Expression:
        if left.is_truth:
            self.fail(place, f"{self.text!r} compares numbers; join conditions by AND and OR")
        left = self._sure(left)
        denied = self.take("NOT")
        if self.take("BETWEEN"):
            low = self._sure(self._number(COMPARISON))
            self.need("AND")
            high = self._sure(self._number(COMPARISON))
            found = self._made(left.expr.is_between(low.expr, high.expr), left, low, high, is_truth=True)
        elif self.take("IN"):
            of = [self._sure(one) for one in self._arguments("IN", (1, 999))]
            same = reduce(pl.Expr.or_, (left.expr.eq(one.expr) for one in of))
            found = self._made(same, left, *of, twice=len(of), is_truth=True)
        else:
            compare = COMPARE[self.text]
            self.at += 1
            right = self._sure(self._number(COMPARISON))
            return self._made(compare(left.expr, right.expr), left, right, is_truth=True)
        return self._denied(found) if denied else found

    def _denied(self, one: Expression) -> Expression:
        return self._made(one.expr.not_(), one, is_truth=True)

    def _sure(self, one: Expression) -> Expression:
        """With null for NaN, of which no comparison is true or false: polars holds NaN for the largest number."""
        return one if one.is_leaf else self._made(one.expr.fill_nan(None), one, twice=2)

    def _operand(self) -> Expression:
        if self.take("NOT"):
            return self._denied(self._truth(NOT))
        if sign := self.take("-", "+"):
            return self._signed(sign, self._number(UNARY - 1))
        if self.kind == "number":
            return self._literal()
        if self.take("("):
            found = self._expression(0)
            self.need(")")
            return found
        if self.kind != "name":
            self.refuse(self.place, self.text)
        return self._named_part()

    def _signed(self, sign: str, one: Expression) -> Expression:
        return one if sign == "+" else self._made(one.expr.neg(), one, is_leaf=one.is_leaf)

    def _named_part(self) -> Expression:
        if self.take("CASE"):
            return self._case()
        if self.take("CAST"):
            return self._cast()
        return self._call() if self.following == "(" else self._column()

    def _literal(self) -> Expression:
        value = float(self.text)
        if value in (float("inf"), float("-inf")):
            self.fail(self.place, f"{self.text} is larger than any number")
        self.at += 1
        return self._made(pl.lit(value), is_leaf=True)

    def _column(self) -> Expression:
        name, place = self.text, self.place
        self.at += 1
        if name in self._named:
            return read(self._named[name], self._columns, {})
        if name not in self._columns:
            self.at -= 1
            if self.word in (*HINTS, *WORDS):
                self.refuse(place, name)
            known = (*self._columns, *self._named)
            near = nearest(name, (*known, "random")) or nearest(name.lower(), (*known, "random"))
            near = f" Did you mean {name.lower()}?" if name.lower() in known else near
            self.fail(place, f"names no column {name!r}.{near} The columns are {', '.join(known)}")
        return self._made(pl.col(name), columns=frozenset((name,)), per_token=True, is_leaf=True)

    def _case(self) -> Expression:
        pairs = []
        if self.word != "WHEN":
            self.fail(self.place, f"found {self.text!r} where WHEN has to stand; write CASE WHEN a = b THEN ...")
        while self.take("WHEN"):
            condition = self._truth(0)
            self.need("THEN")
            pairs.append((condition, self._number(0)))
        found = self._number(0) if self.take("ELSE") else self._made(pl.lit(None, pl.Float64))
        self.need("END")
        for condition, value in reversed(pairs):
            chosen = pl.when(condition.expr).then(value.expr).otherwise(found.expr)
            found = self._made(chosen, condition, value, found)
        return found

    def _cast(self) -> Expression:
        self.need("(")
        found = self._expression(0)
        if not found.is_truth:
            self.fail(self.place, "numbers are floating point already; FLOOR, CEIL and ROUND make whole ones")
        self.need("AS")
        if not self.take("INT", "INTEGER", "BIGINT", "FLOAT", "DOUBLE"):
            self.fail(self.place, f"found {self.text!r}; a condition is cast AS INT")
        self.need(")")
        return self._made(found.expr.cast(pl.Float64), found)

    # ------------------------------------------------------------------------------------------------------- functions

    def _call(self) -> Expression:
        name, place = ALIASES.get(self.word, self.word), self.place
        if name not in FUNCTIONS:
            if name in (*HINTS, *WORDS):
                self.refuse(place, self.text)
            near = nearest(name, FUNCTIONS)
            self.fail(place, f"there is no function {self.text!r}.{near} The functions are {', '.join(FUNCTIONS)}")
        self.at += 1
        if name in ORDERED:
            return self._ordered(name, place)
        if name == "IF":
            return self._if()
        if name == "COUNT":
            self.need("(", "*", ")")
            return self._of_many(name, [], place)
        arguments = self._arguments(name, {**OF_ONE, **OF_MANY, **OF_ROW}[name])
        return self._of_one(name, arguments, place) if name in OF_ONE else self._of_many(name, arguments, place)

    def _arguments(self, name: str, takes: tuple[int, int]) -> list[Expression]:
        place, found = self.place, []
        self.need("(")
        while self.word != ")":
            found.append(self._number(0))
            if not self.take(","):
                break
        self.need(")")
        least, most = takes
        if not least <= len(found) <= most:
            wanted = f"{least}" if least == most else f"{least} to {most}" if most < 99 else f"{least} or more"
            self.fail(place, f"{name} takes {wanted}, and not {len(found)} numbers")
        return found

    def _if(self) -> Expression:
        self.need("(")
        condition = self._truth(0)
        self.need(",")
        yes = self._number(0)
        self.need(",")
        no = self._number(0)
        self.need(")")
        return self._made(pl.when(condition.expr).then(yes.expr).otherwise(no.expr), condition, yes, no)

    def _of_one(self, name: str, of: list[Expression], place: int) -> Expression:
        first, exprs = of[0], [one.expr for one in of]
        if name == "COALESCE":
            return self._made(pl.coalesce(exprs), *of)
        if name == "NULLIF":
            same = self._sure(first).expr.eq(self._sure(of[1]).expr)
            return self._made(pl.when(same).then(None).otherwise(first.expr), *of, of[1], of[1], twice=3)
        if name == "POWER":
            return self._made(exprs[0].pow(exprs[1]), *of)
        if name == "ROUND":
            digits = self._constant(name, of[1], place, (0, 15)) if len(of) > 1 else 0
            return self._made(exprs[0].round(int(digits)), first)
        if name in ("GREATEST", "LEAST"):
            found = (pl.max_horizontal if name == "GREATEST" else pl.min_horizontal)(exprs)
            unsure = [one for one in of if not one.is_leaf]
            if unsure:  # polars passes NaN over
                bad = pl.any_horizontal([one.expr.is_nan() for one in unsure]).fill_null(False)
                found = pl.when(bad).then(float("nan")).otherwise(found)
            return self._made(found, *of, *unsure)
        return self._made(SINGLE[name](exprs[0]), first)

    def _constant(self, name: str, one: Expression, place: int, bounds: tuple[float, float]) -> float:
        low, high = bounds
        value = None if one.columns or not one.is_leaf else float(pl.select(one.expr).item())
        if value is None or not low <= value <= high or (name != "QUANTILE_CONT" and value % 1):
            kind = "a number" if name == "QUANTILE_CONT" else "a whole number"
            self.fail(place, f"{name} takes {kind} from {low:g} to {high:g} as its second")
        return value

    def _of_many(self, name: str, of: list[Expression], place: int) -> Expression:
        self._looks_at_columns(name, of[:1], place)
        if name == "COUNT":
            expr = pl.len().cast(pl.Float64)
        elif name == "QUANTILE_CONT":
            expr = of[0].expr.quantile(self._constant(name, of[1], place, (0, 1)), "linear")
        else:
            expr = SINGLE[name](of[0].expr)
        twice = 0
        if name in ("MAX", "MEDIAN", "MIN", "QUANTILE_CONT") and not of[0].is_leaf:  # polars passes NaN over
            expr, twice = pl.when(of[0].expr.is_nan().any()).then(float("nan")).otherwise(expr), 1
        if name not in OF_ROW and not self.take("OVER"):
            if any(one.reach > 1 for one in of):
                self.fail(place, f"{name} of another function of all tokens; give that one an OVER (...)")
            return self._made(expr, *of, twice=twice, reach=2, per_token=False)
        self._of_single_tokens(name, of, place)
        partition, order = (["row_id"], None) if name in OF_ROW else self._window()
        if order:
            self.fail(place, f"{name} takes no ORDER BY: that is for {', '.join(ORDERED)}")
        return self._over(name, expr, partition, of, twice)

    def _ordered(self, name: str, place: int) -> Expression:
        of = self._arguments(name, ORDERED[name])
        self._looks_at_columns(name, of[:1], place)
        self.need("OVER")
        partition, order = self._window()
        if order is None:
            self.fail(place, f"{name} takes OVER (PARTITION BY row_id, turn ORDER BY position), or another order")
        key, descending = order
        across = "row_id" in partition and "position" in key.columns and "turn" not in {*partition, *key.columns}
        key = replace(key, columns=key.columns | {"turn"}, across_turns=True) if across else key
        self._of_single_tokens(name, [*of, key], place)
        self._looks_at_columns(f"ORDER BY of {name}", [key], place)
        if name in ("LAG", "LEAD"):
            far = int(self._constant(name, of[1], place, (1, 1 << 20))) if len(of) > 1 else 1
            expr = of[0].expr.shift(far if name == "LAG" else -far)
            expr = expr.over(partition or None, order_by=key.expr, descending=descending)
            return self._made(expr, *of, key, columns=self._all(of, key, partition), reach=1, per_token=True)
        methods: Mapping[str, Literal["min", "dense", "ordinal"]]
        methods = {"RANK": "min", "DENSE_RANK": "dense", "ROW_NUMBER": "ordinal"}
        sure = self._sure(key)
        ranked = sure.expr.rank(methods[name], descending=descending).cast(pl.Float64)
        return self._over(name, ranked, partition, [replace(sure, across_turns=across, columns=key.columns)])

    def _over(self, name: str, expr: pl.Expr, partition: list[str], of: list[Expression], twice: int = 0) -> Expression:
        columns = self._all(of, None, partition)
        expr = expr.over(partition) if partition else expr
        wide = bool(partition) or name in ORDERED
        return self._made(expr, *of, twice=twice, columns=columns, reach=1, per_token=wide)

    def _all(self, of: list[Expression], key: Expression | None, partition: list[str]) -> frozenset[str]:
        return frozenset(partition).union(*(one.columns for one in (*of, *([key] if key else []))))

    def _window(self) -> tuple[list[str], tuple[Expression, bool] | None]:
        """What stands behind OVER: the columns of PARTITION BY, and the key of ORDER BY and whether it descends."""
        partition: list[str] = []
        self.need("(")
        if self.take("PARTITION"):
            self.need("BY")
            while True:
                if self.text not in PARTITIONS:
                    self.fail(self.place, f"found {self.text!r}; PARTITION BY takes {', '.join(PARTITIONS)}")
                partition.append(self.text)
                self.at += 1
                if not self.take(","):
                    break
        order = None
        if self.take("ORDER"):
            self.need("BY")
            order = (self._number(0), self.take("ASC", "DESC") == "DESC")
        self.need(")")
        return partition, order

    def _of_single_tokens(self, name: str, of: Sequence[Expression], place: int) -> None:
        if any(one.reach for one in of):
            self.fail(place, f"{name} OVER others of what looks at several tokens itself; give it one of single tokens")

    def _looks_at_columns(self, name: str, of: Sequence[Expression], place: int) -> None:
        if any(not one.columns for one in of):
            self.fail(place, f"{name} of no column")
