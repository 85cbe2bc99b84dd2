"""Real chat templates, those that TRL carries, with tokenizers for them, and chats of many kinds."""

from __future__ import annotations

import importlib.resources
import re
from functools import cache
from typing import Any

import pytest
from chats import answer, user
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

_CONTROL = re.compile(
    r"<\|[^|<>\s'\"]+\|>|<｜[^｜<>\s]+｜>|</?s>|<bos>|<eos>|<(?:start|end)_of_turn>|<end_of_utterance>|<turn\|>|<\|turn>"
    r"|<\|?channel\|?>|<\|?tool_call\|?>|</tool_call>|</?think>|<\|\"\|>|\[/?INST\]|\[gMASK\]|<sop>"
)
_ENDS = "<|im_end|> <|eot_id|> <|return|> <end_of_turn> <turn|> <|END_OF_TURN_TOKEN|> <｜end▁of▁sentence｜>"
_ENDS += " <|end|> <end_of_utterance> <|eot|> </s>"
_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "w",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


@cache
def templates() -> dict[str, str]:
    """By name; `_training` forms mark their answers."""
    trl = pytest.importorskip("trl")
    folder = importlib.resources.files(trl) / "chat_templates"
    found = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    return {name.removesuffix(".jinja"): text for name, text in found.items() if name.endswith(".jinja")}


def unmarked(template: str) -> str:
    """A training form without its marks; white space is trimmed as before."""
    return _TAG.sub(lambda tag: "{%" + tag[1] + (" endif " if tag[2] else " if true ") + tag[3] + "%}", template)


def tokenizer_of(template: str) -> Any:
    """One token for each byte and each control token that a template names."""
    names = sorted({*_CONTROL.findall(template), "<s>", "</s>"})
    made = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", next(name for name in _ENDS.split() if name in names)
    tokenizer.chat_template = template
    return tokenizer


def thinking(text: str, thought: str) -> dict[str, Any]:
    """An answer with a thought under either key that templates read."""
    return answer(text) | {"reasoning_content": thought, "thinking": thought}


def calling(text: str, arguments: Any) -> dict[str, Any]:
    """A call of the tool."""
    function = {"name": "get_weather", "arguments": arguments}
    return answer(text) | {"tool_calls": [{"type": "function", "id": "call00001", "function": function}]}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "get_weather", "content": text, "tool_call_id": "call00001"}


_OSLO = {"city": "Oslo"}
CHATS: dict[str, list[dict[str, Any]]] = {
    "single": [user("What is it?"), answer("It is this.")],
    "several": [user("One?"), answer("First thing."), user("Two?"), answer("Second thing.")],
    "system": [{"role": "system", "content": "Be kind."}, user("One?"), answer("1"), user("Two?"), answer("2")],
    "letters": [user("Pick"), answer("a"), user("n?"), answer("final")],
    "names": [user("assistant"), answer("assistant"), user("user"), answer("user")],
    "same": [user("yes"), answer("yes"), user("yes"), answer("yes")],
    "inline thoughts": [
        user("One?"),
        answer("<think>\nhm One\n</think>\n\nFirst"),
        user("Two?"),
        answer("<think>\nhm Two\n</think>\n\nSecond"),
    ],
    "echo": [user("One?"), thinking("40", "Forty makes 40, so that is it.")],
    "echoes": [user("One?"), thinking("40", "Forty makes 40."), user("Two?"), thinking("41", "Then 41 it is: 41.")],
    "call": [user("Weather?"), calling("", _OSLO), result("5 C"), answer("It is 5 C.")],
    "call as text": [user("Weather?"), calling("", '{"city": "Oslo"}'), result("5 C"), answer("It is 5 C.")],
    "call last": [user("Weather?"), calling("", _OSLO)],
    "call with words": [user("Weather?"), calling("Let me see.", _OSLO), result("5 C"), answer("5 C.")],
    "call with numbers": [user("Weather?"), calling("", {"n": 3}), result("5 C"), answer("It is 5 C.")],
    "call of nothing": [user("Weather?"), calling("", {}), result("5 C"), answer("It is 5 C.")],
    "white space": [user("One?"), answer("  padded \n"), user("Two?"), answer("\nnew line")],
    "empty": [user("One?"), answer(""), user("Two?"), answer("Yes")],
    "unanswered": [user("One?"), answer("First"), user("Two?")],
    "in a row": [user("One?"), user("Really?"), answer("First"), answer("And more"), user("Two?"), answer("Second")],
}


def tools_of(kind: str) -> list[Any] | None:
    return TOOLS if "call" in kind else None
