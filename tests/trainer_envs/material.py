"""What every trainer is given: a tiny model, its reference and tokenizer, rows, runs of them, and exports of these.

Nothing is downloaded. Files are written so that transformers 4.56 to 5.23 read them alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLE = Path(__file__).parents[2] / "sample_data"
ROWS, LONGEST = 8, 240
"""Rows of a run, and characters of the longest answer; one step of every trainer takes all rows."""
BINARY, SOFT = 0, 1
"""Numbers of the masks of a run: weights of 0 and 1, and by rank."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAD, BEGIN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPREAD = 0.25
"""Of random weights: wide enough that the losses of tokens differ, so that a shifted mask is seen in their mean."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """Folders and files. `runs` has `sft` and `preference`, each with the masks BINARY and SOFT."""

    model: Path
    reference: Path
    runs: dict[str, Path]
    folder: Path

    def export(self, trainer: str, kind: str, mask: int, *flags: str) -> Path:
        """`alphatoken-curate export` of a mask of a run, made once; returns the folder."""
        name = "-".join([trainer, kind, str(mask), *(flag.strip("-") for flag in flags)])
        out = self.folder / "exports" / name
        if not out.exists():
            out.parent.mkdir(exist_ok=True)
            curate("export", self.runs[kind], "--for", trainer, "--mask", mask, *flags, "-o", out)
        return out


def make(folder: Path) -> Material:
    """All of it below `folder`; what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Material(
        model=folder / "base",
        reference=folder / "reference",
        runs={kind: folder / f"{kind}.alphatoken" for kind in ("sft", "preference")},
        folder=folder,
    )
    if not made.model.exists():
        save_model(made.reference, seed=1)
        save_model(made.model, seed=1, step=0.02)
    for kind, run in made.runs.items():
        data = folder / f"{kind}.jsonl"
        data.write_text("\n".join(short_rows(kind)) + "\n", encoding="utf-8")
        score(made, data, run)
        curate("mask", run, "--weights", "rank", "--keep", "0.6")
    return made


def score(made: Material, data: Path, run: Path) -> None:
    """A run of these rows by the real command; an unfinished one is gone on with."""
    curate(
        "score", data, "--target", SAMPLE / "target.jsonl", "--model", made.model, "--reference", made.reference,
        "--layers", "2", "--fisher-rows", "4", "--device", "cpu", "--keep", "0.5", "-o", run,
    )  # fmt: skip


def curate(*arguments: object) -> None:
    """`alphatoken-curate ARGUMENTS` of the environment that runs this; raises where it fails."""
    command = [str(Path(sys.executable).with_name("alphatoken-curate")), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def short_rows(kind: str) -> list[str]:
    """Lines of the sample data whose answers are short."""
    lines = (SAMPLE / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if _length(json.loads(line)) < LONGEST][:ROWS]


def _length(row: dict[str, Any]) -> int:
    texts = [message["content"] for message in row.get("messages", [])]
    parts = [row.get(name, "") for name in ("prompt", "chosen", "rejected")]
    return len("".join(texts)) + (max(map(len, parts)) if all(isinstance(part, str) for part in parts) else LONGEST)


def tokenizer() -> Any:
    """Byte-level BPE of some hundred tokens, learnt from the sample data; words of the chat template are special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [(SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("sft", "preference")]
    made.train_from_iterator(texts, trainer)
    return made


def save_model(folder: Path, *, seed: int, step: float = 0.0) -> None:
    """A Qwen2 of two blocks with random weights, and a random step from them; float32 safetensors."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    words = tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": words.get_vocab_size(),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": SPREAD,
        "tie_word_embeddings": False,
        "pad_token_id": words.token_to_id(PAD),
        "bos_token_id": None,
        "eos_token_id": words.token_to_id(END),
    }
    torch.manual_seed(seed)
    weights = Qwen2ForCausalLM(Qwen2Config(**shape)).state_dict()
    noise = torch.Generator().manual_seed(seed + 100)
    stepped = {name: w + step * torch.randn(w.shape, generator=noise) for name, w in weights.items()}
    folder.mkdir()
    save_file(stepped, folder / "model.safetensors", metadata={"format": "pt"})
    ends = {name: shape[name] for name in ("eos_token_id", "pad_token_id")}
    named = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "float32", "dtype": "float32"}
    _write(folder / "config.json", named | {"rope_theta": 10000.0, "use_cache": False} | shape)
    _write(folder / "generation_config.json", ends)
    words.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "chat_template": TEMPLATE,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    })  # fmt: skip


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
