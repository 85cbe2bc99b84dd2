from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphatoken_curate import composite, masks
from alphatoken_curate.errors import CurateError, StoredDataError, UsageError
from alphatoken_curate.schema import COMPONENTS, NOT_COMPUTED, PREFERENCE, SIGNALS, components

PARTED = components("published")

Token = tuple[float, int, int]
"""score, row, position."""

SCORE = st.one_of(st.sampled_from([-1.0, -0.5, 0.0, -0.0, 0.5, 1.0]), st.floats(-1e3, 1e3, width=32))
KEEP = st.one_of(st.sampled_from(["positive", 1.0, 0.1, 0.3, 0.5, 0.7]), st.decimals("0.01", "1", places=2).map(float))
SCOPE = st.sampled_from(["global", "row", "batch:1", "batch:2", "batch:3"])
WEIGHTS = st.sampled_from(["binary", "rank", "sigmoid", "relu"])


@st.composite
def tokens(draw: st.DrawFn) -> list[Token]:
    found = []
    for row in range(draw(st.integers(0, 6))):
        positions = draw(st.sets(st.integers(1, 12), max_size=6))
        found += [(draw(SCORE), row, position) for position in sorted(positions)]
    return found


def columns(found: list[Token]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    score, row, position = zip(*found, strict=True) if found else ((), (), ())
    return np.array(score, np.float32), np.array(row, np.int64), np.array(position, np.int32)


# The oracle: plain Python over sorted tuples, sharing nothing with the module.


def scope_of(scope: str, row: int) -> int:
    if ":" in scope:
        return row // int(scope.removeprefix("batch:"))
    return row if scope == "row" else 0


def plain_places(found: list[Token], scope: str) -> dict[Token, tuple[int, int]]:
    """Token -> (place in its scope from 0, size of its scope)."""
    places = {}
    for one in {scope_of(scope, token[1]) for token in found}:
        members = sorted((t for t in found if scope_of(scope, t[1]) == one), key=lambda t: (-t[0], t[1], t[2]))
        places |= {token: (place, len(members)) for place, token in enumerate(members)}
    return places


def plain_kept(found: list[Token], keep: float | str, scope: str) -> set[Token]:
    if keep == "positive":
        return {token for token in found if token[0] > 0}
    share = Decimal(repr(keep))
    places = plain_places(found, scope)
    return {t for t, (place, n) in places.items() if place < int((share * n).to_integral_value(ROUND_CEILING))}


def plain_best(found: list[Token], alive: set[Token]) -> set[Token]:
    lost = {token[1] for token in found} - {token[1] for token in alive}
    return {min((t for t in found if t[1] == row), key=lambda t: (-t[0], t[2])) for row in lost}


def plain_weights(found: list[Token], keep: float | str, scope: str, kind: str, allow: bool) -> dict[Token, float]:
    rms = math.sqrt(math.fsum(t[0] ** 2 for t in found) / len(found)) or 1.0 if found else 1.0
    places = plain_places(found, scope)
    formula = {
        "binary": lambda t: 1.0,
        "rank": lambda t: 1 - places[t][0] / places[t][1],
        "sigmoid": lambda t: 1 / (1 + math.exp(-t[0] / rms)),
        "relu": lambda t: max(t[0], 0.0),
    }[kind]
    weight = {token: formula(token) for token in plain_kept(found, keep, scope)}
    back = set() if allow else plain_best(found, {token for token, w in weight.items() if w > 0})
    weight |= {token: formula(token) for token in back}
    least = min((w for w in weight.values() if w > 0), default=1.0)
    weight |= {token: weight[token] or least for token in back}
    trained = [w for w in weight.values() if w > 0]
    return {token: w * len(trained) / math.fsum(trained) for token, w in weight.items() if w > 0}


@given(tokens(), KEEP, SCOPE, st.booleans())
@settings(max_examples=300, deadline=None)
def test_kept_is_what_sorting_says(found: list[Token], keep: float | str, scope: str, allow: bool) -> None:
    found = [(float(np.float32(score)), row, position) for score, row, position in found]
    got = masks.kept(*columns(found), keep=keep, scope=scope, allow_empty_rows=allow)
    want = plain_kept(found, keep, scope)
    want |= set() if allow else plain_best(found, want)
    assert {token for token, kept in zip(found, got, strict=True) if kept} == want


@given(tokens(), KEEP, SCOPE, WEIGHTS, st.booleans())
@settings(max_examples=300, deadline=None)
def test_weights_are_what_the_formulas_say(
    found: list[Token], keep: float | str, scope: str, kind: str, allow: bool
) -> None:
    found = [(float(np.float32(score)), row, position) for score, row, position in found]
    got = masks.weighed(*columns(found), keep=keep, scope=scope, weights=kind, allow_empty_rows=allow).weight
    want = plain_weights(found, keep, scope, kind, allow)
    assert got.dtype == np.float32
    assert {t for t, w in zip(found, got, strict=True) if w > 0} == set(want)
    np.testing.assert_allclose(got, [want.get(token, 0.0) for token in found], rtol=1e-5, atol=2e-38)
    if want:
        assert got[got > 0].mean(dtype=np.float64) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 20, 30, 70, 100, 1000])
