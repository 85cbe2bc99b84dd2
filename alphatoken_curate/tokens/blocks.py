"""Where the answers of a chat stand in its text, for templates that mark them (`{% generation %}`).

Those marks are the response. Which of them are whose is known from the texts that end in each, by marks of ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from alphatoken_curate.tokens.kept import check_calls, check_kept, context_notes, left_out_notes
from alphatoken_curate.tokens.marks import MarkedChat, read_marks, without_marks
from alphatoken_curate.tokens.refusals import excerpt, not_splittable
from alphatoken_curate.tokens.turns import Answers
from alphatoken_curate.wording import count

GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
"""The tags of such a mark."""

# noncharacters of Unicode, kept free for use inside a program
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_BLOCK = re.compile(f"({_OPEN}[^{_CLOSE}]*{_CLOSE})")
# a block tag for a block tag, so that jinja trims white space around both alike
_MACRO = "{% macro __response() %}" + _OPEN + "{{ caller() }}" + _CLOSE + "{% endmacro %}\n"

Span = tuple[int, int]


def answers_of_blocks(
    template: str, render: Callable[..., str], messages: list[dict[str, Any]], respond: Sequence[int]
) -> tuple[str, Answers]:
    """The chat as text, and the answers `respond` as the template marks them in it. Raises RowFault."""
    tagged = _MACRO + GENERATION.sub(
        lambda tag: f"{{%{tag[1]} {'endcall' if tag[2] else 'call __response()'} {tag[3]}%}}", template
    )
    spans: list[Span] = []

    def render_blocks(chat: list[Any]) -> str:
        pieces = _BLOCK.split(render(chat, template=tagged))
        bare = [piece.strip(_OPEN + _CLOSE) for piece in pieces]
        if any(piece.count(_OPEN) > 1 for piece in pieces):
            raise not_splittable("it marks an answer within an answer, one {% generation %} inside another")
        spans[:] = _spans(pieces, bare)
        return "".join(bare)

    text = render(messages)
    chat = MarkedChat.of(text, messages, render_blocks)
    owned = _by_owner(chat, spans, text, respond)
    wanted = {span for i in respond for span in owned[i]}
    keys: list[str] = []
    for i in respond:
        keys += _check(chat, i, owned[i])
    merged = _merged([span for span in spans if span in wanted])
    notes = [*left_out_notes(keys), *context_notes(chat, respond)]
    return text, Answers(spans=merged, said=[_said(chat, span) for span in merged], notes=notes)


def _said(chat: MarkedChat, span: Span) -> int:
    """Where the last text in a span ends; where none does, what closes the turn may be all of it."""
    ends = (chat.whole.end(leaf) or -1 for leaf in chat.leaves)
    return max((end for end in ends if span[0] < end <= span[1]), default=span[0])


def _spans(pieces: list[str], bare: list[str]) -> list[Span]:
    """Where the marked pieces stand in the text without any marks."""
    spans, place = list[Span](), 0
    for piece, inner in zip(pieces, bare, strict=True):
        end = place + len(read_marks(inner).text)
        if piece.startswith(_OPEN):
            spans.append((place, end))
        place = end
    return spans


def _by_owner(chat: MarkedChat, spans: list[Span], text: str, respond: Sequence[int]) -> dict[int, list[Span]]:
    """The marked spans of each answer. Raises RowFault where one of `respond` has none."""
    answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    owners = [_owner(chat, span, text) for span in spans]
    if len(spans) == len(answers) and all(one in (None, i) for one, i in zip(owners, answers, strict=True)):
        return {i: [span] for i, span in zip(answers, spans, strict=True)}
    found: dict[int, list[Span]] = {i: [] for i in answers}
    for owner, span in zip(owners, spans, strict=True):
        found[_by_place(chat, span, answers) if owner is None else owner].append(span)
    if empty := [i for i in respond if not found[i]]:
        check_kept(chat, empty[0], 0)
        marked, lost = count(len(spans), "answer"), without_marks(str(chat.messages[empty[0]].get("content") or ""))
        raise not_splittable(f"it marks {marked} of {len(answers)}, and none of answer {empty[0]}, {excerpt(lost)}")
    return found


def _owner(chat: MarkedChat, span: Span, text: str) -> int | None:
    """Whose text ends in it. Raises RowFault where that is no answer, or two."""
    within = [leaf for leaf in chat.leaves if span[0] < (chat.whole.end(leaf) or -1) <= span[1]]
    others = [leaf for leaf in within if chat.messages[leaf.message]["role"] != "assistant"]
    owners = sorted({leaf.message for leaf in within})
    if others or len(owners) > 1:
        raise not_splittable(f"it marks messages {owners} as one answer, {excerpt(text[span[0] : span[1]])}")
    return owners[0] if owners else None


def _by_place(chat: MarkedChat, span: Span, answers: list[int]) -> int:
    """Whose a span is that no text ends in: of the answer whose text stands last before it, or else the next one's."""
    before = [leaf.message for leaf in chat.leaves if (chat.whole.end(leaf) or span[1]) <= span[0]]
    last = max(before, default=0)
    return next((i for i in answers if i >= last), answers[-1])


def _check(chat: MarkedChat, index: int, spans: list[Span]) -> list[str]:
    """The keys of what was not written of an answer. Raises RowFault where more than a thought is lost, or unmarked."""
    for leaf in chat.of_message(index):
        end = chat.whole.end(leaf)
        if leaf.key in ("content", "tool_calls") and end is not None and not any(a < end <= b for a, b in spans):
            marked, stands = "".join(chat.whole.text[a:b] for a, b in spans), chat.whole.text[:end]
            raise not_splittable(
                f"it marks {excerpt(marked)} of answer {index}, but not {excerpt(stands[-len(leaf.text) :])}"
            )
    keys = check_kept(chat, index, spans[0][0])
    check_calls(chat, index, spans)
    return keys


def _merged(spans: list[Span]) -> list[Span]:
    """Spans that are not empty, those that touch as one."""
    merged: list[Span] = []
    for start, end in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = merged[-1][0], end
        elif start < end:
            merged.append((start, end))
    return merged
