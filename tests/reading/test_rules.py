from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from small_run import BETA, paired, value_rows

from alphatoken_curate.reading import rules
from alphatoken_curate.reading.rules import Total
from alphatoken_curate.runs import shards
from alphatoken_curate.runs.manifest import Mask
from alphatoken_curate.runs.schema import (
    BY_ESTIMATOR,
    IGNORE_INDEX,
    LAYOUTS,
    PREFERENCE,
    SFT,
    SIGNALS,
    Layout,
    components,
)
from alphatoken_curate.runs.shards import Shard, ValueRow

Content = dict[str, list[Any]]
Change = Callable[[Content], None]

PARTED = components("published")
ABSENT = [name for name in SIGNALS if name not in PARTED.signals]
BRANCHES = [(layout, prefix) for layout in LAYOUTS.values() for prefix in layout.branches]
each_branch = pytest.mark.parametrize(("layout", "prefix"), BRANCHES, ids=lambda x: x if isinstance(x, str) else "")


@cache
def values_table(layout: Layout, seed: int = 0) -> pa.Table:
    return shards.values_table(value_rows(kind=layout.kind, seed=seed), layout)


def scored(layout: Layout) -> pa.Table:
    found = rules.scored_in_all([values_table(layout)])
    assert found is not None
    return found


@cache
def train_table(layout: Layout) -> pa.Table:
    """Every other response token trains, with weight 1: made without the code that writes train shards."""
    rows = scored(layout).to_pylist()
    columns: Content = {name: [row[name] for row in rows] for name in ("row_id", "turn")}
    for prefix in layout.branches:
        keeps = [[int(on and i % 2 == 1) for i, on in enumerate(row[prefix + "response"])] for row in rows]
        ids = [row[prefix + "input_ids"] for row in rows]
        columns[prefix + "input_ids"] = ids
        columns[prefix + "attention_mask"] = [[1] * len(one) for one in ids]
        columns[prefix + "labels"] = [
            [token if on else IGNORE_INDEX for token, on in zip(*pair, strict=True)]
            for pair in zip(ids, keeps, strict=True)
        ]
        columns[prefix + "loss_mask"] = keeps
        columns[prefix + "loss_weight"] = [[float(on) for on in keep] for keep in keeps]
        columns[prefix + "value"] = [row[prefix + "value"] for row in rows]
    return pa.table(columns, schema=layout.train)


def changed(table: pa.Table, change: Change) -> pa.Table:
    content = table.to_pydict()
    change(content)
    return pa.table(content, schema=table.schema)


def as_shard(table: pa.Table, prefixes: Sequence[str], response: pa.Table) -> Shard:
    tokens, trains = 0, 0
    for prefix in prefixes:
        tokens += sum(map(len, table[prefix + "input_ids"].to_pylist()))
        trains += sum(map(sum, response[prefix + "response"].to_pylist()))
    return Shard(path="", rows=table.num_rows, tokens=tokens, response_tokens=trains, bytes=0, sha256="")


def wrong_values(layout: Layout, change: Change, *, beta: float | str | None = BETA) -> list[str]:
    good = values_table(layout)
    shard = as_shard(good, layout.branches, good)
    return list(rules.values(changed(good, change), layout, PARTED, shard, Total(), beta=beta))


def wrong_train(layout: Layout, change: Change) -> list[str]:
    good = train_table(layout)
    totals = [Total() for _ in layout.branches]
    shard = as_shard(good, layout.branches, scored(layout))
    return list(rules.train(changed(good, change), scored(layout), shard, layout, totals))


def nothing(content: Content) -> None: ...


def row_with(content: Content, prefix: str) -> int:
    """A row with some tokens, of those that are scored."""
    rows = range(len(content["row_id"]))
    return next(i for i in rows if len(content[prefix + "input_ids"][i]) > 3 and content["row_id"][i] not in (3, 5, 7))


