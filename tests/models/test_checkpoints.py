from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_adapters import logits, lora, save_adapter, train
from tiny_files import perturbed, quiet
from transformers import AutoModelForCausalLM, TrainerCallback

from alphatoken_curate import ModelError
from alphatoken_curate.models.checkpoints import Watcher, find_checkpoints, is_complete, signature
from alphatoken_curate.models.load import ModelSource, _digest_once, digest_files, find_model, load_model, model_digest

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def base(models: dict[str, str]) -> ModelSource:
    return find_model(models["base"])


@pytest.fixture
def whole(models: dict[str, str], tmp_path: Path) -> Path:
    """A model folder that a test may change."""
    return Path(shutil.copytree(models["tuned"], tmp_path / "whole"))


@pytest.fixture(scope="module")
def sharded(folder: Path) -> Path:
    with quiet():
        tiny_model("llama", dtype=torch.float32).save_pretrained(folder / "sharded", max_shard_size="10KB")
    return folder / "sharded"


@pytest.fixture
def adapter(base: ModelSource, tmp_path: Path) -> Path:
    pytest.importorskip("peft")
    save_adapter(base.folder, tmp_path / "adapter")
    return tmp_path / "adapter"


def load(source: ModelSource) -> Any:
    return load_model(source, dtype=torch.float32, device=torch.device("cpu"))


def later() -> None:
    """What is written now is newer than what was: file times have a grain of some milliseconds."""
    time.sleep(0.03)


def names(found: Any) -> list[str]:
    return [checkpoint.name for checkpoint in found]


# --- finding


def test_a_model_and_an_adapter_are_one_checkpoint_each(base: ModelSource, whole: Path, adapter: Path) -> None:
    for path, source in ((whole, find_model(str(whole))), (adapter, find_model(str(adapter), base=base))):
        (found,) = find_checkpoints(path, base=base)
        assert (found.name, found.step, found.source) == (path.name, None, source)
    (whole / "model.gguf").write_bytes(b"GGUF")
    (found,) = find_checkpoints(str(whole / "model.gguf"), base=base)
    assert (found.name, found.step, found.source.gguf) == ("model", None, "model.gguf")


