from __future__ import annotations

import importlib
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, tiny_model
from tiny_adapters import logits, lora, save_adapter
from tiny_files import command, quiet, token_records, write_jsonl
from transformers import AutoModelForCausalLM

from alphatoken_curate import ModelError
from alphatoken_curate.models.checkpoints import find_checkpoints
from alphatoken_curate.models.load import find_model, load_model

pytest.importorskip("peft")
CPU = torch.device("cpu")
GPT2 = {"target_modules": ["c_attn", "c_proj", "c_fc"]}


@pytest.fixture(scope="module")
def bases(folder: Path) -> dict[str, Path]:
    """A tiny model of each family."""
    with quiet():
        for family in ("llama", "qwen2", "gpt2"):
            tiny_model(family, dtype=torch.float32).save_pretrained(folder / family)
    return {family: folder / family for family in ("llama", "qwen2", "gpt2")}


@pytest.fixture
def adapter(bases: dict[str, Path], tmp_path: Path) -> Path:
    """The folder of an adapter that a test may change."""
    save_adapter(bases["llama"], tmp_path / "adapter")
    return tmp_path / "adapter"


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(find_model(str(path)), dtype=dtype, device=CPU)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def settings(path: Path, **changes: Any) -> None:
    """Change what adapter_config.json says."""
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- merging


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 3}}),
        ("llama", {"target_modules": "all-linear", "use_dora": True}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"bias": "all"}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("llama", {"trainable_token_indices": [3, 9]}),
        ("llama", {"init_lora_weights": "pissa"}),
        ("qwen2", {"modules_to_save": ["lm_head", "embed_tokens"]}),
        ("gpt2", {**GPT2, "fan_in_fan_out": True}),
        ("gpt2", GPT2),
        ("gpt2", {**GPT2, "use_dora": True, "fan_in_fan_out": True}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x) or "plain",
)
def test_a_merged_model_says_what_peft_says(
    family: str, changes: dict[str, Any], bases: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = save_adapter(bases[family], tmp_path / "adapter", **changes)
    capfd.readouterr()
    draws = torch.get_rng_state()
    found = load(tmp_path / "adapter")
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), draws)
    assert apart(logits(found), wanted) < 1e-5 < apart(logits(load(bases[family])), wanted)


def test_nothing_of_peft_is_left(bases: dict[str, Path], adapter: Path) -> None:
    plain, merged = load(bases["llama"]), load(adapter)
    assert type(merged) is type(plain) and vars(merged).keys() == vars(plain).keys()
    assert {n: type(m) for n, m in merged.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in merged.modules())
    assert not merged.training and not any(p.requires_grad for p in merged.parameters())


def test_a_merged_model_is_the_one_that_is_merged_and_saved(bases: dict[str, Path], tmp_path: Path) -> None:
    save_adapter(bases["llama"], tmp_path / "adapter", target_modules="all-linear", use_dora=True)
    with quiet():
        merged = lora(bases["llama"], target_modules="all-linear", use_dora=True).merge_and_unload()
        merged.save_pretrained(tmp_path / "whole")
    found, wanted = load(tmp_path / "adapter").state_dict(), load(tmp_path / "whole").state_dict()
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert apart(found[name], weight) < 1e-5, name


def test_an_adapter_is_merged_in_the_dtype_asked_for(adapter: Path) -> None:
    low, high = load(adapter, torch.bfloat16), load(adapter)
    for weight, wanted in zip(low.parameters(), high.parameters(), strict=True):
        assert weight.dtype == torch.bfloat16 and apart(weight.float(), wanted) < 0.01


# --- what cannot be merged


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("qwen2", {"target_modules": ["q_proj", "lm_head"]}, "adapts .*lm_head, whose weight another module"),
        ("llama", {"layer_replication": [[0, 3], [2, 4]]}, r"layers\.2.*whose weight another module"),
        ("llama", {"init_lora_weights": "pissa_niter_2"}, "pissa_niter_2.*path_initial_model_for_weight_conversion"),
        ("llama", {"alora_invocation_tokens": [5, 6]}, "peft cannot merge it.*aLoRA"),
    ],
    ids=["tied", "replicated", "random", "alora"],
)
def test_what_would_be_merged_wrongly_is_refused(
    family: str, changes: dict[str, Any], reason: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    save_adapter(bases[family], tmp_path / "adapter", **changes)
    with pytest.raises(ModelError, match=reason):
        load(tmp_path / "adapter")


def _rename(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name.replace("layers.0", "layers.7")] = weights.pop(name)


def _poison(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_rename, r": tensors of the adapter match nothing in its base .*\(1, the first .*layers.7"),
        (dict.pop, r": tensors of the adapter are not in its adapter_model\.safetensors \(1, "),
        (_poison, "peft cannot merge it.*NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: Any, reason: str, adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    change(weights, next(name for name in weights if "layers.0" in name and "lora_A" in name))
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=reason):
        load(adapter)


def test_weights_that_are_no_safetensors_are_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ModelError, match="peft cannot merge it"):
        load(adapter)


def test_a_base_of_another_shape_is_refused(adapter: Path, tmp_path: Path) -> None:
    with quiet():
        tiny_model("llama", dtype=torch.float32, hidden_size=32).save_pretrained(tmp_path / "wide")
    settings(adapter, base_model_name_or_path=str(tmp_path / "wide"))
    with pytest.raises(ModelError, match=r"peft cannot merge it.*size mismatch"):
        load(adapter)


