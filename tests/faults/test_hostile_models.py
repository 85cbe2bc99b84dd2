"""Files of models that say what cannot be, or other than they hold: told soon, in a line, never scored in silence."""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import CHATML, answer, chat, run, user
from hostile_files import (
    GGUFS,
    HARMLESS_TOKENIZERS,
    TOKENIZERS,
    WHOLE_TOKENIZERS,
    changed_gguf,
    changed_json,
)
from safetensors.torch import load_file, save_file
from templates import tokenizer_of
from tiny import tiny_model
from tiny_files import Ended, command, configured, plain_llama, quiet, save_gguf, token_records, write_jsonl

from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.load import find_model, load_model, load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # of readers, about what is refused next


def loaded(path: Path) -> Any:
    source = find_model(str(path))
    load_tokenizer(source)
    return load_model(source, dtype=torch.float32, device=torch.device("cpu"))


def told(path: Path) -> str:
    """What a model is refused for: one line that names it, soon, and in little memory."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(ModelError) as refused:
        loaded(path)
    assert time.thread_time() - began < 10
    if sys.platform == "linux":
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "KiB"
    said = str(refused.value)
    assert str(path) in said and "\n" not in said and len(said) < 900, said
    return said


@pytest.fixture(scope="module")
def gguf(folder: Path) -> bytes:
    pytest.importorskip("gguf")
    return Path(save_gguf(plain_llama(), folder / "good.gguf")).read_bytes()


@pytest.mark.parametrize("name", GGUFS)
def test_a_gguf_that_says_what_cannot_be_is_refused(name: str, gguf: bytes, tmp_path: Path) -> None:
    (path := tmp_path / "x.gguf").write_bytes(GGUFS[name])
    assert "fetch it again" in told(path).casefold()


@pytest.mark.parametrize("part", [0.0005, 0.003, 0.01, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_a_gguf_that_was_cut_is_refused(part: float, gguf: bytes, tmp_path: Path) -> None:
    (path := tmp_path / "x.gguf").write_bytes(gguf[: int(len(gguf) * part)])
    assert "fetch it again" in told(path)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("key", "number"),
    [
        *(("llama.block_count", number) for number in (0, 1, 3, 7, 2**31, 2**32 - 1)),
        *(("llama.embedding_length", number) for number in (0, 1, 2**31)),
        *(("llama.attention.head_count", number) for number in (0, 3, 2**31)),
        *(("llama.attention.head_count_kv", number) for number in (0, 3, 2**31)),
        *(("llama.vocab_size", number) for number in (0, 1, 2**32 - 1)),
        ("llama.feed_forward_length", 2**31),
        ("llama.rope.dimension_count", 0),
        ("tokenizer.ggml.eos_token_id", 2**32 - 1),
    ],
)
def test_a_gguf_of_other_numbers_than_its_tensors_is_refused(
    key: str, number: int, gguf: bytes, tmp_path: Path
) -> None:
    (path := tmp_path / "x.gguf").write_bytes(changed_gguf(gguf, key, number))
    told(path)


# --- safetensors


@pytest.fixture
def model(models: dict[str, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(models["base"], tmp_path / "model"))


def weighed(model: Path, **changes: Any) -> Path:
    weights = load_file(model / "model.safetensors")
    save_file(weights | changes, model / "model.safetensors", metadata={"format": "pt"})
    return model


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 1}, {"attention_bias": False}, {"mlp_bias": False}], ids=str)
def test_weights_that_a_config_leaves_out_are_not_left_out_in_silence(changes: Any, model: Path) -> None:
    assert "have no place in a LlamaForCausalLM" in told(configured(model, **changes))


@pytest.mark.parametrize(
    "name", [f"{Q}.weight_scale_inv", f"{Q}.lora_A.weight", "model.layers.0.self_attn.q_norm.weight", "lm_head.bias"]
)
def test_tensors_that_would_change_a_module_are_not_left_out_in_silence(name: str, model: Path) -> None:
    assert name in told(weighed(model, **{name: torch.ones(16)}))


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_without_their_scales_are_refused(kind: torch.dtype, model: Path) -> None:
    weight = load_file(model / "model.safetensors")[f"{Q}.weight"]
    said = told(weighed(model, **{f"{Q}.weight": weight.to(kind)}))
    assert "quantised" in said and f"{Q}.weight" in said


@pytest.mark.parametrize("layers", [5000, 2**31, 2**62])
def test_blocks_without_end_are_refused_before_they_are_made(layers: int, model: Path) -> None:
    assert f"num_hidden_layers {layers:,}" in told(configured(model, num_hidden_layers=layers))


def test_what_changes_nothing_may_be_left_out(model: Path) -> None:
    extra = {f"model.layers.4.{name.removeprefix('model.layers.0.')}": weight.clone()
             for name, weight in load_file(model / "model.safetensors").items() if ".layers.0." in name}  # fmt: skip
    more = ("model.layers.4.eh_proj.weight", "mtp.fc.weight", "vision_tower.layers.0.mlp.weight", "score.weight")
    old = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.attn.bias", "model.position_ids")
    loaded(weighed(model, **extra, **{name: torch.ones(4) for name in (*more, *old)}))


# --- tokenizers


@pytest.fixture(scope="module")
def chatty(folder: Path) -> Path:
    tokenizer = tokenizer_of(CHATML)
    with quiet():
        tiny_model("llama", dtype=torch.float32, vocab_size=len(tokenizer)).save_pretrained(folder / "chatty")
    tokenizer.save_pretrained(folder / "chatty")
    return folder / "chatty"


@pytest.fixture
def spoiled(chatty: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chatty, tmp_path / "spoiled"))


@pytest.mark.parametrize("name", [*TOKENIZERS, *WHOLE_TOKENIZERS])
def test_a_tokenizer_that_says_what_cannot_be_is_refused(name: str, spoiled: Path) -> None:
    path = spoiled / "tokenizer.json"
    whole = WHOLE_TOKENIZERS.get(name)
    path.write_bytes(changed_json(path.read_bytes(), TOKENIZERS[name]) if whole is None else whole)
    assert "tokenizer" in told(spoiled)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_tokenizer_that_was_cut_is_refused(part: float, spoiled: Path) -> None:
    path = spoiled / "tokenizer.json"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    told(spoiled)


@pytest.mark.parametrize("name", HARMLESS_TOKENIZERS)
def test_what_a_tokenizer_would_cut_or_pad_is_not(name: str, spoiled: Path) -> None:
    path, given = spoiled / "tokenizer.json", chat(user("What is it?"), answer("It is this."))
    (plain,), _ = run(load_tokenizer(find_model(str(spoiled))), given)
    path.write_bytes(changed_json(path.read_bytes(), HARMLESS_TOKENIZERS[name]))
    (row,), _ = run(load_tokenizer(find_model(str(spoiled))), given)
    assert row.input_ids.tolist() == plain.input_ids.tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": 7},
        {"eos_token": 7},
        {"eos_token": {"__type": "AddedToken", "content": 5}},
        {"added_tokens_decoder": {"x": {}}},
        {"extra_special_tokens": 5},
    ],
    ids=str,
)
def test_settings_of_a_tokenizer_that_cannot_be_are_refused(changes: dict[str, Any], spoiled: Path) -> None:
    path = spoiled / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    told(spoiled)


@pytest.mark.parametrize("template", [5, [{"name": "default", "template": 5}], {"a": "x"}], ids=str)
def test_a_chat_template_that_is_no_text_is_refused(template: Any, spoiled: Path, tmp_path: Path) -> None:
    (spoiled / "chat_template.jinja").unlink()
    path = spoiled / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [user("a"), answer("b")]}] * 3)
    ended = command("check", rows, "--model", spoiled)
    assert ended.code == 2 and "--chat-template FILE" in " ".join(ended.err.split()), ended.err


def scored(rows: str, model: Path, out: Path) -> Ended:
    return command("score", rows, "--model", model, "--layers", 1, "-o", out, "--device", "cpu")


def test_the_command_ends_with_a_line(gguf: bytes, spoiled: Path, model: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", token_records(3))
    (path := tmp_path / "x.gguf").write_bytes(changed_gguf(gguf, "llama.block_count", 1))
    (spoiled / "tokenizer.json").write_text("{}")
    for place in (path, spoiled, configured(model, num_hidden_layers=1)):
        ended = scored(rows, place, tmp_path / "run")
        assert ended.code == 2 and "Traceback" not in ended.err and str(place) in ended.err.replace("\n", ""), ended.err
