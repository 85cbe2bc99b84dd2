"""The special tokens that close a turn."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import takewhile

from alphatoken_curate.tokens.refusals import shared


def closing(specials: re.Pattern[str], text: str, said: int, end: int) -> list[re.Match[str]]:
    """The special tokens, one behind the other, that end what stands from `said` to `end`; the last one first."""
    found, place = list[re.Match[str]](), said + len(text[said:end].rstrip())
    for special in reversed(list(specials.finditer(text, said, end))):
        if special.end() != place:
            break
        found.append(special)
        place = special.start()
    return found


def of_turns(found: list[re.Match[str]], closes: Collection[str]) -> list[re.Match[str]]:
    """Those of them that close a turn: what ends a call or a thought may touch them.

    `closes`: texts that close turns of words alone; where the last is another, all do.
    """
    return list(takewhile(lambda special: special[0] in closes, found)) or found


def next_header(tail: str, before: str, role: str) -> int:
    """Where the header of an answer to come begins in what stands behind an answer; at its end without one.

    `before`: the chat before the answer, of a template that writes that header behind every chat, and no special token.
    """
    common = shared(tail[::-1], before[::-1])
    return len(tail) - common if role in tail[len(tail) - common :] else len(tail)


def ends_in_a_row(specials: re.Pattern[str], text: str, at: int) -> Iterator[int]:
    """The ends of special tokens that stand one behind the other from `at` on."""
    while found := specials.match(text, at):
        at = found.end()
        yield at


def partner(special: str) -> str:
    """`</think>` of `<think>`, and the other way round; of another token, one that no template has."""
    return special[0] + special[2:] if special[1:2] == "/" else special[0] + "/" + special[1:]
