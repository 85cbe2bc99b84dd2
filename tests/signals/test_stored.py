"""What is stored of a row, from signals that are made up: which columns, and all that is later made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl
import pytest
import torch
from click.testing import CliRunner
from small_run import BETA, small_run
from tiny import make_row, tiny_rows

from alphatoken_curate.cli import mask, show, stats
from alphatoken_curate.errors import UsageError
from alphatoken_curate.reading.scan import scan, scan_tokens
from alphatoken_curate.reading.verify import verify
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.schema import BY_ESTIMATOR, components
from alphatoken_curate.scoring.job import record
from alphatoken_curate.signals.paths import Signals
from alphatoken_curate.signals.preference import Pairs, reference_sums
from alphatoken_curate.signals.stored import RowResult, row_signals
from alphatoken_curate.tokens.plan import Batch, collate, plan_batches, sequences
from alphatoken_curate.tokens.tokenise import AnyRow, PairRow

GIVEN = {
    "published": ("direct", "causal"),
    "exact": ("direct", "causal"),
    "influence": ("influence",),
    "exact+influence": ("direct", "causal", "influence"),
}
"""What an estimator computes along each direction."""


def drawn(sequence: int, name: str, tokens: int) -> np.ndarray:
    """Made-up numbers of the response tokens of one sequence, float64."""
    return np.random.default_rng((sequence, *name.encode())).normal(size=tokens)


class MadeUp:
    """Scores batches by drawing: the same numbers for a sequence in whatever batch it is."""

    def __init__(self, estimator: str, directions: int, dtype: torch.dtype = torch.float64) -> None:
        self.paths, self.directions, self.dtype = GIVEN[estimator], directions, dtype

    def score(self, batch: Batch) -> Signals:
        def column(name: str) -> torch.Tensor:
            counts = np.bincount(batch.row, minlength=len(batch.rows))
            parts = [drawn(one, name, int(count)) for one, count in zip(batch.rows, counts, strict=True)]
            return torch.from_numpy(np.concatenate(parts)).to(self.dtype)

        along = {path: torch.stack([column(f"{path}{n}") for n in range(self.directions)]) for path in self.paths}
        return Signals(column("nll").abs(), column("entropy").abs(), **along)


def results(
    rows: list[Any], estimator: str, objectives: tuple[str, ...], *, pairs: Pairs | None = None, budget: int = 60
) -> list[RowResult]:
    found = row_signals(
        MadeUp(estimator, len(objectives)),
        rows,
        [collate(rows, indices) for indices in plan_batches(rows, budget)],
        components=components(estimator),
        objectives=objectives,
        stability_weight=1.5,
        reference_nll=[
            np.abs(drawn(i, "ref", int(r.response.sum()))).astype("f4") for i, r in enumerate(sequences(rows))
        ],
        pairs=pairs,
    )
    assert all(found)
    return [one for one in found if one]


def plain(
    sequence: int, tokens: int, estimator: str, objectives: tuple[str, ...], sign: float
) -> dict[str, np.ndarray]:
    """The stored columns of one sequence, said once more, column by column, in float64."""
    columns = {}
    for n, objective in enumerate(objectives):
        of = {path: sign * drawn(sequence, f"{path}{n}", tokens) for path in GIVEN[estimator]}
        columns |= {
            f"{objective}_{path}": x for path, x in of.items() if estimator != "exact+influence" or path != "influence"
        }
        if estimator == "exact+influence" and objective != "drift":
            columns[f"{objective}_upstream"] = of["influence"] - of["direct"]
    if "stab" not in objectives:
        columns |= {name.replace("adapt", "stab"): np.zeros(tokens) for name in list(columns) if "adapt" in name}
    ends = ("_influence",) if estimator == "influence" else ("_direct", "_causal")
    value = sum(columns[f"adapt{end}"] for end in ends) + 1.5 * sum(columns[f"stab{end}"] for end in ends)
    nll, entropy, reference = (np.abs(drawn(sequence, name, tokens)) for name in ("nll", "entropy", "ref"))
    return columns | {"value": value, "nll": nll, "entropy": entropy, "reference_nll": reference}


def assert_stored(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], response: np.ndarray) -> None:
    assert found.keys() == wanted.keys()
    for name, column in found.items():
        assert column.dtype == np.float32 and np.array_equal(np.isnan(column), ~response), name
        np.testing.assert_allclose(column[response], wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("objectives", [("adapt",), ("adapt", "stab"), ("adapt", "stab", "drift")], ids=len)
@pytest.mark.parametrize("estimator", BY_ESTIMATOR)
def test_the_columns_of_rows(estimator: str, objectives: tuple[str, ...]) -> None:
    rows = tiny_rows()
    for i, found in enumerate(results(rows, estimator, objectives)):
        response = rows[i].response
        (mine,) = found.branches
        assert_stored(mine, plain(i, int(response.sum()), estimator, objectives, 1.0), response)
        known = components(estimator)
        drift = known.drift if "drift" in objectives else ()
        assert set(mine) == {*known.always, "reference_nll", *drift}
        if objectives == ("adapt",):
            assert all(not mine[name][response].any() for name in mine if name.startswith("stab"))


def pair_rows() -> list[AnyRow]:
    rows = tiny_rows()
    return [
        PairRow(chosen=one, rejected=replace(other, row_id=one.row_id, line=one.line))
        for one, other in zip(rows, [*rows[1:], make_row(9, [5, 6, 7], [(1, 3)])], strict=True)
    ]


def of_pairs(rows: list[AnyRow]) -> Pairs:
    """Pairs whose reference is the one that `results` stores."""
    parts = [np.abs(drawn(i, "ref", int(r.response.sum()))).astype("f4") for i, r in enumerate(sequences(rows))]
    return Pairs(beta=BETA, reference=reference_sums(parts))


@pytest.mark.parametrize("estimator", BY_ESTIMATOR)
def test_the_sign_and_weight_of_a_pair_multiply_every_column_along_a_direction(estimator: str) -> None:
    rows, objectives = pair_rows(), ("adapt", "stab", "drift")
    for i, found in enumerate(results(rows, estimator, objectives, pairs=of_pairs(rows))):
        assert found.omega is not None and 0 < found.omega < BETA
        for branch, sign in enumerate((found.omega, -found.omega)):
            response = sequences(rows)[2 * i + branch].response
            wanted = plain(2 * i + branch, int(response.sum()), estimator, objectives, sign)
            assert_stored(found.branches[branch], wanted, response)


def test_upstream_is_what_influence_has_beyond_direct_to_the_last_bit_of_float32() -> None:
    class Near(MadeUp):
        """An influence that is the direct path but for a part in ten million."""

        def score(self, batch: Batch) -> Signals:
            found = super().score(batch)
            assert found.direct is not None
            return replace(found, influence=found.direct * (1 + 1e-7))

    rows = tiny_rows()
    found = row_signals(
        Near("exact+influence", 1), rows, [collate(rows, range(6))], components=components("exact+influence"),
        objectives=("adapt",), stability_weight=1.5, reference_nll=None, pairs=None,
    )  # fmt: skip
    for one in found:
        assert one is not None
        mine = one.branches[0]
        np.testing.assert_allclose(mine["adapt_upstream"], 1e-7 * mine["adapt_direct"], rtol=1e-4)


def test_a_row_whose_signals_are_not_finite_fails_alone() -> None:
    class Broken(MadeUp):
        def score(self, batch: Batch) -> Signals:
            found = super().score(batch)
            assert found.influence is not None
            found.influence[0, batch.row == batch.rows.index(2)] = torch.inf
            return found

    rows = tiny_rows()
    found = row_signals(
        Broken("influence", 1), rows, [collate(rows, range(6))], components=components("influence"),
        objectives=("adapt",), stability_weight=1.5, reference_nll=None, pairs=None,
    )  # fmt: skip
    assert [one is None for one in found] == [False, False, True, False, False, False]


# --- from values to everything that is made of them


def made_run(run: Path, estimator: str, kind: str) -> Path:
    """A run of made-up signals with its first mask."""
    rows: list[AnyRow] = list(tiny_rows()) if kind == "sft" else pair_rows()
    found = results(rows, estimator, ("adapt", "stab"), pairs=of_pairs(rows) if kind == "preference" else None)
    return small_run(run, [record(row, "scored", one) for row, one in zip(rows, found, strict=True)], per_shard=4)


def output(command: Any, *arguments: object) -> str:
    done = CliRunner().invoke(command.command, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.exception
    return done.output


@pytest.mark.one_in(4)
@pytest.mark.parametrize("kind", ["sft", "preference"])
@pytest.mark.parametrize("estimator", ["influence", "exact+influence"])
def test_a_run_from_its_values_to_its_masks_and_views(tmp_path: Path, estimator: str, kind: str) -> None:
    run, known = made_run(tmp_path / "run", estimator, kind), components(estimator)
    assert verify(run) == []
    tokens = scan_tokens(run).collect()
    parts = {name: tokens[name].to_numpy().astype(np.float64) for name in known.of_value}
    adaptation, stability = (sum(parts[name] for name in names) for names in (known.adaptation, known.stability))
    np.testing.assert_allclose(tokens["value"], adaptation + 1.5 * stability, rtol=1e-5, atol=1e-6)

    how = ("--stability-weight", 3, "--stability-scale", "rms", "--always-keep", "none")
    output(mask, run, "--keep", 0.4, *how)
    scaled = adaptation / np.sqrt(np.mean(adaptation**2)) + 3 * stability / np.sqrt(np.mean(stability**2))
    again = scan_tokens(run).collect().with_columns(pl.Series("scaled", scaled))
    for _, branch in again.group_by("branch" if kind == "preference" else pl.lit(0)):
        kept, rest = branch.filter("kept")["scaled"], branch.filter(~pl.col("kept"))
        share = -(-len(branch) * 2 // 5)
        # A row that lost everything got its best token back, beyond the share.
        assert len(kept) >= share and kept.sort(descending=True)[share - 1] > rest["scaled"].max()
    train = scan(run, "train").collect()
    assert (
        train.height == 6 and sum(train[f"{p}loss_mask"].list.sum().sum() for p in prefixes(run)) == again["kept"].sum()
    )

    found = orjson.loads(output(stats, run, "--json"))
    assert found["estimator"] == estimator and set(found["rms"]) == {
        *(*known.of_value, *known.upstream, "adaptation", "stability", "value"),
    }
    assert all(found["decisions_changed"].values())
    table = output(show, run, "--row", 0, "--tokens")
    assert all(name.split("_")[1] in table.split() for name in (*known.of_value, *known.upstream))
    for name in (*known.of_value, *known.upstream):
        assert f":{name}" in output(show, run, "--row", 0, "--by", name)
    assert verify(run) == []


def prefixes(run: Path) -> tuple[str, ...]:
    return manifest.layout(manifest.read(run)).branches


@pytest.mark.parametrize(
    ("estimator", "absent"), [("influence", "adapt_upstream"), ("exact+influence", "adapt_influence")]
)
def test_what_the_run_has_not_is_explained_by_every_command(tmp_path: Path, estimator: str, absent: str) -> None:
    run = made_run(tmp_path / "run", estimator, "sft")
    for command, flags in ((mask, ("--by", absent)), (show, ("--row", 0, "--by", absent))):
        error = CliRunner().invoke(command.command, [str(run), *map(str, flags)]).exception
        assert isinstance(error, UsageError) and f"{absent} was not computed: " in str(error)
        assert "--estimator" in str(error)
