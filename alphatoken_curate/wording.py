"""Words that messages share."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

_VALUE = re.compile(r"\bvalue\b", re.IGNORECASE)

_NEAR = 0.65
"""How alike names must be, by `difflib`: `nul` and `nll` are, `boredom` and `random` are not."""


def count(number: int, what: str, many: str | None = None) -> str:
    """`1 row`, `2,000 rows`; `many` where that is no `s` more: `1 branch`, `3 branches`."""
    return f"{number:,} {what if number == 1 else many or what + 's'}"


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean nll?`, or nothing where no name is near."""
    near = difflib.get_close_matches(name, [one for one in known if one != name], n=1, cutoff=_NEAR)
    return f" Did you mean {near[0]}?" if near else ""


def pasted(path: object) -> str:
    """A path as a word of a command: quoted where a shell needs it, and never one that would be read as an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def ranges(numbers: Sequence[int], most: int) -> str:
    """`3, 7, 9-120` of ascending numbers; `and 14 more` behind so many ranges."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda one: one[1] - one[0])]
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs[:most]]
    left = sum(map(len, runs[most:]))
    return ", ".join(shown) + (f" and {left:,} more" if left else "")


def in_sequences(sequences: int | None) -> str:
    """What is told behind a number of rows where each of their answers is a sequence; nothing elsewhere."""
    return f" in {count(sequences, 'sequence')}, one for each answer" if sequences else ""


def sequences_are(of_turns: object) -> tuple[str, str]:
    """What the sequences of a run are called, one and several: answers where each is one of its own, else rows."""
    return ("answer", "answers") if of_turns else ("row", "rows")


def chosen_by(settings: Mapping[str, object]) -> str:
    """What decides a mask of these settings, in the words of the flags of `mask`."""
    by, stays = str(settings["by"]), str(settings.get("always_keep", "none"))
    names = ["keep", "scope", "weights"]
    if any(_VALUE.search(one) for one in (by, stays)):
        names += ["stability_weight", *(["stability_scale"] if settings.get("stability_scale") != "none" else [])]
    told = {name: settings.get(name) for name in [*names, *(["seed"] if by == "random" else [])]}
    if not _keeps_all(settings):
        told["always_keep"] = stays
    given = {name: value for name, value in told.items() if value is not None}
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
    return f"{by}; {', '.join([*flags, *(['--allow-empty-rows'] if settings.get('allow_empty_rows') else [])])}"


def _keeps_all(settings: Mapping[str, object]) -> bool:
    """Whether no token is left out, so that none needs to be always kept."""
    return str(settings["keep"]) in ("1", "1.0") and not str(settings.get("weights")).startswith(("relu", "tilt"))


def end_of_turn(tokens: int | None, kept: int | None) -> str | None:
    """How many of the tokens that end an answer train; None where it is not known which they are."""
    if not tokens:
        return None if tokens is None else "end of turn: no response token ends an answer"
    return f"end of turn: {kept or 0:,} of {tokens:,} train"


def over_share(tokens: int) -> str:
    """What is said where tokens that are always kept are more than the share."""
    return f"what is always kept is more than the share by {count(tokens, 'token')}, and stays"
