"""What commands say of a mask: what it keeps, how to name it, and a row to look at."""

from __future__ import annotations

from collections.abc import Iterator
from glob import has_magic
from pathlib import Path
from typing import Any

from alphatoken_curate.wording import count, end_of_turn, in_sequences, over_share, pasted, sequences_are


def rows(done: Any) -> str:
    """The line that says what became of the rows, of a `ScoreSummary` or a `RefreshSummary`."""
    counts = done.counts
    words = {"held out as target": counts.target, "failed": counts.failed}
    words |= {"rejected, named in rejects.jsonl": counts.rejected}
    aside = ", ".join(f"{n} {word}" for word, n in words.items() if n)
    beside = in_sequences(done.manifest.settings.get("turns") == "each" and counts.sequences)
    return f"  rows    {counts.scored} scored of {counts.read}{beside}{f' ({aside})' if aside else ''}"


def nothing_but(beside: tuple[str, ...]) -> str:
    """That nothing was written, but for these files."""
    but = f" but {', '.join(beside)}" if beside else ""
    return f"Nothing was written{but}."


def older(run: Path, mask: int, what: str = "this one") -> Iterator[str]:
    """Lines that say how to name a mask that is not the newest."""
    yield f"Readers take the newest mask; name {what} by its number:"
    yield f"  alphatoken-curate export {pasted(run)} --mask {mask} --for trl -o DIR"
    yield f"  in Python: scan({str(run)!r}, 'train', mask={mask}), as_dataset({str(run)!r}, {mask})"


def summary(made: Any) -> Iterator[str]:
    """Lines that say what a `MaskSummary` keeps, and of what."""
    yield f"  tokens  {_kept(made)} response tokens kept ({made.kept_tokens / max(1, made.response_tokens):.1%})"
    if made.branches:
        yield f"          {', '.join(f'{name} {_kept(counts)}' for name, counts in made.branches.items())} kept"
    if told := end_of_turn(made.end_of_turn_tokens, made.end_of_turn_kept):
        yield f"          {told}"
    if made.over_share:
        yield f"          {over_share(made.over_share)}"
    one, several = sequences_are(made.of_turns)
    if made.rows_given_back:
        words = ("branch", "branches") if made.branches else (one, several)
        yield f"          {count(made.rows_given_back, *words)} that would have lost every token got the best one back"
    if made.generations != (0,):
        many = len(made.generations) > 1
        numbers = ", ".join(map(str, made.generations))
        yield f"  values  the mean of generations {numbers}" if many else f"  values  generation {numbers}"
    if made.rows_left_out:
        left_out = count(made.rows_left_out, f"{one} is", f"{several} are")
        yield f"          {left_out} left out: scored in only some of them"
    yield from a_pattern(made.path)


def a_pattern(place: Path) -> Iterator[str]:
    """That the path of a folder to load is a pattern to others, where it is one."""
    if has_magic(str(place.resolve())):
        yield "  load_dataset takes *, ? and [ in this path for a pattern: rename it, or use the code in README.md"


def _kept(counts: Any) -> str:
    return f"{counts.kept_tokens:,} of {counts.response_tokens:,}"


def first_row(run: Path) -> int:
    """A row of the newest mask, to look at."""
    from alphatoken_curate.reading.scan import scan

    rows = scan(run, "train").select("row_id").head(1).collect()
    return int(rows.item()) if len(rows) else 0