def put(column: str, index: int, value: Any) -> Callable[[str], Change]:
    """Set an entry of a list; of the branch whose prefix it is given."""

    def of(prefix: str) -> Change:
        def change(content: Content) -> None:
            content[prefix + column][row_with(content, prefix)][index] = value

        return change

    return of


def put_trained(column: str, value: Any) -> Callable[[str], Change]:
    """Set an entry of a list at the first token that trains."""

    def of(prefix: str) -> Change:
        def change(content: Content) -> None:
            weights = content[prefix + "loss_weight"]
            row, i = next((r, i) for r, row in enumerate(weights) for i, w in enumerate(row) if w > 0)
            content[prefix + column][row][i] = value

        return change

    return of


def drop(column: str) -> Callable[[str], Change]:
    """Take the last entry off a list."""

    def of(prefix: str) -> Change:
        def change(content: Content) -> None:
            content[prefix + column][row_with(content, prefix)].pop()

        return change

    return of


def set_row(column: str, row: int, value: Any) -> Change:
    def change(content: Content) -> None:
        content[column][row] = value

    return change


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_what_is_written_keeps_the_rules(layout: Layout) -> None:
    assert wrong_values(layout, nothing) == []
    assert wrong_train(layout, nothing) == []
    assert list(rules.other_rows(values_table(layout, 1), values_table(layout), layout)) == []


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("input_ids"), "`{}response` is not as long as `{}input_ids`"),
        (drop("response"), "`{}response` is not as long as `{}input_ids`"),
        (put("response", 0, True), "`{}response` is true at index 0"),
        *((drop(name), f"`{{}}{name}` is not as long") for name in SIGNALS),
        *((put(name, -1, None), f"`{{}}{name}` is not null exactly") for name in PARTED.always),
        *((put(name, 0, 0.0), f"`{{}}{name}` is not null exactly") for name in PARTED.signals),
        *((put(name, -1, 0.0), f"`{{}}{name}` is not null everywhere") for name in ABSENT),
        *((put(name, -1, float("nan")), f"`{{}}{name}` is not ") for name in SIGNALS),
        (put("value", -1, float("inf")), "`{}value` is not finite"),
    ],
)
@each_branch
def test_values_of_a_branch(layout: Layout, prefix: str, change: Callable[[str], Change], message: str) -> None:
    found = wrong_values(layout, change(prefix))
    assert any(what.startswith(message.format(prefix, prefix)) for what in found), found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_row("row_id", 1, 7), "row ids do not go on one by one from 0"),
        (set_row("status", 1, "done"), "status 'done' is none of"),
        (set_row("response", 3, [False, True]), "`response` is not empty for rejected rows"),
        (set_row("nll", 5, [1.0]), "`nll` is not as long"),
        (set_row("response", 5, [False]), "not as in the manifest"),
    ],
)
def test_values_of_a_row(change: Change, message: str) -> None:
    assert any(message in what for what in wrong_values(SFT, change))


@pytest.mark.parametrize("name", [name for name in PARTED.signals if name not in PARTED.always])
@each_branch
def test_signals_that_are_computed_for_some_rows_only(layout: Layout, prefix: str, name: str) -> None:
    def set_all(value: float | None, rows: int) -> Change:
        def change(content: Content) -> None:
            for row in [i for i, status in enumerate(content["status"]) if status == "scored"][:rows]:
                response = content[prefix + "response"][row]
                content[prefix + name][row] = [value if on else None for on in response]

        return change

    for value, rows in ((0.0, 1), (None, 1), (0.0, 99), (None, 99)):
        found = wrong_values(layout, set_all(value, rows))
        # Losses that are set to 0 are not those that the margin was made from.
        assert [what for what in found if "`margin`" not in what] == []
    half = wrong_values(layout, put(name, 0, 1.0)(prefix))
    assert any(f"`{prefix}{name}` is not null exactly" in what for what in half)


