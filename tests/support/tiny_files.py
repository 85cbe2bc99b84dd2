"""Tiny models and rows on disk, and the command line run inside this process."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tiny import VOCABULARY, make_row, tiny_model
from transformers.utils import logging

from alphatoken_curate.cli.main import main
from alphatoken_curate.runs.atomic import LOCK
from alphatoken_curate.tokens.tokenise import TokenRow

NAN_TOKEN = 47
"""The token whose embedding is NaN in the model `broken`; no probe of a model uses it."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars."""
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def perturbed(model: Any, scale: float = 0.02, seed: int = 7) -> Any:
    """The same model after a random step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def save_models(folder: Path) -> dict[str, str]:
    """base, tuned (base after a step) and broken (base with a NaN embedding): safetensors folders without tokenizer."""
    made = {"base": tiny_model("llama", dtype=torch.float32)}
    made["tuned"] = perturbed(tiny_model("llama", dtype=torch.float32))
    made["broken"] = tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        made["broken"].get_input_embeddings().weight[NAN_TOKEN] = torch.nan
    with quiet():
        for name, model in made.items():
            model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def plain_llama() -> Any:
    """A tiny Llama without biases, which GGUF does not hold."""
    return tiny_model("llama", dtype=torch.float32, attention_bias=False, mlp_bias=False)


def save_gguf(model: Any, path: Path, more: Callable[[Any], None] = lambda writer: None) -> str:
    """A tiny Llama as float32 GGUF, with a byte-level tokenizer of single characters. `more` adds to it."""
    import gguf

    config, weights = model.config, {name: w.numpy() for name, w in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    characters = [chr(0x21 + i) for i in range(VOCABULARY - 5)]
    writer.add_token_list(["<pad>", "<s>", "</s>", *characters, '!"', '"#'])
    writer.add_token_types([3, 3, 3] + [1] * (VOCABULARY - 3))
    writer.add_token_merges(['! "', '" #'])  # one alone is no list to readers before 5.20
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    for block in range(config.num_hidden_layers):
        for name, short in _GGUF_NAMES.items():
            weight = weights[f"model.layers.{block}.{name}.weight"]
            if short in heads:  # GGUF keeps the two halves of a rotary pair side by side
                split = weight.reshape(heads[short], 2, -1, weight.shape[1])
                weight = np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))
            writer.add_tensor(f"blk.{block}.{short}.weight", weight)
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def configured(model: Path, **changes: Any) -> Path:
    """The folder of a model, once its config.json says other things."""
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return model


def pair_records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pre-tokenised pairs that share a prompt."""
    draw = np.random.default_rng(seed)
    records = []
    for _ in range(count):
        prompt = draw.integers(3, 40, int(draw.integers(2, 14))).tolist()
        record = {}
        for name in ("chosen", "rejected"):
            answer = draw.integers(3, 40, int(draw.integers(1, 7))).tolist()
            record |= {f"{name}_input_ids": prompt + answer, f"{name}_labels": [-100] * len(prompt) + answer}
        records.append(record)
    return records


def token_records(count: int, seed: int = 0, longest: int = 20) -> list[dict[str, Any]]:
    """Pre-tokenised rows of 4 to `longest` tokens; none has NAN_TOKEN."""
    draw = np.random.default_rng(seed)
    records = []
    for i in range(count):
        length = int(draw.integers(4, longest + 1))
        first = int(draw.integers(1, length - 1))
        ids = draw.integers(3, NAN_TOKEN, length).tolist()
        records.append({"id": f"r{i}", "input_ids": ids, "labels": [-100] * first + ids[first:]})
    return records


def rows_of(records: Sequence[dict[str, Any]]) -> list[TokenRow]:
    """The rows of token records, by hand."""
    made = []
    for i, record in enumerate(records):
        respond = [t for t, label in enumerate(record["labels"]) if label != -100]
        made.append(make_row(i, record["input_ids"], [(t, t + 1) for t in respond]))
    return made


def ended_records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same, each answer with token 2 behind it, at which the tiny models stop."""
    both = ("input_ids", "labels")
    return [{**one, **{name: [*one[name], 2] for name in both}} for one in token_records(count, seed)]


def write_jsonl(path: Path, records: Sequence[Any]) -> str:
    """JSONL; strings are written as they are."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for those that are locked."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def moments(folder: Path) -> dict[str, int]:
    """When every file and folder was last changed, in ns."""
    return {str(path): path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def command(*arguments: object) -> Ended:
    """`alphatoken-curate ARGUMENTS`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    before, hook = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}, sys.unraisablehook
    argv = ["alphatoken-curate", *map(str, arguments)]
    try:
        with (
            mock.patch.object(sys, "argv", argv),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        return Ended(code, out.getvalue(), err.getvalue())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


class Notes:
    """A progress listener that remembers."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.done: dict[str, int] = {}

    def stage(self, name: str, tokens: int) -> None:
        self.stages.append((name, tokens))
        self.done[name] = 0

    def advance(self, tokens: int) -> None:
        self.done[self.stages[-1][0]] += tokens

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


__all__ = [
    "NAN_TOKEN", "VOCABULARY", "Ended", "Notes", "command", "contents", "moments", "perturbed", "plain_llama", "quiet",
    "save_gguf", "save_models", "token_records", "write_jsonl",
]  # fmt: skip
