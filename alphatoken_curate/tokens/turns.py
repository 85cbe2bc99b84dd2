"""Where the answers of a chat stand in its text, for templates that do not mark them themselves.

Nothing is searched for. Every text of a message gets a numbered mark behind its last character, the chat is rendered
with the marks and without, and both must be the same text. So it is known where each text ends, whatever it is.

An answer begins where the messages before it, rendered with the generation prompt, and the whole chat part, both read
on from the same mark: behind what header and generation prompt have in common. It ends behind the run of special
tokens that closes its turn: read on from the answer's last mark, the chat up to this answer and the whole chat agree
that far. Where a template closes a turn otherwise once messages follow, its own closing there counts; where none does,
the token that opens the next turn counts if the model stops at it (GLM), and no other. Answers in a row of which a
template makes one turn (Gemma 4) part where the text of the first ends.

Messages may be written otherwise in history (thoughts left out, another token for the end): all that is asked for is
that the answer stands there whole. What is left out besides is told, by the key it came from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from alphatoken_curate.tokens.closings import ends_in_a_row, next_header
from alphatoken_curate.tokens.kept import check_calls, check_kept, context_notes, left_out_notes
from alphatoken_curate.tokens.marks import NAME, Leaf, MarkedChat, Render, Rendering, read_marks
from alphatoken_curate.tokens.refusals import excerpt, not_splittable, parted, shared

_NO_KNOWN_STOP = (
    "the chat template writes its generation prompt behind every chat, and no token that the model stops at: answers"
    " end before it, with the first special token where there is one"
)
_OTHER_ROLE = "the chat template names another role before answers than in its generation prompt"
_QUESTION = {"role": "user", "content": "x"}
_EDGE = re.compile(r"\s|[<\[]")
_WORD = re.compile(r"\w+(?=\W)")
_TAG_BEGUN = re.compile(r"[<\[][^<>\[\]\s]*$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Spans [start, end) of the answers in characters, where what each `said` ends, and what else the template did."""

    spans: list[tuple[int, int]]
    said: list[int]
    notes: list[str]


