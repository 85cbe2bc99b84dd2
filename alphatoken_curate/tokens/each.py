"""One answer of a chat as a sequence of its own: what stood before it when it was written, itself, and its stop.

The chat is rendered as far as the answer, so that it is written as the newest answer is: nothing that history leaves
out of it is missing, and what is left out of the messages before it is what a model would not see either.

Some templates leave the thought that an answer holds out even there, and would not be asked to: their generation prompt
opens the thought. There the prompt, the answer as it was given and the stop that the template writes are put together.
"""

from __future__ import annotations

import re

_OPENS, _CLOSES = "<think>", "</think>"


def with_its_thought(
    text: str, span: tuple[int, int], prompt: str, answer: object, specials: re.Pattern[str]
) -> tuple[str, tuple[int, int]] | None:
    """The chat with the thought that the template left out of `answer`, and its span; None where that is not sure.

    `text` is the chat as the template has it, `span` the answer in it, up to its stop; `prompt` the messages before it
    with the generation prompt.
    """
    if not isinstance(answer, str) or _CLOSES not in answer:
        return None
    said = answer.rpartition(_CLOSES)[2].strip()
    body, closing = _parted(text[: span[1]], specials)
    if not closing or not body.endswith(said) or _CLOSES in body[span[0] :]:  # it writes thoughts in its own way
        return None
    rest = answer.strip()
    if prompt.rstrip().endswith(_OPENS):
        rest = rest.removeprefix(_OPENS)
        rest = rest.lstrip() if prompt[-1].isspace() else rest
    whole = prompt + rest + closing
    return whole, (len(prompt), len(whole))


def _parted(text: str, specials: re.Pattern[str]) -> tuple[str, str]:
    """The text before the special tokens that it ends with, and those, with the white space before them."""
    start = len(text)
    for found in reversed(list(specials.finditer(text))):
        if found.end() != start:
            break
        start = found.start()
    body = text[:start].rstrip() if start < len(text) else text
    return body, text[len(body) :]