def test_checkpoints_come_in_the_order_of_their_steps(base: ModelSource, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("checkpoint-1000", "checkpoint-200", "checkpoint-30"):
        shutil.copytree(whole, out / name)
    for name in ("checkpoint-best", "tmp-checkpoint-7", "checkpoint-5-old", "runs"):
        (out / name).mkdir()
    (out / "checkpoint-4").write_text("a file")
    found = find_checkpoints(out, base=base)
    assert names(found) == ["checkpoint-30", "checkpoint-200", "checkpoint-1000"]
    assert [checkpoint.step for checkpoint in found] == [30, 200, 1000]
    (one,) = find_checkpoints(out / "checkpoint-200", base=base)
    assert (one.name, one.step) == ("checkpoint-200", 200)


def test_the_model_in_an_output_folder_counts_where_it_differs_from_the_last(
    base: ModelSource, whole: Path, models: dict[str, str], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    shutil.copytree(models["base"], out / "checkpoint-1")
    assert names(find_checkpoints(out, base=base)) == ["checkpoint-1", "out"]
    shutil.copytree(whole, out / "checkpoint-2")
    assert names(find_checkpoints(out, base=base)) == ["checkpoint-1", "checkpoint-2"]
    (out / WEIGHTS).unlink()  # what is left is the tokenizer and the config, as trainers write them at the start
    assert names(find_checkpoints(out, base=base)) == ["checkpoint-1", "checkpoint-2"]


def test_where_there_is_no_checkpoint(base: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        find_checkpoints(tmp_path / "nowhere", base=base)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ModelError, match="neither a model nor an adapter nor a checkpoint-<step>"):
        find_checkpoints(tmp_path, base=base)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*pickle"):
        find_checkpoints(tmp_path, base=base)


def test_checkpoints_that_are_half_written_are_named(base: ModelSource, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for step in (1, 2, 3):
        shutil.copytree(whole, out / f"checkpoint-{step}")
    (out / "checkpoint-1" / "config.json").unlink()
    os.truncate(out / "checkpoint-3" / WEIGHTS, 9999)
    wanted = rf"out: .*checkpoint-1: no config\.json; checkpoint-3: {WEIGHTS} has 9999 of .*whole \(.*checkpoint-2\)"
    with pytest.raises(ModelError, match=wanted):
        find_checkpoints(out, base=base)
    with pytest.raises(ModelError, match=r"out: not written to the end: checkpoint-1: no config\.json\. Wait"):
        find_checkpoints(out / "checkpoint-1", base=base)


def test_an_adapter_of_another_model_is_refused(base: ModelSource, models: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    save_adapter(models["tuned"], tmp_path / "out" / "checkpoint-1")
    with pytest.raises(ModelError, match=r"an adapter of .*tuned, not of .*base"):
        find_checkpoints(tmp_path / "out", base=base)
    shutil.copytree(models["tuned"], tmp_path / "out" / "checkpoint-2")
    watcher = Watcher(tmp_path / "out", base)
    assert watcher.ready() == [] and names(watcher.ready()) == ["checkpoint-2"]  # the others are scored all the same
    assert re.search(r"an adapter of .*tuned, not of .*base", watcher.refused["checkpoint-1"]) and not watcher.waiting


# --- whole or not


def test_a_model_and_an_adapter_are_complete(whole: Path, sharded: Path, adapter: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for path in (whole, sharded, adapter):
        assert is_complete(path) is None, path
    assert is_complete(whole / "nowhere") == "it cannot be read (No such file or directory)"


@pytest.mark.parametrize("kind", ["whole", "sharded", "adapter"])
def test_no_file_may_be_missing(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "copy"))
    needed = [p for p in path.iterdir() if p.name not in ("generation_config.json", "README.md")]
    assert len(needed) >= 2
    for file in needed:
        file.rename(tmp_path / "away")
        assert is_complete(path), file
        (tmp_path / "away").rename(file)
    assert is_complete(path) is None


@pytest.mark.parametrize("kind", ["whole", "sharded", "adapter"])
def test_no_file_may_be_cut_or_grow(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "copy"))
    checked = {"config.json", "adapter_config.json", INDEX, *(p.name for p in path.glob("*.safetensors"))}
    for file in (p for p in sorted(path.iterdir()) if p.name in checked):
        content = file.read_bytes()
        lengths = {0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 3, len(content) - 1}
        for length in lengths & set(range(len(content.strip()))):
            file.write_bytes(content[:length])
            assert file.name in (is_complete(path) or ""), (file, length)
        file.write_bytes(content + b"x")
        assert file.name in (is_complete(path) or ""), file
        file.write_bytes(content)
    assert is_complete(path) is None


def _safetensors(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (bytes(1000), "no whole header in its 1000 bytes"),  # made at its full size, not yet filled
        (b"\xff" * 1000, "no whole header"),
        (_safetensors([]), "no header of safetensors"),
        (_safetensors({"a": [0, 3]}), "no header of safetensors"),
        (_safetensors({"a": {"data_offsets": ["x", "y"]}}), "no header of safetensors"),
        (_safetensors({"a": {"data_offsets": [0]}}), "no header of safetensors"),
        (_safetensors({"__metadata__": {"format": "pt"}}), "holds no tensor"),
    ],
)
def test_what_is_no_safetensors_file(content: bytes, problem: str, whole: Path) -> None:
    (whole / WEIGHTS).write_bytes(content)
    assert f"{WEIGHTS} " in str(is_complete(whole)) and problem in str(is_complete(whole))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": ["b"]}}'])
def test_what_is_no_index(content: str, sharded: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(sharded, tmp_path / "copy"))
    (path / INDEX).write_text(content)
    assert is_complete(path) == f"{INDEX} is not an index of weights"


def test_all_shards_must_be_there(sharded: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(sharded, tmp_path / "copy"))
    shards = sorted(p.name for p in path.glob("*.safetensors"))
    (path / shards[1]).unlink()
    assert is_complete(path) == f"no {shards[1]} (1 of {len(shards)} files missing)"
    for name in shards:
        (path / name).unlink(missing_ok=True)
    save_file({"a": torch.zeros(3)}, path / "other.safetensors")
    assert is_complete(path) == f"no {shards[0]}, which {INDEX} lists"


def test_an_index_of_an_earlier_save_does_not_count(whole: Path, sharded: Path) -> None:
    """save_pretrained deletes shards it has no use for, and leaves their index."""
    shutil.copy(sharded / INDEX, whole)
    assert is_complete(whole) is None
    assert load(find_model(str(whole))) is not None


@pytest.mark.parametrize("name", ["x.tmp", ".tmpAb3x", "model.safetensors.incomplete"])
def test_files_that_are_being_written(name: str, whole: Path) -> None:
    (whole / name).write_text("")
    assert is_complete(whole) == f"{name} is being written"
    (whole / "trainer_state.json").write_text("{}")  # after which the file was left by a save that was killed
    assert is_complete(whole) is None
    later()
    (whole / name).write_text("more")
    assert is_complete(whole) == f"{name} is being written"


def test_a_folder_that_is_being_written(whole: Path, tmp_path: Path) -> None:
    whole.rename(tmp_path / "tmp-checkpoint-3")
    assert is_complete(tmp_path / "tmp-checkpoint-3") == "its name says that it is being written"


def test_pickled_weights_are_said_to_be_pickled(whole: Path) -> None:
    (whole / WEIGHTS).unlink()
    assert is_complete(whole) == "no *.safetensors"
    (whole / "optimizer.pt").write_text("")
    assert is_complete(whole) == "no *.safetensors"
    (whole / "pytorch_model.bin").write_text("")
    assert str(is_complete(whole)).startswith("its weights are pickled (pytorch_model.bin), and reading a pickle can")


def test_a_signature_tells_what_changed(whole: Path) -> None:
    before = signature(whole)
    (whole / "folder").mkdir()
    assert signature(whole) == before and WEIGHTS in [name for name, _, _ in before]
    content = (whole / WEIGHTS).read_bytes()
    (whole / WEIGHTS).write_bytes(content[::-1])
    os.utime(whole / WEIGHTS, ns=(0, 0))
    rewritten = signature(whole)
    (whole / WEIGHTS).rename(whole / "other")
    assert len({before, rewritten, signature(whole)}) == 3


# --- watching


def test_a_folder_that_is_not_there_yet(base: ModelSource, whole: Path, tmp_path: Path) -> None:
    watcher = Watcher(tmp_path / "out", base)
    assert watcher.ready() == []
    shutil.copytree(whole, tmp_path / "out" / "checkpoint-5")
    assert watcher.ready() == [] and watcher.waiting == {"checkpoint-5": "its files may still change"}
    assert names(watcher.ready()) == ["checkpoint-5"] and watcher.waiting == {}
    shutil.rmtree(tmp_path / "out" / "checkpoint-5")
    assert watcher.ready() == [] and watcher.waiting == {}
    shutil.rmtree(tmp_path / "out")
    assert watcher.ready() == []


def test_two_looks_or_the_last_file_of_the_trainer(base: ModelSource, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out / "checkpoint-20")
    (out / "checkpoint-20" / "trainer_state.json").write_text("{}")
    shutil.copytree(whole, out / "checkpoint-3")
    watcher = Watcher(out, base)
    assert names(watcher.ready()) == ["checkpoint-20"]
    assert names(watcher.ready()) == ["checkpoint-3", "checkpoint-20"]
    (out / "checkpoint-3" / "optimizer.pt").write_text("more")
    assert names(watcher.ready()) == ["checkpoint-20"]
    assert names(watcher.ready()) == ["checkpoint-3", "checkpoint-20"]


def test_a_checkpoint_that_is_written_again(base: ModelSource, whole: Path, tmp_path: Path) -> None:
    """A training that starts over finds the last file of the one before; what it writes now is newer."""
    path = Path(shutil.copytree(whole, tmp_path / "out" / "checkpoint-1"))
    (path / "trainer_state.json").write_text("{}")
    watcher = Watcher(tmp_path / "out", base)
    assert names(watcher.ready()) == ["checkpoint-1"]
    later()
    weights = {name: weight + 1 for name, weight in load_file(path / WEIGHTS).items()}
    save_file(weights, path / WEIGHTS, metadata={"format": "pt"})
    assert watcher.ready() == []
    (path / "trainer_state.json").write_text("{ }")
    assert names(watcher.ready()) == ["checkpoint-1"]


def _needed(path: Path) -> list[str]:
    """Every file that a checkpoint's weights come from."""
    kept = ("config.json", "adapter_config.json", INDEX)
    return sorted(p.name for p in path.iterdir() if p.suffix == ".safetensors" or p.name in kept)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("kind", ["whole", "sharded", "adapter"])
@pytest.mark.parametrize("keep_times", [False, True])
def test_copied_in_any_order_it_is_never_given_half(
    kind: str, keep_times: bool, base: ModelSource, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """File by file, each at first cut in the middle, whatever the order, with a look or two after every step."""
    made = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "made"))
    for path in sorted(made.glob("model-*"))[2:]:  # two shards of many, so that all orders can be tried
        path.unlink()
    if kind == "sharded":
        two = sorted(p.name for p in made.glob("*.safetensors"))
        for i, name in enumerate(two, 1):
            (made / name).rename(made / f"model-{i:05}-of-00002.safetensors")
        (made / INDEX).write_text(json.dumps({"weight_map": {c: f"model-0000{c}-of-00002.safetensors" for c in "12"}}))
    (made / "trainer_state.json").write_text("{}")
    needed = _needed(made)
    files = [*needed, "trainer_state.json"]
    for n, order in enumerate(itertools.permutations(files)):
        out = tmp_path / f"out{n}"
        (out / "checkpoint-1").mkdir(parents=True)
        watcher = Watcher(out, base)
        done: set[str] = set()
        for name in order:
            there = out / "checkpoint-1" / name
            there.write_bytes((made / name).read_bytes()[: -(-(made / name).stat().st_size // 2)])
            looks = [watcher.ready() for _ in range(1 + n % 2)]
            assert done.issuperset(needed) or not any(looks), (order, name)
            (shutil.copy2 if keep_times else shutil.copy)(made / name, there)
            done.add(name)
            found = watcher.ready()
            assert done.issuperset(needed) or not found, (order, name)
        assert names(watcher.ready()) == ["checkpoint-1"]


def test_what_changes_during_a_look_waits_for_the_next(
    base: ModelSource, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "out" / "checkpoint-1"))
    (path / "trainer_state.json").write_text("{}")
    changes = iter([lambda: (path / "notes.txt").write_text("more"), lambda: shutil.rmtree(path)])

    def find(name: str, **options: Any) -> ModelSource:
        next(changes)()
        return find_model(name, **options)

    watcher = Watcher(tmp_path / "out", base)
    monkeypatch.setattr("alphatoken_curate.models.checkpoints.find_model", find)
    assert watcher.ready() == [] and watcher.waiting == {"checkpoint-1": "its files changed during the look"}
    assert watcher.ready() == [] and watcher.waiting == {}  # deleted while we looked


def test_what_does_not_change_is_found_once(
    whole: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def find(name: str, **options: Any) -> ModelSource:
        found.append(Path(name).name)
        return find_model(name, **options)

    monkeypatch.setattr("alphatoken_curate.models.checkpoints.find_model", find)
    shutil.copytree(adapter, tmp_path / "out" / "checkpoint-1")
    path = Path(shutil.copytree(whole, tmp_path / "out" / "checkpoint-2"))
    watcher = Watcher(tmp_path / "out", None)  # each adapter is on the base that it names
    looks = [watcher.ready() for _ in range(4)]
    assert looks[0] == [] and looks[1] == looks[2] == looks[3] and found == ["checkpoint-1", "checkpoint-2"]
    assert looks[1] == find_checkpoints(tmp_path / "out", base=None)
    del found[:]
    (path / "notes.txt").write_text("more")
    assert [names(watcher.ready()) for _ in range(2)] == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"]]
    assert found == ["checkpoint-2"]


def test_a_base_is_read_once_for_all_its_adapters(
    base: ModelSource, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To compare an adapter's base with a copy of it, both are read: once, not at every look."""
    copy = shutil.copytree(base.folder, tmp_path / "copy")
    digested: list[list[Path]] = []

    def digest(files: Any) -> str:
        digested.append(list(files))
        return digest_files(digested[-1])

    _digest_once.cache_clear()
    monkeypatch.setattr("alphatoken_curate.models.load.digest_files", digest)
    for step in (1, 2):
        shutil.copytree(adapter, tmp_path / "out" / f"checkpoint-{step}")
    watcher = Watcher(tmp_path / "out", find_model(str(copy)))
    for _ in range(3):
        found = watcher.ready()
    assert names(found) == ["checkpoint-1", "checkpoint-2"] and len(digested) == 2


# --- a real training


class _Looking(TrainerCallback):  # type: ignore[misc]
    """Looks after every save."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher
        self.seen: list[list[str]] = []

    def on_save(self, *_: Any, **__: Any) -> None:
        self.seen.append(names(self.watcher.ready()))


def _trained(base: ModelSource, out: Path, **settings: Any) -> tuple[_Looking, Any]:
    looking = _Looking(Watcher(out, base))
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    return looking, train(model, out, 3, callbacks=[looking], **settings)


def test_checkpoints_of_a_training(base: ModelSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    looking, trainer = _trained(base, out)
    assert looking.seen == [[f"checkpoint-{i}" for i in range(1, n + 1)] for n in (1, 2, 3)]
    found = find_checkpoints(out, base=base)
    assert [checkpoint.step for checkpoint in found] == [1, 2, 3]
    assert found == Watcher(out, base).ready()  # at the first look
    assert len({model_digest(checkpoint.source) for checkpoint in found}) == 3
    wanted = trainer.model.eval()
    assert (logits(load(found[-1].source)) - logits(wanted)).abs().max() < 1e-5
    trainer.save_model()
    assert [checkpoint.step for checkpoint in find_checkpoints(out, base=base)] == [1, 2, 3]
    with quiet():
        perturbed(wanted).save_pretrained(out)
    assert names(find_checkpoints(out, base=base)) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "out"]


def test_checkpoints_that_the_training_deletes(base: ModelSource, tmp_path: Path) -> None:
    looking, _ = _trained(base, tmp_path / "out", save_total_limit=1, save_only_model=True)
    assert looking.seen == [["checkpoint-1"], ["checkpoint-2"], ["checkpoint-3"]]
    assert [one.step for one in find_checkpoints(tmp_path / "out", base=base)] == [3]


def test_checkpoints_of_an_adapter_in_training(base: ModelSource, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    adapted = lora(base.folder)
    watcher = Watcher(tmp_path / "out", base)
    looking = _Looking(watcher)
    train(adapted, tmp_path / "out", 2, callbacks=[looking])
    assert looking.seen == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"]]
    found = find_checkpoints(tmp_path / "out", base=base)
    assert [(one.step, one.source.folder, one.source.adapter) for one in found] == [
        (step, base.folder, tmp_path / "out" / f"checkpoint-{step}") for step in (1, 2)
    ]
    wanted = logits(adapted.eval())
    assert (logits(load(found[1].source)) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert not torch.equal(logits(load(found[0].source)), logits(load(found[1].source)))