def find_answers(
    text: str,
    messages: list[dict[str, Any]],
    respond: Sequence[int],
    render: Render,
    *,
    specials: re.Pattern[str],
    stops: frozenset[str],
) -> Answers:
    """Where the messages `respond` stand in `text`, the chat as `render` has it.

    `stops` are the texts of special tokens that end an answer. Raises RowFault where a place is not sure.
    """
    template = _Template(render=render, specials=specials, stops=stops)
    chat = MarkedChat.of(text, messages, render)
    spans: list[tuple[int, int]] = []
    said: list[int] = []
    notes: list[str] = []
    for turn in [_Turn(chat, i, messages, template) for i in respond]:
        span = turn.span()
        if spans and span[0] < spans[-1][1]:
            raise not_splittable(f"two answers overlap in it, at {excerpt(text[span[0] : spans[-1][1]])}")
        spans.append(span)
        said.append(turn.said)
        notes += [*left_out_notes(turn.left_out), *turn.notes]
    return Answers(spans=spans, said=said, notes=[*notes, *context_notes(chat, respond)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Template:
    """How chats are rendered, and the special tokens in them."""

    render: Render
    specials: re.Pattern[str]
    stops: frozenset[str]


class _Turn:
    """One answer. `messages` are those of the chat as they are, without marks."""

    def __init__(self, chat: MarkedChat, index: int, messages: list[dict[str, Any]], template: _Template) -> None:
        self.chat, self.index, self.plain, self.template = chat, index, messages, template
        self.whole, self.message = chat.whole, chat.messages[index]
        self.render, self.specials, self.stops = template.render, template.specials, template.stops
        self.mine = chat.of_message(index)
        begins = [begin for leaf in self.mine if (begin := self.whole.begin(leaf)) is not None]
        self.first = min(begins, default=None)
        self.notes: list[str] = []
        self.said = 0
        self.left_out: list[str] = []

    def span(self) -> tuple[int, int]:
        """[start, end). Raises RowFault."""
        anchor = 0, 0
        if self.index == 0:
            start = self._start_of_chat()
        else:
            head = self._head()
            anchor = max(self._in_both(head, self.chat.before(self.index)), default=anchor)
            start = self._start(head, *anchor)
        self.left_out = check_kept(self.chat, self.index, anchor[1])
        end = self._end(start, anchor)
        self._check_alone(start, end)
        self._check_once(start, end)
        check_calls(self.chat, self.index, [(start, end)])
        return start, end

    def _in_both(self, other: Rendering, leaves: Sequence[Leaf]) -> list[tuple[int, int]]:
        """Where texts end in another rendering and in the whole, of those that both have."""
        places = [(other.end(leaf), self.whole.end(leaf)) for leaf in leaves]
        return [(there, here) for there, here in places if there is not None and here is not None]

    # --- start

    def _head(self) -> Rendering:
        """The messages before this one with the generation prompt, which templates may write by how a text ends."""
        head = read_marks(self.render(self.chat.messages[: self.index], prompt=True))
        plain = self.render(self.plain[: self.index], prompt=True)
        if head.text == plain:
            return head
        if not plain.startswith((before := self._before()).text):
            raise not_splittable(f"it writes what stands before answer {self.index} by how texts end")
        return Rendering(text=plain, firsts=before.firsts, lasts=before.lasts)

    def _start(self, head: Rendering, at_head: int, at_whole: int) -> int:
        """`at_head` and `at_whole`: where the last text of earlier messages ends that both have."""
        tail, text, first = head.text[at_head:], self.whole.text, self.first
        agreed = shared(tail, text[at_whole:])
        start = at_whole + agreed
        if agreed < len(tail):
            if (joined := self._behind_answer()) is not None:
                return joined
            if first is not None and head.text == self._before().text:
                return self._start_without_prompt(at_whole, first)
            if (behind := self._behind_closing(head)) is not None:
                return behind
            agreed = self._edge(tail, agreed)
            self._check_header(head, agreed - len(tail), text[at_whole:])
            start = at_whole + agreed if first is None else min(at_whole + agreed, first)
            if first is not None and _other_role(tail[agreed:], text[start:first]):
                self.notes.append(_OTHER_ROLE)
                start = first
            within = (one for one in self._specials_of(at_whole, len(text)) if one.start() < start < one.end())
            return next((one.start() for one in within), start)
        if first is not None and text[start:first].strip() and head.text == self._before().text:
            return self._start_without_prompt(start, first)
        return start

    def _start_without_prompt(self, start: int, first: int) -> int:
        """Where the answer begins behind `start`, if the template writes a generation prompt elsewhere, but not here.

        Its text begins at `first`.
        """
        header, opening = self._usual_opening()
        written = self.whole.text[start:first]
        if header and written.startswith(header):
            return start + len(header)
        if header and written == opening:  # it goes on within a turn, as behind the result of a call
            return start
        if not header and self._has_no_header():
            return start
        raise not_splittable(f"it writes no generation prompt before answer {self.index}, but {excerpt(written)}")

    def _has_no_header(self) -> bool:
        """Whether an answer of text alone would stand right behind the messages before this one."""
        other = self._elsewhere([*self.plain[: self.index], {"role": "assistant", "content": "x"}], self.index)
        before = self._before().text
        return other.first is not None and not other.whole.text[: other.first].removeprefix(before).strip()

    def _usual_opening(self) -> tuple[str, str]:
        """Behind the messages before the chat's first answer: its generation prompt, and how this answer began there.

        That is what stands between the prompt and the first text of the answer.
        """
        first = next(i for i, message in enumerate(self.plain) if message["role"] == "assistant")
        before, head = (self.render(self.plain[:first], prompt=asked) for asked in (False, True))
        if not first or not head.startswith(before) or head == before:
            return "", ""
        turn = self._elsewhere([*self.plain[:first], self.plain[self.index]], first)
        opening = turn.whole.text[turn.span()[0] : turn.first]
        return head[len(before) :], opening

    def _elsewhere(self, messages: list[dict[str, Any]], index: int) -> _Turn:
        """A message as an answer of another chat."""
        chat = MarkedChat.of(self.render(messages), messages, self.render)
        return _Turn(chat, index, messages, self.template)

    def _start_of_chat(self) -> int:
        """Where an answer begins that no message stands before: behind the header that it has behind a question.

        Only the template's own text stands before the answer's.
        """
        asked = self._elsewhere([_QUESTION, *self.plain], 1)
        start, before = asked.span()[0], asked._before()
        ends = [end for leaf in asked.chat.before(1) if (end := asked.whole.end(leaf)) is not None]
        closing = before.text[max((end for leaf in asked.chat.before(1) if (end := before.end(leaf))), default=0) :]
        header = asked.whole.text[max(ends, default=0) : start]
        header = header[self._edge(header, shared(header, closing)) :]
        front = self.whole.text[: self.first]
        bare = max((one.end() for one in self.specials.finditer(front)), default=0)
        if self.first is not None and not header and not front[bare:].strip():
            return bare
        if self.first is not None and not header and asked.whole.text.startswith(front):
            return self.first
        header = header.lstrip()
        if self.first is None or not header or front.count(header) != 1:
            raise not_splittable(
                f"no message stands before the first answer, and {excerpt(front)} has not the header"
                f" {excerpt(header)} that answers have behind a question"
            )
        return front.index(header) + len(header)

    def _behind_answer(self) -> int | None:
        """Where this answer begins, if only what closes the answer before it stands between their texts."""
        ends = [(end, leaf) for leaf in self.chat.before(self.index) if (end := self.whole.end(leaf)) is not None]
        if not ends or self.first is None:
            return None
        end, leaf = max(ends, key=lambda one: one[0])
        if self.plain[leaf.message]["role"] != "assistant":
            return None
        between = self.whole.text[end : self.first]
        if not between.strip():
            return end
        before = self._before()
        return self.first if before.text[before.end(leaf) :] == between else None

    def _behind_closing(self, head: Rendering) -> int | None:
        """Where the generation prompt ends that stands behind the answer before this one, closed as in history."""
        prompt = head.text.removeprefix(self._before().text).lstrip()
        if self.plain[self.index - 1]["role"] != "assistant" or not prompt or prompt == head.text:
            return None
        _, end = _Turn(self.chat, self.index - 1, self.plain, self.template).span()
        at = len(self.whole.text) - len(self.whole.text[end:].lstrip())
        return at + len(prompt) if self.whole.text.startswith(prompt, at) else None

    def _end_of_text(self, index: int) -> int | None:
        """Where the last text of a message ends, if it is an answer."""
        ends = [end for leaf in self.chat.of_message(index) if (end := self.whole.end(leaf)) is not None]
        return max(ends, default=None) if self.plain[index]["role"] == "assistant" else None

    def _edge(self, text: str, agreed: int) -> int:
        """Where a tag begins that `text[:agreed]` has the first characters of; else `agreed`."""
        begun = _TAG_BEGUN.search(text, 0, agreed)
        return agreed if begun is None or agreed == len(text) or self._closes(text[:agreed]) else begun.start()

    def _check_header(self, head: Rendering, missing: int, written: str) -> None:
        """What the whole has of a generation prompt must end where a word of it does."""
        before = self._before()
        prompt = head.text[len(before.text) :] if head.text.startswith(before.text) else ""
        kept, rest = prompt[:missing], head.text[missing:]
        if not kept or not (_EDGE.match(rest) or _EDGE.match(kept[-1:]) or self._closes(kept)):
            wanted, other = parted(head.text[len(head.text) + missing - len(kept) :], written)
            raise not_splittable(
                f"answer {self.index} does not begin with its generation prompt: that is {wanted}, and the chat goes"
                f" on with {other}"
            )

    def _before(self) -> Rendering:
        return read_marks(self.render(self.chat.messages[: self.index]))

    def _closes(self, text: str) -> bool:
        return any(found.end() == len(text) for found in self.specials.finditer(text))

    # --- end

    def _end(self, start: int, anchor: tuple[int, int]) -> int:
        text = self.whole.text
        is_last = self.index == len(self.chat.messages) - 1
        through = (
            self.whole if is_last else read_marks(self.render(self._front() + self.chat.messages[: self.index + 1]))
        )
        places = self._in_both(through, self.mine)
        if places:
            there, here = max(places, key=lambda place: place[1])
            at, there = max(start, here), there + max(0, start - here)
        else:
            at = there = start
            if not is_last:
                there = self._same_place(through, start, anchor)
        self.said = at
        tail = self._without_prompt(through.text[there:])
        agreed = shared(tail, text[at:])
        runs = self._runs(at, at + agreed)
        if runs and places and not self.message.get("tool_calls"):
            return runs[0][0]
        # Behind calls, and where nothing was said, other special tokens stand before those that close the turn.
        if closing := next((end for end, names in runs if self.stops & set(names)), None):
            return closing
        if agreed < len(tail):
            told = runs[-1][0] - at if runs else self._edge(tail, agreed)
            return self._other_closing(at + told, tail[told:])
        if stop := self._next_stop(at + agreed):
            return stop
        if not runs:
            self.notes.append("the chat template writes no token to stop at behind an answer")
        return runs[-1][0] if runs else at + agreed

    def _without_prompt(self, tail: str) -> str:
        """What ends the chat behind this answer, without the generation prompt that some templates always write.

        The release of Llama 3 did: there the header of a turn to come stands in one run with what closes this one.
        """
        ends = [found.end() for found in self.specials.finditer(tail)]
        stops = [found.end() for found in self.specials.finditer(tail) if found[0] in self.stops]
        if not stops and self.message.get("tool_calls"):
            return tail
        front = self._front() + self.plain[: self.index]
        before = self.render(front)
        cut = (stops or ends or [next_header(tail, before, self.message["role"])])[0]
        if not tail[cut:].strip() or not before.endswith(tail[cut:]) or before != self.render(front, prompt=True):
            return tail
        self.notes += [] if stops else [_NO_KNOWN_STOP]
        return tail[:cut]

    def _front(self) -> list[dict[str, Any]]:
        """A question, where no message stands before the answer: some templates ask for one."""
        return [] if self.index else [_QUESTION]

    def _same_place(self, through: Rendering, start: int, anchor: tuple[int, int]) -> int:
        """In the chat up to this answer: the place that is `start` in the whole."""
        both = self._in_both(through, self.chat.before(self.index))
        return next((there for there, here in both if here == anchor[1]), 0) + start - anchor[1]

    def _runs(self, start: int, end: int) -> list[tuple[int, list[str]]]:
        """Special tokens within [start, end) that stand one behind the other: where such a run ends, and its tokens."""
        runs: list[tuple[int, list[str]]] = []
        place = -1
        for found in self._specials_of(start, end):
            if found.start() == place:
                runs[-1] = found.end(), [*runs[-1][1], found[0]]
            else:
                runs.append((found.end(), [found[0]]))
            place = found.end()
        return runs

    def _other_closing(self, at: int, tail: str) -> int:
        """History closes a turn otherwise: by as many special tokens as `tail` does, as far as they stand in a row."""
        text = self.whole.text
        wanted = len(list(ends_in_a_row(self.specials, tail, len(tail) - len(tail.lstrip()))))
        ends = list(ends_in_a_row(self.specials, text, len(text) - len(text[at:].lstrip())))[: max(1, wanted)]
        if ends:
            return ends[-1]
        if at == self._end_of_text(self.index) and self._goes_on(at):
            return at
        alone, followed = parted(tail, text[at:])
        raise not_splittable(
            f"it goes on otherwise behind answer {self.index} once messages follow: with {followed} for {alone}"
        )

    def _goes_on(self, at: int) -> bool:
        """Whether the next message is an answer, too, and its text stands right behind `at`, in the same turn."""
        following = self.chat.of_message(self.index + 1)
        begins = [begin for leaf in following if (begin := self.whole.begin(leaf)) is not None]
        return (
            self.plain[self.index + 1]["role"] == "assistant"
            and bool(begins)
            and not self.whole.text[at : min(begins)].strip()
        )

    def _next_stop(self, at: int) -> int | None:
        """Behind the special token that stands at `at`, if the model stops at it."""
        found = self.specials.match(self.whole.text, at)
        return found.end() if found and found[0] in self.stops else None

    def _specials_of(self, start: int, end: int) -> Iterator[re.Match[str]]:
        return self.specials.finditer(self.whole.text, start, end)

    def _check_alone(self, start: int, end: int) -> None:
        for leaf in self.chat.leaves:
            if leaf.message != self.index and start < (self.whole.end(leaf) or -1) <= end:
                raise not_splittable(
                    f"the turn of answer {self.index} holds message {leaf.message}, {excerpt(leaf.text)}"
                )

    def _check_once(self, start: int, end: int) -> None:
        """What stands behind a special token once more is another turn; no model would write it."""
        for leaf in self.mine:
            first, last = (places.get(leaf.number, start) for places in (self.whole.firsts, self.whole.lasts))
            again = last - len(leaf.text)
            if leaf.key == NAME or not start < first <= again or last > end:
                continue
            if found := next(self._specials_of(first, again), None):
                told = f"{excerpt(leaf.text)}, again behind {excerpt(found[0])}"
                raise not_splittable(f"it writes answer {self.index}, {told}")


def _other_role(prompt: str, header: str) -> bool:
    """Whether a generation prompt goes on as a header does, but for the word it begins with."""
    one, other = _WORD.match(prompt), _WORD.match(header)
    return one is not None and other is not None and prompt[one.end() :] == header[other.end() :]