def test_a_base_of_another_family_is_refused(adapter: Path, bases: dict[str, Path]) -> None:
    settings(adapter, base_model_name_or_path=str(bases["gpt2"]))
    with pytest.raises(ModelError, match=r"peft cannot merge it.*q_proj"):
        load(adapter)


def test_targets_that_are_no_pattern_are_refused(adapter: Path) -> None:
    settings(adapter, target_modules="(q_proj")
    with pytest.raises(ModelError, match="peft cannot merge it"):
        load(adapter)


def test_a_setting_that_peft_does_not_know_is_refused_where_it_says_something(adapter: Path) -> None:
    wanted = logits(load(adapter))
    settings(adapter, use_tomorrow=None, be_better=False)
    assert torch.equal(logits(load(adapter)), wanted)
    settings(adapter, use_tomorrow=0.5)
    with pytest.raises(ModelError, match=r"does not know use_tomorrow\. Run: pip install -U peft"):
        load(adapter)


def test_what_peft_warns_of_is_refused(adapter: Path) -> None:
    settings(adapter, target_parameters=["nowhere"])
    with pytest.raises(ModelError, match=r"peft warns that merging may go wrong: .*nowhere"):
        load(adapter)


def test_peft_that_is_not_installed(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install 'alphatoken-curate\[peft\]'"):
        load(adapter)


RESIZED: dict[str, dict[str, Any]] = {
    "embeddings that peft saves by itself": {},
    "modules to save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "adapted embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "an adapted head": {"target_modules": ["q_proj", "lm_head"]},
}


def resized(base: Path, folder: Path, tokens: int, **settings: Any) -> Any:
    """An adapter of a base that was given other embeddings first, as for new special tokens."""
    peft = importlib.import_module("peft")
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model.resize_token_embeddings(tokens, mean_resizing=False)
        config = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]} | settings
        adapted = peft.get_peft_model(model, peft.LoraConfig(**config))
        adapted.save_pretrained(folder)
    return adapted


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", RESIZED)
@pytest.mark.parametrize("tokens", [VOCABULARY - 3, VOCABULARY + 9])
def test_an_adapter_of_a_resized_base_is_told_before_any_row(
    kind: str, tokens: int, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapted = resized(bases["llama"], tmp_path / "adapter", tokens, **RESIZED[kind])
    wanted = (
        rf"trained on a model with {tokens} tokens, and its base .*llama has {VOCABULARY} .*resize_token_embeddings"
    )
    with pytest.raises(ModelError, match=wanted):
        find_model(str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match=wanted):
        find_checkpoints(tmp_path / "adapter", base=find_model(str(bases["llama"])))
    data = write_jsonl(tmp_path / "rows.jsonl", ["{", *token_records(2)])
    ended = command("score", data, "-o", tmp_path / "run", "--model", tmp_path / "adapter")
    assert ended.code == 2 and f"{tokens} tokens" in ended.err and "invalid_json" not in ended.err
    with quiet():
        adapted.merge_and_unload().save_pretrained(tmp_path / "merged")  # what the message says to do
    assert load(tmp_path / "merged").get_input_embeddings().num_embeddings == tokens


# --- the record


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "IA3", None])
def test_other_kinds_of_adapters_are_refused_by_name(kind: str | None, adapter: Path) -> None:
    settings(adapter, peft_type=kind)
    with pytest.raises(ModelError, match=f"peft_type is '?{kind}.*Only LoRA"):
        find_model(str(adapter))


def test_a_pickled_adapter_is_refused_unread(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        find_model(str(adapter))
    (adapter / "training_args.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        find_model(str(adapter))
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ModelError, match=r"adapter_model\.bin.*pickle"):
        find_model(str(adapter))


def test_a_pickled_adapter_beside_safetensors_is_not_read(adapter: Path) -> None:
    wanted = logits(load(adapter))
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    assert torch.equal(logits(load(adapter)), wanted)


@pytest.mark.parametrize(("content", "found"), [("{", "not JSON"), ("[]", "not a JSON object")])
def test_a_record_that_is_none(content: str, found: str, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError, match=found):
        find_model(str(adapter))


@pytest.mark.parametrize("base", [None, "", 3])
def test_a_record_that_names_no_base(base: Any, adapter: Path, bases: dict[str, Path]) -> None:
    settings(adapter, base_model_name_or_path=base)
    for given in (None, find_model(str(bases["llama"]))):
        with pytest.raises(ModelError, match="Write that model's folder or Hub id into base_model_name_or_path"):
            find_model(str(adapter), base=given)


def test_a_config_beside_an_adapter_does_not_make_it_a_model(adapter: Path, bases: dict[str, Path]) -> None:
    wanted = logits(load(adapter))
    shutil.copy(bases["llama"] / "config.json", adapter)
    assert torch.equal(logits(load(adapter)), wanted)


def test_a_model_with_an_adapter_in_its_folder_is_refused(adapter: Path, bases: dict[str, Path]) -> None:
    """transformers would load it with the adapter, unmerged."""
    with quiet():
        AutoModelForCausalLM.from_pretrained(bases["llama"]).save_pretrained(adapter)
    with pytest.raises(ModelError, match="a whole model and an adapter"):
        find_model(str(adapter))