@pytest.mark.parametrize("other", BY_ESTIMATOR)
@pytest.mark.parametrize("estimator", BY_ESTIMATOR)
def test_the_estimator_says_which_signals_there_must_be(estimator: str, other: str) -> None:
    rows, (found, told) = value_rows(estimator=estimator), (components(estimator), components(other))
    table = shards.values_table(rows, SFT)
    wrong = list(rules.values(table, SFT, told, as_shard(table, ("",), table), Total()))
    missing, extra = set(told.always) - set(found.always), set(found.always) - set(told.signals)
    assert sorted(wrong) == sorted(
        [f"`{name}` is not null exactly off the response" for name in missing]
        + [f"`{name}` is not null everywhere, and the run's estimator does not compute it" for name in extra]
    )
    assert bool(wrong) == (found != told)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_row("omega", 0, None), "`omega` is not finite for scored rows and null"),
        (set_row("margin", 0, float("nan")), "`margin` is not finite for scored rows and null"),
        (set_row("omega", 3, 0.05), "`omega` is not finite for scored rows and null"),
        (set_row("margin", 5, 0.0), "`margin` is not finite for scored rows and null"),
        (set_row("omega", 0, 0.0), "`omega` is not beta sigmoid(-margin)"),
        (set_row("omega", 0, -0.01), "`omega` is not beta sigmoid(-margin)"),
        (set_row("omega", 0, 0.2), "`omega` is not beta sigmoid(-margin)"),
        (set_row("margin", 0, 1.5), "`margin` is not what the losses"),
    ],
)
def test_pairs(change: Change, message: str) -> None:
    found = wrong_values(PREFERENCE, change)
    assert any(what.startswith(message) for what in found), found


def with_margin(row: ValueRow, shift: float) -> ValueRow:
    """The pair with the reference's loss of the first rejected token moved, and the margin that follows."""
    chosen, rejected = row.branches
    reference = rejected.signals["reference_nll"].copy()
    reference[np.flatnonzero(rejected.response)[0]] += shift
    rejected = replace(rejected, signals={**rejected.signals, "reference_nll": reference})
    return paired(replace(row, branches=(chosen, rejected)))


@pytest.mark.parametrize("shift", [-1e4, -1500.0, -1000.0, -300.0, 300.0, 1e4])
def test_extreme_margins_are_sound(shift: float) -> None:
    row = with_margin(value_rows(1, kind="preference")[0], shift)
    table = shards.values_table([row], PREFERENCE)
    shard = as_shard(table, PREFERENCE.branches, table)
    assert (row.omega == np.float32(BETA), row.omega == 0.0) == (shift > 0, shift < -1e3)
    assert list(rules.values(table, PREFERENCE, PARTED, shard, Total(), beta=BETA)) == []


@pytest.mark.parametrize("beta", [None, "0.1"])
def test_pairs_without_a_beta(beta: str | None) -> None:
    assert wrong_values(SFT, nothing, beta=beta) == []
    assert wrong_values(PREFERENCE, nothing, beta=beta) == [
        "`omega` and `margin` cannot be checked: the settings have no number `beta`"
    ]
    assert "`omega` is not beta sigmoid" in wrong_values(PREFERENCE, nothing, beta=0.2)[0]


def swapped(content: Content) -> None:
    for name in [name for name in content if name.startswith("chosen_")]:
        other = name.replace("chosen_", "rejected_")
        content[name], content[other] = content[other], content[name]


def test_swapped_branches() -> None:
    assert wrong_values(PREFERENCE, swapped) == ["`margin` is not what the losses of `chosen_` and `rejected_` make"]
    assert "its rows are not those" in wrong_train(PREFERENCE, swapped)[0]
    other = changed(values_table(PREFERENCE), swapped)
    found = list(rules.other_rows(other, values_table(PREFERENCE), PREFERENCE))
    assert "its `rejected_input_ids` is not that of the same shard of the first generation" in found


