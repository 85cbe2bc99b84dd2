"""Chats become text by the tokenizer's chat template, with the character spans that respond.

Where the template marks its answers (`{% generation %}`), those marks
are the response. Elsewhere turn i responds from the end of `messages[:i]` rendered with the generation prompt to its
own end-of-turn token, that token included and what the template writes after it (a newline, say) not; whatever else
the template puts behind the generation prompt, such as an empty thought, counts as answer. Both renderings must be
prefixes of the whole; a template that rewrites earlier turns is refused for the rows where it does.

Text that spells a special token, `<|im_end|>` in a user's message, is told apart from what the template writes by a
mark set within it while the template runs.

A tokenizer without a chat template is that of a base model: there a record's `plain` text stands in for the chat where
it has one, and is raw text; other chats are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.files import visible
from alphatoken_curate.rows.shapes import Messages, Prompt, PromptCompletion
from alphatoken_curate.wording import count

Tokenizer = Any
"""A tokenizer of transformers; not imported here, since that takes seconds."""

# noncharacters of Unicode, kept free for use inside a program
_OPEN, _CLOSE, MARK = "\ufdd0", "\ufdd1", "\ufdd2"
_ESCAPED_MARK = r"\ufdd2"  # as a template writes it that turns text to ASCII
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
# what a template can raise that is written for other rows, or in bad faith; it runs in a sandbox
_TEMPLATE_FAULTS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
# a block tag for a block tag, so that jinja trims white space around both alike
_MACRO = "{% macro __response() %}" + _OPEN + "{{ caller() }}" + _CLOSE + "{% endmacro %}\n"


class RenderedText(NamedTuple):
    """Text and the character spans [start, end) that respond; `marked`: a `MARK` hides spelled specials.

    `bos`: a BOS goes in front where the tokenizer adds one. `eos`: an EOS that responds goes behind.
    """

    text: str
    spans: list[tuple[int, int]]
    marked: bool = False
    bos: bool = False
    eos: bool = False


def joined(record: PromptCompletion) -> RenderedText:
    """Prompt and completion as raw text."""
    text = record.prompt + record.completion
    return RenderedText(text=text, spans=[(len(record.prompt), len(text))], bos=True, eos=True)


def unanswered(text: str) -> RenderedText:
    """Raw text of which nothing responds."""
    return RenderedText(text=text, spans=[], bos=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Specials:
    """The special tokens of a tokenizer."""

    pattern: re.Pattern[str]
    """Finds any of them in text, the longest first."""

    ids: dict[str, int]
    """Token id by text."""

    greedy: dict[str, tuple[bool, bool]]
    """Those that take in the white space on their (left, right)."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Specials:
        """Collect them."""
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = {token.content for token in added} | set(tokenizer.all_special_tokens)
        ordered = sorted(names - {""}, key=lambda name: (-len(name), name))
        return cls(
            pattern=re.compile("|".join(map(re.escape, ordered)) or r"(?!)"),
            ids={name: int(tokenizer.convert_tokens_to_ids(name)) for name in ordered},
            greedy={t.content: (t.lstrip, t.rstrip) for t in added if t.lstrip or t.rstrip},
        )


