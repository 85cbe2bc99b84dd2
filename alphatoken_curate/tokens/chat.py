"""Chats become text by the tokenizer's chat template, with the character spans that respond.

Where the template marks its answers (`{% generation %}`), those marks are the response; elsewhere `turns` tells where
each answer stands: what the model itself would write at its turn, to the token it stops at. Messages are given in the
first form that the template bears: arguments of calls as objects or as JSON text, content as text or as parts.

Text that spells a special token, `<|im_end|>` in a user's message, is told apart from what the template writes by a
mark set within it while the template runs. In an answer those are special tokens that the template itself writes within
answers (around a thought or a call); what closes a turn or opens one stays text there too.

A tokenizer without a chat template is that of a base model: there a record's `plain` text stands in for the chat where
it has one, and is raw text; other chats are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

from alphatoken_curate.errors import ModelError
from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.files import visible
from alphatoken_curate.rows.shapes import Messages, Prompt, PromptCompletion
from alphatoken_curate.tokens.advice import Adviser
from alphatoken_curate.tokens.blocks import GENERATION, answers_of_blocks
from alphatoken_curate.tokens.bounded import Bounded
from alphatoken_curate.tokens.closings import closing, of_turns, partner
from alphatoken_curate.tokens.dates import TemplateDay
from alphatoken_curate.tokens.each import with_its_thought
from alphatoken_curate.tokens.forms import PART, TEMPLATE_ERROR, as_borne, written_as_list
from alphatoken_curate.tokens.kept import CONTEXT_LOST, THOUGHT, left_out_notes, tools_notes
from alphatoken_curate.tokens.marks import RESERVED
from alphatoken_curate.tokens.meter import RunawayError
from alphatoken_curate.tokens.refusals import NOT_SPLITTABLE, RUNAWAY, excerpt, not_splittable
from alphatoken_curate.tokens.specials import Specials
from alphatoken_curate.tokens.turns import find_answers

Tokenizer = Any
"""A tokenizer of transformers; not imported here, since that takes seconds."""

# a noncharacter of Unicode, kept free for use inside a program
MARK = "\ufdd2"
_ESCAPED_MARK = r"\ufdd2"  # as a template writes it that turns text to ASCII
# what a template can raise that is written for other rows, or in bad faith; it runs in a sandbox
_TEMPLATE_FAULTS = (ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError, ValueError)


class RenderedText(NamedTuple):
    """Text and the character spans [start, end) that respond; `marked`: a `MARK` hides spelled specials.

    `closings`: by how many special tokens each span's turn is closed. `bos`: a BOS goes in front where the tokenizer
    adds one. `eos`: an EOS that responds goes behind. `notes`: what of the row is not as it was given.
    """

    text: str
    spans: list[tuple[int, int]]
    closings: tuple[int, ...] = ()
    marked: bool = False
    bos: bool = False
    eos: bool = False
    notes: tuple[str, ...] = ()


def joined(record: PromptCompletion) -> RenderedText:
    """Prompt and completion as raw text."""
    text = record.prompt + record.completion
    return RenderedText(text=text, spans=[(len(record.prompt), len(text))], bos=True, eos=True)


def unanswered(text: str) -> RenderedText:
    """Raw text of which nothing responds."""
    return RenderedText(text=text, spans=[], bos=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    """How chats are read."""

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What the template is told besides; a row's own come before them."""

    stops: frozenset[str] = frozenset()
    """Texts of tokens that the model stops at, beside its tokenizer's EOS.

    Where a template closes no turn, the one that opens the next turn responds."""

    day: TemplateDay | None = None
    """The date that the template may write; None: that of the clock."""

    assistant_specials: str = "template"
    """Special tokens that an answer spells: those of the template's own answers are themselves and others `text`
    (`template`), all are `text`, or the row is one to `refuse`."""


