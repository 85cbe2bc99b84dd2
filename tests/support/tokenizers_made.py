"""Tokenizers of several kinds, trained on a few lines, with the control tokens of ChatML."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from chats import CHATML
from kinds import KINDS
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_LINES = [str(m.get("content") or "") for messages in KINDS.values() for m in messages] * 3
_LINES += [
    "developer: tool: system: assistant: First thing. user: One? [INST] Two? [/INST] It is this. \n\n<think>\nhm\n"
] * 20
_CONTROLS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def _byte_level(use_regex: bool) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        _LINES, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def _bytes() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _pieces(made: Tokenizer) -> Tokenizer:
    """BPE of pieces that has each byte, too, as Llama's."""
    made.train_from_iterator(_LINES, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    state = json.loads(made.to_str())["model"]
    vocab = {"<unk>": 0} | {name: i + 1 for i, name in enumerate(_bytes())}
    vocab |= {name: len(vocab) + i for i, name in enumerate(name for name in state["vocab"] if name not in vocab)}
    made.model = models.BPE(
        vocab=vocab,
        merges=[tuple(pair) for pair in state["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    return made


def _metaspace(scheme: str) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made = _pieces(made)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if scheme != "never" else [])
    )
    return made


def _legacy() -> Tokenizer:
    """Llama 2's."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made = _pieces(made)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def _unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    made.train_from_iterator(_LINES, trainer)
    return made


def _word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    made.train_from_iterator(_LINES, trainer)
    return made


def _words() -> Tokenizer:
    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(_LINES, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))
    return made


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": lambda: _byte_level(True),
    "byte-level BPE across words": lambda: _byte_level(False),
    "Metaspace, first": lambda: _metaspace("first"),
    "Metaspace, always": lambda: _metaspace("always"),
    "Metaspace, never": lambda: _metaspace("never"),
    "Prepend and Replace": _legacy,
    "Unigram": _unigram,
    "WordPiece": _word_piece,
    "words": _words,
}

LOSSY = {"WordPiece", "words"}
"""They do not give back the text: rows of theirs are refused."""


@cache
def made_tokenizer(kind: str) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=MAKERS[kind]())
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in _CONTROLS])
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = "<s>", "<|im_end|>", CHATML
    return tokenizer
