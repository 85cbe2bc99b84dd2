from __future__ import annotations

from alphatoken_curate.runs.fingerprint import differing, fingerprint, told_apart


def test_what_differs_is_told_with_both_values() -> None:
    data = [["a.jsonl", "sha256:" + "1" * 64], ["b.jsonl", "sha256:" + "2" * 64]]
    stored = {"layers": 3, "data": data, "drift": None, "fisher": "sampled", "same": 1, "precondition_stability": False}
    given = {"layers": "all", "data": [*data, *data], "drift": "weights", "fisher": "sha256:" + "3" * 64, "same": 1}
    names = differing(stored, given)
    assert told_apart(names, stored, given) == (
        "data (a.jsonl 111111111111; b.jsonl 222222222222 there,"
        " a.jsonl 111111111111; b.jsonl 222222222222 and 2 more here), drift (not set there, weights here),"
        " fisher (sampled there, 333333333333 here), layers (3 there, all here),"
        " precondition_stability (false there, not set here)"
    )


def test_equal_fields_have_one_fingerprint_in_any_order() -> None:
    assert fingerprint({"a": 1, "b": [1.5]}) == fingerprint({"b": [1.5], "a": 1}) != fingerprint({"a": 1, "b": [1]})