@pytest.mark.parametrize("keep", ["0.1", "0.2", "0.3", "0.6", "0.7", "0.07", "0.57", "0.001", "1"])
def test_exactly_the_ceiling_is_kept(n: int, keep: str) -> None:
    numerator, denominator = (int(x) for x in (Decimal(keep) * 1000, Decimal(1000)))
    want = -(-n * numerator // denominator)
    score = np.zeros(n, np.float32)  # all tie: the first ones in order are kept
    got = masks.kept(score, np.zeros(n, np.int64), np.arange(1, n + 1), keep=float(keep), scope="global")
    assert got.tolist() == [True] * want + [False] * (n - want)


def test_batches_count_scored_rows() -> None:
    row = np.repeat(np.arange(4), 2)
    score = np.array([9, 8, 7, 6, 1, 2, 3, 4], np.float32)
    got = masks.kept(score, row, np.tile([1, 2], 4), keep=0.25, scope="batch:2", allow_empty_rows=True)
    assert np.flatnonzero(got).tolist() == [0, 7]


def test_rows_given_back_are_counted_once_and_get_the_smallest_weight() -> None:
    score = np.array([4, 2, -1, -3, -2], np.float32)
    row, position = np.array([0, 0, 1, 2, 2]), np.array([1, 2, 1, 1, 2])
    got = masks.weighed(score, row, position, keep="positive", scope="global", weights="relu")
    raw = np.array([4, 2, 2, 0, 2]) / 2.5
    np.testing.assert_allclose(got.weight, raw, rtol=1e-6)
    assert got.given_back == 2


def test_a_row_whose_kept_tokens_all_weigh_nothing_gets_one_back() -> None:
    score, row, position = np.array([1, -1], np.float32), np.array([0, 1]), np.array([1, 1])
    got = masks.weighed(score, row, position, keep=1.0, scope="global", weights="relu")
    assert got.weight.tolist() == [1, 1] and got.given_back == 1
    got = masks.weighed(score, row, position, keep=1.0, scope="global", weights="relu", allow_empty_rows=True)
    assert got.weight.tolist() == [1, 0] and got.given_back == 0


def test_with_no_positive_weight_what_is_given_back_weighs_one() -> None:
    score, row, position = np.array([-5, -1, -2], np.float32), np.array([0, 1, 1]), np.array([1, 1, 2])
    got = masks.weighed(score, row, position, keep="positive", scope="row", weights="relu")
    assert got.weight.tolist() == [1, 1, 0]


def test_weights_neither_vanish_nor_overflow() -> None:
    score = np.array([1e-45, 3e38, 3e38, 1], np.float32)
    row, position = np.zeros(4, np.int64), np.arange(1, 5)
    got = masks.weighed(score, row, position, keep=1.0, scope="row", weights="relu").weight
    assert (got > 0).all() and np.isfinite(got).all()
    outlier = np.array([-1e30, *[0.0] * 999_999], np.float32)
    where = np.zeros(10**6, np.int64), np.arange(10**6)
    got = masks.weighed(outlier, *where, keep=1.0, scope="global", weights="sigmoid").weight
    assert (got > 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_an_error(bad: float) -> None:
    with pytest.raises(CurateError, match="scored row 1, token 5"):
        masks.kept(np.array([1, bad], np.float32), np.array([0, 1]), np.array([1, 5]), keep=0.5, scope="global")


def test_tokens_out_of_order_are_an_error() -> None:
    score = np.zeros(2, np.float32)
    for row, position in (([1, 0], [1, 2]), ([0, 0], [2, 1]), ([0, 0], [1, 1])):
        with pytest.raises(CurateError, match="ascending"):
            masks.kept(score, np.array(row), np.array(position), keep=0.5, scope="global")


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, "half", float("nan"), float("inf"), "1/0"])
def test_a_share_that_cannot_be_used_is_refused(keep: float | str) -> None:
    with pytest.raises(UsageError, match="keep: found"):
        masks.parse_keep(keep)


@pytest.mark.parametrize(
    "scope", ["", "rows", "batch", "batch:", "batch:0", "batch:-1", "batch:1.5", "batch:9" + "9" * 30]
)
def test_a_scope_that_cannot_be_used_is_refused(scope: str) -> None:
    with pytest.raises(UsageError, match="scope: found"):
        masks.parse_scope(scope)


