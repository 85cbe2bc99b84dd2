from __future__ import annotations

from alphatoken_curate.runs.fingerprint import differing, fingerprint, told_apart


def test_what_differs_is_told_with_both_values() -> None:
    data = [["a.jsonl", "sha256:" + "1" * 64], ["b.jsonl", "sha256:" + "2" * 64]]
    stored = {"layers": 3, "data": data, "drift": None, "fisher": "sampled", "same": 1, "precondition_stability": False}
    given = {"layers": "all", "data": [*data, *data], "drift": "weights", "fisher": "sha256:" + "3" * 64, "same": 1}
    names = differing(stored, given)
    assert told_apart(names, stored, given) == (
        "data (a.jsonl 111111111111; b.jsonl 222222222222 in the run,"
        " a.jsonl 111111111111; b.jsonl 222222222222 and 2 more now), drift (not set in the run, weights now),"
        " fisher (sampled in the run, 333333333333 now), layers (3 in the run, all now),"
        " precondition_stability (false in the run, not set now)"
    )


def test_lists_are_told_from_where_they_differ_and_what_is_long_is_cut() -> None:
    stored = {"data": [["a", "sha256:" + "1" * 64], ["b", "sha256:" + "2" * 64], ["c", "sha256:" + "3" * 64]]}
    given = {"data": [*stored["data"][:2], ["c", "sha256:" + "4" * 64]]}
    assert told_apart(["data"], stored, given) == "data (c 333333333333 in the run, c 444444444444 now)"
    long = {"target": "folder/" * 40 + "a.jsonl", "scales": {"x" * 50: 1.0, "y" * 50: 2.0}}
    told = told_apart(["target", "scales"], long, {"target": "folder/" * 40 + "b.jsonl", "scales": None})
    assert told.startswith("target (folder/folder/folder/folder/f…") and "scales ({" in told
    assert "a.jsonl in the run" in told and "b.jsonl now" in told and len(told) < 4 * 60 + 60


def test_equal_fields_have_one_fingerprint_in_any_order() -> None:
    assert fingerprint({"a": 1, "b": [1.5]}) == fingerprint({"b": [1.5], "a": 1}) != fingerprint({"a": 1, "b": [1]})
