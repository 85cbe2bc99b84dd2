"""Real chat templates, those that TRL and Axolotl carry, with tokenizers that have their families' control tokens."""

from __future__ import annotations

import importlib.resources
import os
import re
import zipfile
from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

_CONTROL = re.compile(
    r"<\|[^|<>\s'\"]+\|>|<｜[^｜<>\s]+｜>|</?s>|<bos>|<eos>|<(?:start|end)_of_turn>|<end_of_utterance>|<turn\|>|<\|turn>"
    r"|<\|?channel\|?>|<\|?tool_call\|?>|<\|?tool_response\|?>|</?tool_call>|</?think>|<\|\"\|>|\[gMASK\]|<sop>"
)
_ENDS = "<|im_end|> <|eot_id|> <|return|> <end_of_turn> <turn|> <|END_OF_TURN_TOKEN|> <｜end▁of▁sentence｜>"
_ENDS += " <|end|> <end_of_utterance> <|eot|> </s>"
_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")

_PLAIN = {
    "qwen": r"</?think>|</?tool_call>",
    "nemotron": r"</?think>|</?tool_call>",
    "glm": r"</?think>|</?tool_call>",
    "deepseek": r"</?think>|<｜(?!begin▁of▁sentence|end▁of▁sentence).*",
    "cohere": r"<\|(?!END_OF_TURN_TOKEN).*",
    "command": r"<\|(?!END_OF_TURN_TOKEN).*",
    "smolvlm": r"</?think>",
}
"""By family: its added tokens that are not special, so that any text spells them."""

_GREEDY = {"phi3": r"<\|(end|user|assistant|system)\|>", "phi_3": r"<\|(end|user|assistant|system)\|>"}
"""By family: its special tokens that take in the white space behind them."""

AXOLOTL = "AXOLOTL_WHEEL"
"""The environment variable that names the wheel: `pip download --no-deps -d DIR axolotl`."""


@cache
def templates() -> dict[str, str]:
    """TRL's by name; `_training` forms mark their answers."""
    trl = pytest.importorskip("trl")
    folder = importlib.resources.files(trl) / "chat_templates"
    found = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    return {name.removesuffix(".jinja"): text for name, text in found.items() if name.endswith(".jinja")}


@cache
def axolotl_templates() -> dict[str, str]:
    """Axolotl's by name; none where its wheel is not at hand."""
    if AXOLOTL not in os.environ:
        return {}
    with zipfile.ZipFile(os.environ[AXOLOTL]) as wheel:
        named = {name: name.rpartition("/")[2] for name in wheel.namelist() if name.endswith(".jinja")}
        return {f"axolotl {short[:-6]}": wheel.read(name).decode() for name, short in sorted(named.items())}


def unmarked(template: str) -> str:
    """A training form without its marks; white space is trimmed as before."""
    return _TAG.sub(lambda tag: "{%" + tag[1] + (" endif " if tag[2] else " if true ") + tag[3] + "%}", template)


@cache
def family_tokenizer(name: str, marks: bool = True) -> Any:
    """Of a template by its name; its family's control tokens are as that has them."""
    template = {**templates(), **axolotl_templates()}[name]
    return tokenizer_of(template if marks else unmarked(template), name.removeprefix("axolotl "))


def tokenizer_of(template: str, family: str = "") -> Any:
    """One token for each byte and each control token that a template names."""
    names = sorted({*_CONTROL.findall(template), "<s>", "</s>"})
    made = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    tokenizer.add_tokens([_added(control, family) for control in names])
    tokenizer.bos_token, tokenizer.eos_token = "<s>", next(name for name in _ENDS.split() if name in names)
    tokenizer.chat_template = template
    return tokenizer


def _added(name: str, family: str) -> AddedToken:
    plain, greedy = (
        any(family.startswith(start) and re.fullmatch(pattern, name) for start, pattern in table.items())
        for table in (_PLAIN, _GREEDY)
    )
    return AddedToken(name, special=not plain, normalized=False, rstrip=greedy)
