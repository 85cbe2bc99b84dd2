"""What commands say of a mask: what it keeps, how to name it, and a row to look at."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alphatoken_curate.wording import count, end_of_turn, over_share


def older(run: Path, mask: int) -> Iterator[str]:
    """Lines that say how to name a mask that is not the newest."""
    yield "Readers take the newest mask; name this one by its number:"
    yield f"  alphatoken-curate export {shlex.quote(str(run))} --mask {mask} --for trl -o DIR"
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
    if made.rows_given_back:
        words = ("branch", "branches") if made.branches else ("row", "rows")
        yield f"          {count(made.rows_given_back, *words)} that would have lost every token got the best one back"
    if made.generations != (0,):
        many = len(made.generations) > 1
        numbers = ", ".join(map(str, made.generations))
        yield f"  values  the mean of generations {numbers}" if many else f"  values  generation {numbers}"
    if made.rows_left_out:
        yield f"          {count(made.rows_left_out, 'row is', 'rows are')} left out: scored in only some of them"


def _kept(counts: Any) -> str:
    return f"{counts.kept_tokens:,} of {counts.response_tokens:,}"


def first_row(run: Path) -> int:
    """A row of the newest mask, to look at."""
    from alphatoken_curate.reading.scan import scan

    rows = scan(run, "train").select("row_id").head(1).collect()
    return int(rows.item()) if len(rows) else 0