class ChatTemplate:
    """A tokenizer's chat template; `last_only`: of each chat only the last assistant turn responds."""

    def __init__(self, tokenizer: Tokenizer, specials: Specials, *, last_only: bool) -> None:
        self._tokenizer = tokenizer
        self._specials = specials.pattern
        self._last_only = last_only

    def render(self, record: Messages) -> RenderedText:
        """The chat as text with its response spans. Raises RowFault."""
        if not self._tokenizer.chat_template:
            if record.plain is None:
                raise _no_template()
            return joined(record.plain)
        messages, tools, marked = self._hidden(record.messages, record.tools)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        respond = [i for i in answers if i >= record.respond_from][-1 if self._last_only else 0 :]
        template = self._tokenizer.get_chat_template(tools=tools)
        if _GENERATION.search(template):
            text, spans = self._spans_by_marks(template, messages, tools, answers, respond)
        else:
            text, spans = self._spans_by_prefix(messages, tools, respond)
        return _rendered(text, spans, marked)

    def render_prompt(self, record: Prompt) -> RenderedText:
        """The chat as text up to where the answer would begin; nothing responds. Raises RowFault."""
        if not self._tokenizer.chat_template:
            if record.plain is None:
                raise _no_template()
            return unanswered(record.plain)
        messages, tools, marked = self._hidden(record.messages, record.tools)
        return _rendered(self._apply(messages, tools, prompt=True), [], marked)

    def _hidden(self, messages: list[Any], tools: list[Any] | None) -> tuple[list[Any], list[Any] | None, bool]:
        """Messages and tools with the special tokens hidden that they spell, and whether there is one."""
        texts = [*_strings([_but_role(message) for message in messages]), *_strings(tools)]
        if any(mark in text for text in texts for mark in (_OPEN, _CLOSE, MARK)):
            raise RowFault("noncharacter", "the text has one of U+FDD0 to U+FDD2, which are no characters; remove it")
        if any(self._specials.search(text) for text in texts):
            hidden = [{"role": message["role"], **self._marked(_but_role(message))} for message in messages]
            return hidden, self._marked(tools), True
        return messages, tools, False

    def _marked(self, value: Any) -> Any:
        """`value` with `MARK` behind the first character of each special token that its texts spell."""
        if isinstance(value, str):
            return self._specials.sub(lambda found: found[0][0] + MARK + found[0][1:], value)
        if isinstance(value, list):
            return [self._marked(item) for item in value]
        if isinstance(value, dict):
            return {self._marked(key): self._marked(item) for key, item in value.items()}
        return value

    def _apply(self, messages: list[Any], tools: Any, *, prompt: bool = False, template: str | None = None) -> str:
        import jinja2

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=prompt
                )
            )
        except (*_TEMPLATE_FAULTS, jinja2.TemplateError) as error:
            raise RowFault("template_error", f"the chat template fails: {visible(str(error))}") from error

    def _spans_by_marks(
        self, template: str, messages: list[Any], tools: Any, answers: list[int], respond: list[int]
    ) -> tuple[str, list[tuple[int, int]]]:
        tagged = _MACRO + _GENERATION.sub(
            lambda tag: f"{{%{tag[1]} {'endcall' if tag[2] else 'call __response()'} {tag[3]}%}}", template
        )
        text, spans = "", []
        for piece in re.split(f"({_OPEN}[^{_CLOSE}]*{_CLOSE})", self._apply(messages, tools, template=tagged)):
            start = len(text)
            text += piece.strip(_OPEN + _CLOSE)
            if piece.startswith(_OPEN):
                spans.append((start, len(text)))
        if text != self._apply(messages, tools):
            raise _not_splittable("it writes other text when its generation blocks are marked")
        if len(spans) == len(answers):
            spans = [span for i, span in zip(answers, spans, strict=True) if i in respond]
            for i, (start, end) in zip(respond, spans, strict=True):
                _check_kept(messages[i], text[start:end])
        elif respond != answers or not spans:
            raise _not_splittable(f"it marks {len(spans)} of {count(len(answers), 'answer')}")
        return text, spans

    def _spans_by_prefix(
        self, messages: list[Any], tools: Any, respond: list[int]
    ) -> tuple[str, list[tuple[int, int]]]:
        text = self._apply(messages, tools)
        spans = []
        for i in respond:
            if i == 0:
                raise _not_splittable("no message stands before the first answer")
            head = self._apply(messages[:i], tools, prompt=True)
            if not text.startswith(head):
                raise _not_splittable(f"the messages before answer {i} are written otherwise once the answer follows")
            through = text if i == len(messages) - 1 else self._apply(messages[: i + 1], tools)
            shared = len(through) if text.startswith(through) else _shared(text, through)
            turn = text[len(head) : shared]
            before = turn[: max(0, turn.find(_answer(messages[i])))]
            if before.strip() and head == self._apply(messages[:i], tools):
                raise _not_splittable(
                    f"it has no generation prompt and writes {visible(before, 40)!r} before an answer"
                )
            length = self._turn_length(messages[i], turn, is_whole=shared == len(through))
            spans.append((len(head), len(head) + length))
        return text, spans

    def _turn_length(self, message: dict[str, Any], turn: str, *, is_whole: bool) -> int:
        """Characters of the turn up to its end-of-turn token, that included. Raises RowFault."""
        answer = _answer(message)
        start = turn.find(answer)
        ends = [found.end() for found in self._specials.finditer(turn)]
        if start >= 0 and answer and not message.get("tool_calls"):
            ends = [end for end in ends if end > start + len(answer)][:1]
        if not ends and not is_whole:
            raise _not_splittable("it writes an answer otherwise once messages follow")
        length = ends[-1] if ends else len(turn)
        _check_kept(message, turn[:length])
        return length


def _rendered(text: str, spans: list[tuple[int, int]], marked: bool) -> RenderedText:
    if marked and _ESCAPED_MARK in text:
        raise _not_splittable("it escapes the characters of text that spells a special token")
    return RenderedText(text=text, spans=spans, marked=marked)


def _answer(message: dict[str, Any]) -> str:
    return str(message.get("content") or "").strip()


def _shared(one: str, other: str) -> int:
    """Length of the longest prefix that both have."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


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
        yield from value
        yield from (text for item in value.values() for text in _strings(item))


def _no_template() -> RowFault:
    return RowFault(
        "no_chat_template",
        "the tokenizer has no chat template; use a model that has one, or rows with prompt + completion as text,"
        " or input_ids + labels",
    )


def _not_splittable(why: str) -> RowFault:
    return RowFault(
        "template_not_splittable",
        f"the chat template does not show where the answer is: {why}; try --turns last, or input_ids + labels rows",
    )


def _check_kept(message: dict[str, Any], turn: str) -> None:
    """Raise RowFault where the template left out part of the answer; white space may differ."""
    if "".join(_answer(message).split()) not in "".join(turn.split()):
        raise _not_splittable("it leaves out or rewrites part of an answer")
