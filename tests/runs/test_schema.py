"""Units of what masks are made from. Columns and their types are tested with the shards that have them."""

from __future__ import annotations

import pytest

from alphatoken_curate.runs.schema import EXPRESSIONS, units_of


@pytest.mark.parametrize("by", ["surprise", "-surprise", "reference_ratio", "-reference_ratio"])
def test_the_names_of_ratios_have_that_unit(by: str) -> None:
    assert by.removeprefix("-") in EXPRESSIONS
    assert units_of(by, "none") == units_of(by, "rms") == "ratio"


def test_units_of_columns_are_those_they_are_stored_with() -> None:
    assert units_of("nll", "none") == "nats"
    assert units_of("value", "none") == units_of("adapt_direct", "rms") == "nats per unit step"
    assert units_of("margin", "none") == "beta x nats"
    assert units_of("token_id", "none") == "token"


def test_other_numbers_have_units_of_their_own() -> None:
    assert units_of("value", "rms") == "multiples of the RMS of an objective"
    assert units_of("random", "none") == "0 to 1"
    assert units_of("nll - 1", "none") == "those of the --by expression"
