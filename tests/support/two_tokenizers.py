"""Two tiny models whose tokenizers give other tokens for the same text, and a run of text that one of them scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model
from tiny_files import quiet, write_jsonl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from alphatoken_curate import ScoreConfig, score

TEXTS = {
    "english": ["the rain in spain stays mainly in the plain", "what goes up must come down again and again"],
    "numbers": ["1 22 333 4444 55555 666666", "3 = 1 + 2; 7 = 3 + 4; 11 = 5 + 6", "naïve café £9 €10"],
}


def byte_level(texts: Sequence[str], size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def save_model(folder: Path, tokenizer: Any) -> Path:
    """A tiny model with embeddings for a tokenizer and some more, as models are padded."""
    with quiet():
        tiny_model("llama", dtype=torch.float32, vocab_size=320).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def padded(tokenizer: Any) -> Any:
    """The same tokenizer with a pad token, as trainers add one."""
    tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", special=True)})
    return tokenizer


def load(folder: Path) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def text_run(folder: Path, model: Path, count: int = 12) -> Path:
    """A run of text, scored by the model."""
    words = " ".join(text for texts in TEXTS.values() for text in texts).split()
    rows = [
        {"prompt": f"{words[i]} {words[-i]}", "completion": f" {words[2 * i]} {words[i + 3]}"} for i in range(count)
    ]
    data = write_jsonl(folder / "rows.jsonl", rows)
    return score(ScoreConfig(data=data, model=str(model), layers=1), folder / "run").run
