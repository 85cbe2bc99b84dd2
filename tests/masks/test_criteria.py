from __future__ import annotations

import numpy as np
import pytest

from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.masks import criteria
from alphatoken_curate.runs.schema import COMPONENTS, NOT_COMPUTED, PREFERENCE, SIGNALS, components
from alphatoken_curate.signals import composite

PARTED = components("published")


def stored(n: int = 50) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    names = ("nll", "entropy", "reference_nll", *COMPONENTS)
    found: dict[str, np.ndarray] = {name: rng.normal(size=n).astype(np.float32) for name in names}
    return found | {
        "row_id": np.repeat(np.arange(n // 10), 10),
        "turn": np.zeros(n, np.int32),
        "position": np.tile(np.arange(1, 11, dtype=np.int32), n // 10),
        "token_id": rng.integers(0, 99, n).astype(np.int32),
    }


def selected(by: str, found: dict[str, np.ndarray] | None = None, **more: object) -> np.ndarray:
    arguments = {"stability_weight": 1.5, "components": PARTED, **more}
    return criteria.selection(by, stored() if found is None else found, **arguments)  # type: ignore[arg-type]


def test_value_is_recombined() -> None:
    c = {name: column.astype(np.float64) for name, column in stored().items()}
    adaptation, stability = c["adapt_direct"] + c["adapt_causal"], c["stab_direct"] + c["stab_causal"]
    np.testing.assert_allclose(selected("value", stability_weight=0.7), adaptation + 0.7 * stability, rtol=1e-5)
    scaled = adaptation / np.sqrt(np.mean(adaptation**2)) + 2 * stability / np.sqrt(np.mean(stability**2))
    got = selected("value", stability_weight=2, scales=composite.sizes([stored()], PARTED).scales)
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
    assert criteria.columns_needed("-surprise", PARTED) == ("nll", "entropy")
    assert not criteria.depends_on_value("-surprise")


def test_reference_ratio_is_a_ratio_of_probabilities_and_at_most_one() -> None:
    c = stored() | {"nll": np.linspace(0, 120, 50, dtype=np.float32), "reference_nll": np.full(50, 9, np.float32)}
    gone = np.float64(c["nll"]) - c["reference_nll"]
    np.testing.assert_allclose(selected("reference_ratio", c), np.exp(np.minimum(gone, 0)), rtol=1e-5)
    assert (gone < 0).any() and (gone > 88.8).any()
    assert criteria.columns_needed("reference_ratio", PARTED) == ("nll", "reference_nll")
    with pytest.raises(UsageError, match="reference_nll was not computed"):
        selected("reference_ratio", c | {"reference_nll": np.full(50, np.nan, np.float32)})


def test_only_what_is_needed_is_asked_for() -> None:
    assert criteria.columns_needed("random", PARTED) == ("row_id", "turn", "position")
    assert criteria.columns_needed("nll - reference_nll", PARTED) == ("nll", "reference_nll")
    assert criteria.columns_needed("value", PARTED) == COMPONENTS
    assert criteria.columns_needed("value + nll", PARTED) == ("nll", *COMPONENTS)
    assert [criteria.depends_on_value(by) for by in ("value", "nll + value", "nll", "random")] == [
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
        ("(" * 5000 + "nll" + ")" * 5000, "at most"),
        ("boredom + nll", "'boredom'. The columns are row_id, turn, position, token_id, nll"),
        ("1", "names no column"),
        ("sum(nll)", "one number for all tokens together; give one number per token"),
        ("nll > 0", "one number per token"),
        ("1 / (nll - nll)", "no finite float32 at 50 of 50"),
        ("ln(nll - nll)", "no finite float32"),
        ("case when nll > 0 then nll end", "no finite float32"),
    ],
)
def test_what_cannot_be_selected_by_is_refused(by: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        selected(by)
    assert message in str(caught.value)


@pytest.mark.parametrize("factor", [50_000_000, 1_000_000_000])
def test_no_integer_wraps(factor: int) -> None:
    c = {name: column.astype(np.float64) for name, column in stored().items()}
    for name in ("row_id", "turn", "position", "token_id"):
        np.testing.assert_array_equal(selected(f"{name} * {factor}"), (c[name] * factor).astype(np.float32))
    np.testing.assert_array_equal(selected("rank() over (order by nll) - 60") < 0, np.ones(50, bool))
    np.testing.assert_array_equal(selected("nll * 0 + count(*) - 60"), np.full(50, -10, np.float32))


def test_sql_of_other_releases_is_told_from_what_is_read() -> None:
    assert all(criteria.is_readable(by) for by in ("value", "random", "margin", "7 - surprise"))
    assert not any(criteria.is_readable(by) for by in ("read_parquet('x')", "nll ->", "nope", ""))


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
    assert criteria.columns_needed("value - margin", PARTED, PREFERENCE) == (*COMPONENTS, "margin")
    assert criteria.known_columns(PREFERENCE)[-2:] == ("omega", "margin")
    for by in ("margin", "omega + nll"):
        with pytest.raises(UsageError, match="names no column"):
            selected(by, found)
        with pytest.raises(UsageError, match="names no column"):
            criteria.columns_needed(by, PARTED)
        assert not criteria.depends_on_value(by)


def test_whatever_can_be_named_is_said_to_depend_on_the_value_or_not() -> None:
    found = [name for name in criteria.known_columns(PREFERENCE) if criteria.depends_on_value(name)]
    assert found == ["value", "value_error"]


def with_errors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(8)
    return stored() | {name: rng.uniform(0.1, 2, 50).astype(np.float32) for name in ("adapt_error", "stab_error")}


def test_the_error_of_the_value_is_recombined_with_it() -> None:
    found = with_errors()
    c = {name: column.astype(np.float64) for name, column in found.items()}
    adaptation, stability = c["adapt_direct"] + c["adapt_causal"], c["stab_direct"] + c["stab_causal"]
    value, error = adaptation + 0.7 * stability, np.sqrt(c["adapt_error"] ** 2 + (0.7 * c["stab_error"]) ** 2)
    np.testing.assert_allclose(selected("value_error", found, stability_weight=0.7), error, rtol=1e-6)
    got = selected("value + 1.895 * value_error", found, stability_weight=0.7)
    np.testing.assert_allclose(got, value + 1.895 * error, rtol=1e-5, atol=1e-6)
    scales = composite.Scales(adaptation=4.0, stability=0.25)
    scaled = np.sqrt((c["adapt_error"] / 4) ** 2 + (0.7 * c["stab_error"] / 0.25) ** 2)
    np.testing.assert_allclose(selected("value_error", found, stability_weight=0.7, scales=scales), scaled, rtol=1e-6)
    np.testing.assert_array_equal(selected("adapt_error", found), found["adapt_error"])
    errors = ("adapt_error", "stab_error")
    assert criteria.columns_needed("value_error", PARTED) == errors
    assert criteria.columns_needed("value + 2 * value_error", PARTED) == (*COMPONENTS, *errors)
    assert criteria.depends_on_value("1 - value_error") and not criteria.depends_on_value("adapt_error")


def test_stability_without_an_error_adds_none() -> None:
    found = with_errors() | {"stab_error": np.full(50, np.nan, np.float32)}
    np.testing.assert_array_equal(selected("value_error", found), found["adapt_error"])
    with pytest.raises(UsageError, match=r"by: stab_error was not computed.*--retention FILE"):
        selected("value - stab_error", found)


def test_errors_that_were_not_computed_are_explained_and_those_of_some_tokens_are_damage() -> None:
    nothing = np.full(50, np.nan, np.float32)
    found = stored() | {"adapt_error": nothing, "stab_error": nothing}
    for by in ("value_error", "value + 1.895 * value_error", "adapt_error"):
        with pytest.raises(UsageError, match=r"_error was not computed.*--target-groups 8"):
            selected(by, found)
    for name in ("adapt_error", "stab_error"):
        hurt = with_errors()
        hurt[name][7] = np.nan
        with pytest.raises(StoredDataError, match=f"column {name} has no value at 1 of 50"):
            selected("value_error", hurt)


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
        assert criteria.columns_needed("value", found) == ("adapt_influence", "stab_influence")
        want = parts["adapt_influence"] + 0.7 * parts["stab_influence"]
    else:
        assert criteria.columns_needed("value + stab_upstream", found) == (
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
                criteria.columns_needed(by, found)
            assert NOT_COMPUTED[name] in str(caught.value)
            with pytest.raises(UsageError, match=f"{name} was not computed"):
                selected(by, {}, components=found)
    for name in found.signals:
        assert criteria.columns_needed(name, found)


def test_a_component_that_is_missing_everywhere_is_damage() -> None:
    nothing = np.full(50, np.nan, np.float32)
    for estimator, name in (("published", "adapt_direct"), ("influence", "stab_influence")):
        with pytest.raises(StoredDataError, match=f"column {name} has no value at 50 of 50"):
            selected(name, {name: nothing}, components=components(estimator))


@pytest.mark.parametrize(
    ("by", "near"), [("nul", "nll"), ("entrpy", "entropy"), ("suprise", "surprise"), ("rando", "random")]
)
def test_a_column_that_is_near_is_suggested(by: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"Did you mean {near}\\?"):
        selected(by)
    with pytest.raises(UsageError) as caught:
        selected("zzzz - 1")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("by", "alone"),
    [
        *(
            (by, True)
            for by in (
                "nll",
                "random",
                "-surprise",
                "7 - surprise",
                "1e-3 * exp(nll)",
                "IF(nll > 2 and value < 0, 1, 0)",
            )
        ),
        *(
            (by, True)
            for by in ("CASE WHEN nll > 1 THEN 0 ELSE 1 END", "CAST(nll > 1 AS INT)", "least(1.0, abs(value))")
        ),
        *(
            (by, False)
            for by in ("nll - avg(nll)", "rank() over (order by nll)", "sum(nll) over (partition by row_id)")
        ),
        *((by, False) for by in ("row_sum(nll)", "nll - row_mean(nll)")),
        *((by, False) for by in ("nll / count(*)", "nll - lag(nll) over (order by position)")),
    ],
)
def test_what_looks_at_one_token_alone(by: str, alone: bool) -> None:
    assert criteria.is_of_single_tokens(by) == alone
