"""Rows found by their text, against a plain search of the same text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import VOCABULARY, small_run, value_rows, write_generation, write_pieces

from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.reading.search import Hit, search_rows
from alphatoken_curate.runs import manifest
from alphatoken_curate.tokens.pieces import Piece

WORDS = ["a", " B", "c\n", "é"[:1], " ü", "🙂", "ß", "<|x|>", "\x1b", " d.e"]


def contents() -> list[bytes]:
    """Some tokens of whole words, and some of single bytes of characters."""
    made = [word.encode() for word in WORDS] + [bytes([byte]) for byte in "€🙂é".encode()]
    return (made * VOCABULARY)[:VOCABULARY]


@pytest.fixture(scope="module", params=["sft", "preference"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = small_run(tmp_path_factory.mktemp("runs") / "run", value_rows(30, kind=request.param), per_shard=4)
    write_pieces(run, [Piece(content=content, special=False) for content in contents()])
    return run


def texts_of(run: Path) -> dict[int, list[str]]:
    """The text of each branch of each row."""
    kind, known = manifest.layout(manifest.read(run)).kind, contents()
    return {
        row.row_id: [b"".join(known[i] for i in one.input_ids).decode("utf-8", "replace") for one in row.branches]
        for row in value_rows(30, kind=kind)
    }


@pytest.mark.one_in(2)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*WORDS, "€", "é", "b", "A", "."]), min_size=1, max_size=3).map("".join))
def test_the_rows_found_are_those_that_have_the_text(run: Path, text: str) -> None:
    hits = list(search_rows(run, text))
    texts = texts_of(run)
    # `lower` is enough here: of these characters only ASCII and ü have an upper case.
    wanted = [number for number, branches in texts.items() if any(text.lower() in one.lower() for one in branches)]
    assert [hit.row_id for hit in hits] == wanted
    names = [prefix.rstrip("_") for prefix in manifest.layout(manifest.read(run)).branches]
    for hit in hits:
        branches = texts[hit.row_id]
        place = next(i for i, one in enumerate(branches) if text.lower() in one.lower())
        assert hit.branch == names[place]
        assert hit.found.lower() == text.lower()
        assert hit.before.removeprefix("…") + hit.found + hit.after.removesuffix("…") in branches[place]


def test_a_hit_says_which_row_it_is_in_and_what_stands_around_it(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    ids = value_rows()[8].branches[0].input_ids
    write_pieces(run, [Piece(content=f"{'x' * 40}{i} ".encode(), special=False) for i in range(VOCABULARY)])
    (hit,) = search_rows(run, f"{ids[3]} {'x' * 40}{ids[4]} ")
    whole = "".join(f"{'x' * 40}{i} " for i in ids)
    start = whole.index(hit.found)
    assert hit == Hit(
        row_id=8,
        turn=0,
        source="rows.jsonl",
        line=9,
        id="n8",
        status="scored",
        branch="",
        before="…" + whole[start - 60 : start],
        found=hit.found,
        after=whole[start + len(hit.found) :][:60] + "…",
    )


def test_rows_without_values_are_found_too(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    found = {hit.status for hit in search_rows(run, "<")}
    assert found == {"scored", "failed", "target"}


def test_tokens_that_are_not_known_spell_nothing(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    write_pieces(run, [Piece(content=b"z" if i > 5 else b"", special=False) for i in range(20)])
    wanted = {row.row_id: "".join("z" for i in row.branches[0].input_ids if 5 < i < 20) for row in value_rows()}
    assert max(map(len, wanted.values())) > 3
    for text in ("z", "zz", "zzzz"):
        assert [hit.row_id for hit in search_rows(run, text)] == [n for n, whole in wanted.items() if text in whole]


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    with pytest.raises(UsageError, match="search: found no text"):
        list(search_rows(run, ""))
    with pytest.raises(UsageError, match="has no generation 3"):
        list(search_rows(run, "a", generation=3))
    bare = tmp_path / "bare"
    write_generation(bare, value_rows())
    manifest.write(bare, manifest.rebuild(bare))
    with pytest.raises(UsageError, match="has no text to search: its rows were given as tokens"):
        list(search_rows(bare, "a"))
    (run / "values/generation=0/part-00001.parquet").write_bytes(b"no")
    with pytest.raises(StoredDataError, match="part-00001"):
        list(search_rows(run, "nowhere"))