def test_unknown_weights_are_refused() -> None:
    empty = np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.int64)
    with pytest.raises(UsageError, match="weights: found"):
        masks.weighed(*empty, keep=0.5, scope="row", weights="softmax")


# ------------------------------------------------------------------------------------------------ what to select on


def stored(n: int = 50) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    names = ("nll", "entropy", "reference_nll", *COMPONENTS)
    found: dict[str, np.ndarray] = {name: rng.normal(size=n).astype(np.float32) for name in names}
    return found | {
        "row_id": np.repeat(np.arange(n // 10), 10),
        "position": np.tile(np.arange(1, 11, dtype=np.int32), n // 10),
        "token_id": rng.integers(0, 99, n).astype(np.int32),
    }


def selected(by: str, found: dict[str, np.ndarray] | None = None, **more: object) -> np.ndarray:
    arguments = {"stability_weight": 1.5, "components": PARTED, **more}
    return masks.selection(by, stored() if found is None else found, **arguments)  # type: ignore[arg-type]


def test_value_is_recombined() -> None:
    c = {name: column.astype(np.float64) for name, column in stored().items()}
    adaptation, stability = c["adapt_direct"] + c["adapt_causal"], c["stab_direct"] + c["stab_causal"]
    np.testing.assert_allclose(selected("value", stability_weight=0.7), adaptation + 0.7 * stability, rtol=1e-5)
    scaled = adaptation / np.sqrt(np.mean(adaptation**2)) + 2 * stability / np.sqrt(np.mean(stability**2))
    got = selected("value", stability_weight=2, scales=composite.objective_scales([stored()], PARTED))
    np.testing.assert_allclose(got, scaled, rtol=1e-4, atol=1e-6)


def test_columns_and_expressions() -> None:
    c = stored()
    np.testing.assert_array_equal(selected("entropy"), c["entropy"])
    np.testing.assert_array_equal(selected("position"), c["position"].astype(np.float32))
    np.testing.assert_allclose(selected("nll - reference_nll"), c["nll"] - c["reference_nll"], rtol=1e-6)
    np.testing.assert_allclose(selected("-value * 2"), -2 * selected("value"), rtol=1e-6)
    got = selected("nll - avg(nll) over (partition by row_id)").reshape(-1, 10)
    np.testing.assert_allclose(got.mean(axis=1), 0, atol=1e-6)
    assert all(selected(by).dtype == np.float32 for by in ("nll", "position", "token_id + 1", "value"))


def test_surprise_is_loss_over_what_was_expected() -> None:
    c = stored() | {"entropy": np.linspace(0, 9, 50, dtype=np.float32)}
    surprise = c["nll"].astype(np.float64) / (c["entropy"] + 0.1)
    np.testing.assert_allclose(selected("surprise", c), surprise, rtol=1e-6)
    np.testing.assert_allclose(selected("1 - 2 * surprise", c), 1 - 2 * surprise, rtol=1e-6, atol=1e-6)
    assert masks.columns_needed("-surprise", PARTED) == ("nll", "entropy")
    assert not masks.depends_on_value("-surprise")
    assert [masks.units_of(by, "none") for by in ("surprise", "-surprise")] == ["ratio", "ratio"]


def test_only_what_is_needed_is_asked_for() -> None:
    assert masks.columns_needed("random", PARTED) == ("row_id", "position")
    assert masks.columns_needed("nll - reference_nll", PARTED) == ("nll", "reference_nll")
    assert masks.columns_needed("value", PARTED) == COMPONENTS
    assert masks.columns_needed("value + nll", PARTED) == ("nll", *COMPONENTS)
    assert [masks.depends_on_value(by) for by in ("value", "nll + value", "nll", "random")] == [
        True,
        True,
        False,
        False,
    ]


def test_random_depends_on_seed_row_and_position_alone() -> None:
    found = stored(1000)
    drawn = selected("random", found, seed=5)
    order = np.random.default_rng(0).permutation(1000)
    shuffled = {name: column[order] for name, column in found.items()}
    np.testing.assert_array_equal(selected("random", shuffled, seed=5), drawn[order])
    assert np.mean(selected("random", found, seed=6) == drawn) < 0.01
    assert drawn.min() >= 0 and drawn.max() <= 1 and abs(drawn.mean() - 0.5) < 0.05


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("nll -", "not a polars SQL expression"),
        ("", "not a polars SQL expression"),
        ("nll; drop table x", "not a polars SQL expression"),
        ("read_parquet('x')", "not a polars SQL expression"),
        ("(" * 5000 + "nll" + ")" * 5000, "at most"),
        ("boredom + nll", "'boredom'; the columns are row_id, position, token_id, nll"),
        ("1", "names no column"),
        ("COLUMNS('n.*')", "names no column"),
        ("sum(nll)", "one number per token"),
        ("nll > 0", "one number per token"),
        ("'a' || nll", "one number per"),
        ("nll[1]", "cannot be computed"),
        ("value.x", "cannot be computed"),
        ("1 / (nll - nll)", "no finite float32 at 50 of 50"),
        ("ln(nll - nll)", "no finite float32"),
        ("case when nll > 0 then nll end", "no finite float32"),
    ],
)
def test_what_cannot_be_selected_by_is_refused(by: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        selected(by)
    assert message in str(caught.value)


def test_a_reference_that_is_the_same_model_is_explained() -> None:
    found = stored() | {"reference_nll": np.full(50, np.nan, np.float32)}
    for by in ("reference_nll", "nll - reference_nll"):
        with pytest.raises(UsageError, match="score with a --reference"):
            selected(by, found)


def test_a_missing_component_is_damage() -> None:
    found = stored()
    found["stab_causal"][3] = np.nan
    with pytest.raises(StoredDataError, match="column value has no value at 1 of 50"):
        selected("value", found)


def test_numbers_of_the_pair_are_columns_of_preference_runs_alone() -> None:
    found = stored() | {"margin": np.repeat(np.arange(5, dtype=np.float32), 10)}
    np.testing.assert_array_equal(selected("margin", found, layout=PREFERENCE), found["margin"])
    np.testing.assert_allclose(
        selected("nll * (1 - margin)", found, layout=PREFERENCE), found["nll"] * (1 - found["margin"]), rtol=1e-6
    )
    assert masks.columns_needed("value - margin", PARTED, PREFERENCE) == (*COMPONENTS, "margin")
    assert masks.known_columns(PREFERENCE)[-2:] == ("omega", "margin")
    for by in ("margin", "omega + nll"):
        with pytest.raises(UsageError, match="names no column"):
            selected(by, found)
        with pytest.raises(UsageError, match="names no column"):
            masks.columns_needed(by, PARTED)
        assert not masks.depends_on_value(by)


def test_whatever_can_be_named_is_said_to_depend_on_the_value_or_not() -> None:
    assert [name for name in masks.known_columns(PREFERENCE) if masks.depends_on_value(name)] == ["value"]


def test_the_branches_of_a_pair_are_drawn_apart() -> None:
    found = stored(1000)
    chosen, rejected = (selected("random", found, seed=5, branch=branch) for branch in (0, 1))
    np.testing.assert_array_equal(chosen, selected("random", found, seed=5))
    assert abs(np.corrcoef(chosen, rejected)[0, 1]) < 0.1


@pytest.mark.parametrize("name", ["drift_direct", "drift_causal"])
def test_a_drift_beside_retention_that_was_not_computed_is_explained(name: str) -> None:
    with pytest.raises(UsageError, match="--retention FILE and --drift"):
        selected(name, stored() | {name: np.full(50, np.nan, np.float32)})


@pytest.mark.parametrize("estimator", ["influence", "exact+influence"])
def test_the_value_is_made_of_what_the_estimator_gives(estimator: str) -> None:
    found, rng = components(estimator), np.random.default_rng(2)
    columns = {name: rng.normal(size=50).astype(np.float32) for name in (*found.of_value, *found.upstream)}
    parts = {name: column.astype(np.float64) for name, column in columns.items()}
    if estimator == "influence":
        assert masks.columns_needed("value", found) == ("adapt_influence", "stab_influence")
        want = parts["adapt_influence"] + 0.7 * parts["stab_influence"]
    else:
        assert masks.columns_needed("value + stab_upstream", found) == (
            *("adapt_direct", "adapt_causal", "stab_direct", "stab_causal", "stab_upstream"),
        )
        want = parts["adapt_direct"] + parts["adapt_causal"] + 0.7 * (parts["stab_direct"] + parts["stab_causal"])
    got = selected("value", columns, components=found, stability_weight=0.7)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ["published", "exact", "influence", "exact+influence"])
def test_what_another_estimator_computes_is_explained_before_anything_is_read(estimator: str) -> None:
    found = components(estimator)
    for name in set(SIGNALS) - set(found.signals):
        for by in (name, f"nll + {name}"):
            with pytest.raises(UsageError, match=rf"by: {name} was not computed: .*--estimator") as caught:
                masks.columns_needed(by, found)
            assert NOT_COMPUTED[name] in str(caught.value)
            with pytest.raises(UsageError, match=f"{name} was not computed"):
                selected(by, {}, components=found)
    for name in found.signals:
        assert masks.columns_needed(name, found)


def test_a_component_that_is_missing_everywhere_is_damage() -> None:
    nothing = np.full(50, np.nan, np.float32)
    for estimator, name in (("published", "adapt_direct"), ("influence", "stab_influence")):
        with pytest.raises(StoredDataError, match=f"column {name} has no value at 50 of 50"):
            selected(name, {name: nothing}, components=components(estimator))