@pytest.mark.parametrize(
    ("change", "column"),
    [
        (put("input_ids", 0, 49), "{}input_ids"),
        (put("response", -1, False), "{}response"),
        (lambda _: set_row("line", 4, 99), "line"),
        (lambda _: set_row("id", 4, None), "id"),
    ],
)
@each_branch
def test_generations_of_other_rows(layout: Layout, prefix: str, change: Callable[[str], Change], column: str) -> None:
    other = changed(values_table(layout, 1), change(prefix))
    assert list(rules.other_rows(other, values_table(layout), layout)) == [
        f"its `{column.format(prefix)}` is not that of the same shard of the first generation"
    ]


def test_rows_scored_in_every_generation() -> None:
    first = values_table(SFT)
    second = changed(first, set_row("status", 4, "failed"))
    for tables in ([first, second], [second, first]):
        found = rules.scored_in_all(tables)
        assert found is not None and found["row_id"].to_pylist() == [0, 1, 2, 6, 8, 9, 10, 11]
    assert rules.scored_in_all([first, None]) is None
    assert rules.scored_in_all([first, first.slice(1)]) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("input_ids", 0, 49), "its rows are not those that are scored in values/: `{}input_ids` differs"),
        (put("attention_mask", 0, 0), "`{}attention_mask` is not 1"),
        (put_trained("labels", -100), "`{}labels` are not"),
        (put("labels", 0, 7), "`{}labels` are not"),
        (put_trained("labels", 999), "`{}labels` are not"),
        (put_trained("loss_mask", 0), "`{}loss_mask` is not"),
        (put_trained("loss_weight", 0.0), "`{}labels` are not"),
        (put_trained("loss_weight", -1.0), "`{}loss_weight` is not finite and >= 0"),
        (put_trained("loss_weight", float("nan")), "`{}loss_weight` is not finite and >= 0"),
        (put("loss_weight", 0, 1.0), "`{}loss_weight` is above 0 off the response"),
        (put("value", 0, 1.0), "`{}value` is not null"),
        (put("value", -1, None), "`{}value` is not null"),
        *(
            (drop(name), f"`{{}}{name}` is not as long as `{{}}input_ids`")
            for name in ("attention_mask", "labels", "loss_mask", "loss_weight", "value")
        ),
    ],
)
@each_branch
def test_train_lists_of_a_branch(layout: Layout, prefix: str, change: Callable[[str], Change], message: str) -> None:
    found = wrong_train(layout, change(prefix))
    assert any(what.startswith(message.format(prefix, prefix)) for what in found), found


def test_train_rows_are_the_scored_ones() -> None:
    assert wrong_train(SFT, set_row("row_id", 1, 7)) == [
        "its rows are not those that are scored in values/: `row_id` differs"
    ]
    good = train_table(SFT)
    shard = as_shard(good, ("",), scored(SFT))
    found = list(rules.train(good, scored(SFT), replace(shard, tokens=1), SFT, [Total()]))
    assert [what.split(": ")[-1] for what in found] == ["not as the manifest has it"]


def test_sums_are_of_each_branch() -> None:
    mask = Mask(
        mask=0,
        generations=(0,),
        fingerprint="",
        settings={},
        shards=(),
        kept_tokens=5,
        response_tokens=9,
        rows_given_back=0,
    )
    good = [Total(kept=2, response=4, weight=2.0), Total(kept=3, response=5, weight=3.0)]
    assert list(rules.sums(mask, PREFERENCE, good)) == []
    assert list(rules.sums(mask, PREFERENCE, [Total(response=4), Total(kept=5, response=5, weight=5.0)])) == []
    assert list(rules.sums(replace(mask, kept_tokens=4), PREFERENCE, good)) == ["5 of 9 tokens kept, not 4 of 9"]
    # The mean over both together is 1, that of neither is.
    found = rules.sums(mask, PREFERENCE, [replace(good[0], weight=3.0), replace(good[1], weight=2.0)])
    assert [what.split(" over")[0] for what in found] == [
        "mean of `chosen_loss_weight`",
        "mean of `rejected_loss_weight`",
    ]
