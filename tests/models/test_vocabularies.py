"""What a `tokenizer.json` may not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chats import CHATML
from templates import tokenizer_of

from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.vocabularies import refuse_endless, refuse_odd


def written(folder: Path, change: Any = None) -> Any:
    tokenizer = tokenizer_of(CHATML)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text())
    if change is not None:
        change(told)
    path.write_text(json.dumps(told))
    return tokenizer


def test_what_is_read_as_it_says_is_left(tmp_path: Path) -> None:
    refuse_odd("x", tmp_path, written(tmp_path))
    refuse_endless("x", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    refuse_odd("x", tmp_path, None)
    refuse_endless("x", tmp_path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda told: told["added_tokens"][0].update(id=7), "has the id 7, another token's or none's"),
        (lambda told: told["model"]["vocab"].update(zz=5), "two tokens have the id 5"),
        (lambda told: told["model"].update(dropout=0.1), r"at random \(dropout 0\.1\)"),
    ],
)
def test_what_would_be_read_otherwise_is_refused(change: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=why):
        refuse_odd("x", tmp_path, written(tmp_path, change))


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "decoder"])
def test_what_swells_is_refused(part: str, tmp_path: Path) -> None:
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 20}
    for rules, refused in (([rule], False), ([rule, rule], True)):
        written(tmp_path, lambda told, rules=rules: told.update({part: {"type": "Sequence", "all": rules}}))
        if refused:
            with pytest.raises(ModelError, match=f"its {part} make 400 characters of one"):
                refuse_endless("x", tmp_path)
        else:
            refuse_endless("x", tmp_path)
