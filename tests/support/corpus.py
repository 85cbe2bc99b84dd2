"""The inputs that once failed, kept in tests/corpus with what must come of each, and the tiny models that read them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from chats import CHATML
from templates import tokenizer_of
from tiny import tiny_model
from tiny_files import perturbed, quiet

from alphatoken_curate.wording import count

CORPUS = Path(__file__).parents[1] / "corpus"
TABLE = CORPUS / "expected.yaml"
PAGE = CORPUS / "README.md"

_STOPS = ("<|im_end|>", "<|user|>", "<|observation|>")
"""What ends an answer of the models: that of the template they have, and what GLM stops at."""


@dataclass(frozen=True)
class Expected:
    """Of a file: what it `showed`, the `exit` code, words that must be said, rows read, the answers of each sequence.

    `flags`: that it is read with; names of files in them are of the corpus.
    """

    name: str
    showed: str
    exit: int
    says: str = ""
    rows: int = 0
    flags: tuple[str, ...] = ()
    answers: tuple[tuple[str, ...], ...] | None = None

    @property
    def path(self) -> Path:
        return CORPUS / self.name


def expected() -> dict[str, Expected]:
    """By the name of the file below the corpus."""
    found = {}
    for name, about in yaml.safe_load(TABLE.read_text(encoding="utf-8")).items():
        words = about.pop("with", "").split()
        flags = tuple(str(CORPUS / word) if word.endswith(".jinja") else word for word in words)
        answers = about.pop("answers", None)
        told = None if answers is None else tuple(map(tuple, answers))
        found[name] = Expected(name=name, flags=flags, answers=told, **about)
    return found


def named(folder: str) -> list[str]:
    """Those of a folder of the corpus."""
    return [name for name in expected() if name.startswith(f"{folder}/")]


def corpus_tokenizer() -> Any:
    """A token for each byte and for each control token of the corpus, with the template of ChatML."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(CORPUS.glob("templates/*"))]
    roles = "<|im_start|><|system|><|developer|><|user|><|assistant|><|tool|><|observation|><|sep|><|stop|>"
    tokenizer = tokenizer_of("".join([CHATML, roles, "<think></think><tool_call></tool_call>", *texts]))
    tokenizer.chat_template = CHATML
    return tokenizer


def save_corpus_models(folder: Path, names: tuple[str, ...] = ("base", "tuned")) -> dict[str, str]:
    """Folders of tiny models with that tokenizer: the first, and others after a step of their own from it."""
    tokenizer, made = corpus_tokenizer(), {}
    stops = tokenizer.convert_tokens_to_ids(list(_STOPS))
    with quiet():
        for step, name in enumerate(names):
            model = tiny_model("llama", dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=2048)
            (perturbed(model, seed=step) if step else model).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
            (folder / name / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
            made[name] = str(folder / name)
    return made


def table() -> str:
    """The table of README.md: each file, what it showed and what must happen."""
    lines = ["| file | what it showed | what must happen |", "|---|---|---|"]
    for one in expected().values():
        said = f": `{one.says}`" if one.says else f", {count(one.rows, 'row')}" if one.rows else ""
        with_flags = f" by `{' '.join(_short(word) for word in one.flags)}`" if one.flags else ""
        answers = "" if one.answers is None else "; what responds is in `expected.yaml`"
        lines.append(_escaped(f"| `{one.name}` | {one.showed} | exit {one.exit}{with_flags}{said}{answers} |"))
    return "\n".join(lines) + "\n"


def _short(word: str) -> str:
    return Path(word).relative_to(CORPUS).as_posix() if word.startswith(str(CORPUS)) else word


def _escaped(line: str) -> str:
    return line.replace("||", "\\|\\|").replace("<|", "<\\|").replace("|>", "\\|>")