class ChatTemplate:
    """A tokenizer's chat template; `turns`: which assistant turns of each chat respond, `all`, `last` or `each`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        specials: Specials,
        *,
        turns: str,
        chats: ChatSettings,
    ) -> None:
        self._tokenizer = tokenizer
        self._chats = chats
        self._stops = chats.stops | {tokenizer.eos_token} - {None}
        self._specials, self._of_tokenizer = specials.pattern, specials
        self._turns = turns

    def render(self, record: Messages) -> list[RenderedText]:
        """The chat as text with its response spans: one text, by `each` one for each answer. Raises RowFault."""
        if not self._templated:
            if record.plain is None:
                raise _no_template()
            return [joined(record.plain)]
        return self._or_advised(record)

    @cached_property
    def _templated(self) -> bool:
        """Whether the tokenizer has a chat template. Raises ModelError where that is no text."""
        found = self._tokenizer.chat_template
        named = found if isinstance(found, dict) else {"default": found} if found else {}
        if named and not (
            isinstance(named.get("default"), str) and all(isinstance(one, str) for one in named.values())
        ):
            raise ModelError(
                f"the tokenizer's chat template is not text, or none of several ({', '.join(map(str, named))}) is the"
                " default. Name one with --chat-template FILE."
            )
        return bool(named)

    def _or_advised(self, record: Messages | Prompt) -> list[RenderedText]:
        try:
            return self._shown(record)
        except RowFault as fault:
            if fault.reason not in (TEMPLATE_ERROR, NOT_SPLITTABLE):
                raise
            raise self._adviser.advised(fault, record) from None

    def _shown(self, record: Messages | Prompt) -> list[RenderedText]:
        if isinstance(record, Prompt):
            return as_borne(record.messages, partial(self._rendered_prompt, record))
        return as_borne(record.messages, partial(self._rendered_chat, record))

    @cached_property
    def _adviser(self) -> Adviser:
        def takes(record: Messages | Prompt, turns: str, settings: Mapping[str, Any]) -> bool:
            chats = replace(self._chats, kwargs={**self._chats.kwargs, **settings})
            other = ChatTemplate(self._tokenizer, self._of_tokenizer, turns=turns, chats=chats)
            try:
                shown = other._shown(record)
            except RowFault as fault:
                if fault.reason == RUNAWAY:
                    raise
                return False
            return not any(note in CONTEXT_LOST for one in shown for note in one.notes)

        return Adviser(takes=takes, template=str(self._tokenizer.get_chat_template()), turns=self._turns)

    def _rendered_chat(self, record: Messages, given: list[Any]) -> list[RenderedText]:
        messages, told, marked = self._hidden(given, record)
        respond = record.responding(last_only=self._turns == "last")
        if not respond:
            raise RowFault("marked_off", "the last answer is marked off, and --turns last trains no other")
        notes = self._notes_of_specials([messages[i] for i in respond]) if marked else []

        def render(chat: list[Any], **options: Any) -> str:
            return self._apply(chat, **told, **options)

        def rendered(chat: list[Any], respond: list[int]) -> RenderedText:
            template = self._tokenizer.get_chat_template(tools=record.tools)
            if GENERATION.search(template):
                text, found = answers_of_blocks(template, render, chat, respond)
            else:
                text = render(chat)
                found = find_answers(text, chat, respond, render, specials=self._specials, stops=self._stops)
            ends = zip(found.said, (end for _, end in found.spans), strict=True)
            closings = tuple(self._closed_by(closing(self._specials, text, *one)) for one in ends)
            said = [*notes, *found.notes, *tools_notes(told["tools"], text)]
            return _rendered(text, found.spans, marked, said)._replace(closings=closings)

        if self._turns != "each":
            return [rendered(messages, respond)]

        def by_itself(i: int) -> RenderedText:
            prompt = render(messages[:i], prompt=True) if i else ""
            return self._as_asked(rendered(messages[: i + 1], [i]), prompt, messages[i])

        return [by_itself(i) for i in respond]

    def _as_asked(self, item: RenderedText, prompt: str, answer: dict[str, Any]) -> RenderedText:
        """The chat up to its last answer, as a model is asked for it: nothing stands behind its stop.

        `prompt`: what stood before it, with the generation prompt.
        """
        start, end = item.spans[0][0], item.spans[-1][1]
        lost = left_out_notes([THOUGHT])[0]
        if lost in item.notes:
            made = with_its_thought(item.text, (start, end), prompt, answer.get("content"), self._specials)
            if made is not None:
                notes = tuple(note for note in item.notes if note != lost)
                return item._replace(text=made[0], spans=[made[1]], closings=item.closings[-1:], notes=notes)
        notes = item.notes if item.text.startswith(prompt) else (*item.notes, _NOT_ASKED)
        return item._replace(text=item.text[:end], notes=notes)

    def render_prompt(self, record: Prompt) -> RenderedText:
        """The chat as text up to where the answer would begin; nothing responds. Raises RowFault."""
        if not self._templated:
            if record.plain is None:
                raise _no_template()
            return unanswered(record.plain)
        return self._or_advised(record)[0]

    def _rendered_prompt(self, record: Prompt, given: list[Any]) -> list[RenderedText]:
        messages, told, marked = self._hidden(given, record)
        return [_rendered(self._apply(messages, prompt=True, **told), [], marked)]

    def _hidden(self, messages: list[Any], record: Messages | Prompt) -> tuple[list[Any], dict[str, Any], bool]:
        """Messages, and what else the template is told, with the special tokens hidden that they spell.

        And whether there is one.
        """
        told: dict[str, Any] = {"tools": record.tools, "settings": {**self._chats.kwargs, **record.template_kwargs}}
        texts = [*_strings([_but_role(message) for message in messages]), *_strings(told)]
        if any(map(RESERVED.search, texts)):
            raise RowFault("noncharacter", "the text has one of U+FDD0 to U+FDDF, which are no characters; remove it")
        if any(self._specials.search(text) for text in texts):
            hidden = [self._hidden_message(message) for message in messages]
            return hidden, {name: self._marked(value, frozenset()) for name, value in told.items()}, True
        return messages, told, False

    def _hidden_message(self, message: dict[str, Any]) -> dict[str, Any]:
        spoken = message["role"] == "assistant" and self._chats.assistant_specials != "text"
        known = self._spoken if spoken else frozenset[str]()
        return {"role": message["role"], **self._marked(_but_role(message), known)}

    def _notes_of_specials(self, answers: list[Any]) -> list[str]:
        """What becomes of the special tokens that answers spell, where they are text. Raises RowFault where refused."""
        apart = sorted({found for text in _strings(answers) for found in _APART.findall(text)})
        if apart and self._chats.assistant_specials == "refuse":
            spelled = visible(apart[0].replace(MARK, ""), 30)
            why = f"an answer spells the special token {spelled}; --assistant-specials text keeps it as text"
            raise RowFault("special_token", why)
        return ["special tokens that an answer spells stay text"] if apart else []

    def _marked(self, value: Any, known: frozenset[str]) -> Any:
        """`value` with `MARK` behind the first character of each special token that its texts spell; `known` stay."""
        if isinstance(value, str):
            return self._specials.sub(lambda found: found[0] if found[0] in known else _apart(found[0]), value)
        if isinstance(value, list):
            return [self._marked(item, known) for item in value]
        if isinstance(value, dict):
            return {self._marked(key, known): self._marked(item, known) for key, item in value.items()}
        return value

    def _closed_by(self, run: list[re.Match[str]]) -> int:
        """How many of the special tokens that an answer ends with, the last one first, close its turn."""
        known = all(special[0] in self._stops for special in run)
        return len(run if known else of_turns(run, self._stops | self._closes))

    @cached_property
    def _closes(self) -> frozenset[str]:
        """What closes answers of words alone, the last one of a chat and others."""
        chat = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
        try:
            text = self._apply(chat)
            found = find_answers(text, chat, [1, 3], self._apply, specials=self._specials, stops=self._stops)
        except RowFault:
            return frozenset()
        return frozenset(one[0] for start, end in found.spans for one in closing(self._specials, text, start, end))

    @cached_property
    def _spoken(self) -> frozenset[str]:
        """Special tokens that the template itself writes within answers, as those around a thought or a call.

        All that its source names, but for those that stand outside the answer of a plain chat, or close it.
        """
        chat = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
        template = str(self._tokenizer.get_chat_template())
        try:
            text = self._apply(chat)
            found = find_answers(text, chat, [1], self._apply, specials=self._specials, stops=self._stops)
            prompt = self._apply(chat[:1], prompt=True)
        except RowFault:
            return frozenset()
        ((start, end),) = found.spans
        outside = self._specials.findall("\n".join([text[:start], text[end:], prompt]))
        # A generation prompt may open a thought, and close it.
        paired = {name for name in outside if partner(name) in template}
        return frozenset(self._specials.findall(template)) - ({*outside} - paired) - self._closes - self._stops

    def _apply(
        self,
        messages: list[Any],
        *,
        tools: Any = None,
        settings: Mapping[str, Any] | None = None,
        prompt: bool = False,
        template: str | None = None,
    ) -> str:
        import jinja2

        settings = self._chats.kwargs if settings is None else settings
        if self._chats.day is not None:
            template, more = self._chats.day.told(template or self._tokenizer.get_chat_template(tools=tools))
            settings = {**settings, **more}

        try:
            with Bounded([messages, tools, settings]):
                text = str(
                    self._tokenizer.apply_chat_template(
                        messages,
                        tools=tools,
                        chat_template=template,
                        tokenize=False,
                        add_generation_prompt=prompt,
                        **settings,
                    )
                )
        except (RunawayError, MemoryError) as error:
            why = visible(str(error)) or "memory ran out"
            raise RowFault(RUNAWAY, f"the chat template runs away: {why}; {_TAME}") from error
        except (*_TEMPLATE_FAULTS, jinja2.TemplateError) as error:
            raise RowFault(TEMPLATE_ERROR, f"the chat template fails: {visible(str(error))}") from error
        if written_as_list(text):
            raise RowFault(TEMPLATE_ERROR, "the chat template takes content as text, not as parts")
        return text


def _rendered(text: str, spans: list[tuple[int, int]], marked: bool, notes: Sequence[str] = ()) -> RenderedText:
    if marked and _ESCAPED_MARK in text:
        at = text.index(_ESCAPED_MARK)
        raise not_splittable(
            f"it escapes the characters of text that spells a special token, {excerpt(text[max(0, at - 20) :])}"
        )
    return RenderedText(text=text, spans=spans, marked=marked, notes=tuple(dict.fromkeys(notes)))


_TAME = "name another with --chat-template FILE"
_NOT_ASKED = "answers begin before the end of the generation prompt, as the template has them"
_APART = re.compile(rf"\S?{MARK}\S{{0,30}}")


def _apart(special: str) -> str:
    return special[0] + MARK + special[1:]


def _but_role(message: dict[str, Any]) -> dict[str, Any]:
    """The message without its role, which is one of a few words that templates compare."""
    return {key: item for key, item in message.items() if key != "role"}


def _strings(value: Any) -> Iterator[str]:
    """Every text within a value, keys included: templates write tools and calls as JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        yield from (key for key in value if key != PART)
        yield from (text for item in value.values() for text in _strings(item))


def _no_template() -> RowFault:
    return RowFault(
        "no_chat_template",
        "the tokenizer has no chat template; use a model that has one, or rows with prompt + completion as text,"
        " or input_ids + labels",
    )
