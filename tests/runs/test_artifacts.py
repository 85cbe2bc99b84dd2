from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from alphatoken_curate import StoredDataError
from alphatoken_curate.runs import artifacts
from alphatoken_curate.runs.artifacts import Store

TRAINING = {"model", "reference", "layers", "parameters", "kind", "beta", "tokens", "seed"}
SAMPLES = {
    *(
        "reference",
        "fisher",
        "fisher_rows",
        "fisher_prompts",
        "fisher_new_tokens",
        "fisher_stops",
        "prompt_tokens",
        "tokens",
        "seed",
    )
}
DEPENDS = {
    artifacts.TARGET: {
        *("model", "layers", "parameters", "target", "target_rows", "target_tokens", "estimator", "tokens", "seed"),
    },
    artifacts.RETENTION: {"model", "layers", "parameters", "retention", "retention_tokens"},
    artifacts.LOOKAHEAD: TRAINING | {"lookahead_rows"},
    artifacts.PRECONDITION: TRAINING | {"precondition", "precondition_rows"},
    artifacts.FISHER: SAMPLES | {"layers", "parameters"},
    artifacts.FISHER_SAMPLES: SAMPLES,
    artifacts.REFERENCE: {"reference", "layers", "parameters"},
    artifacts.REFERENCE_NLL: {"reference", "tokens", "rows_per_shard"},
}
FIELDS: dict[str, Any] = dict.fromkeys(
    {*set().union(*DEPENDS.values()), "schema_version", "dtype", "window", "stability_weight"}, 0
)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "b": torch.randn(3, 4),
        "a": torch.randn(2, 5).t(),  # not contiguous
        "empty": torch.empty(0),
        "half": torch.randn(7).bfloat16(),
        "double": torch.randn(1, dtype=torch.float64).requires_grad_(),
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(folder=tmp_path, fields=FIELDS)


@pytest.mark.parametrize("name", DEPENDS)
def test_what_is_saved_is_loaded(name: str, store: Store) -> None:
    assert store.load(name) is None and not store.has(name)
    store.save(name, tensors())
    found = store.require(name)
    assert found.keys() == tensors().keys() and store.has(name)
    for key, tensor in tensors().items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)


def test_the_same_tensors_and_fields_give_the_same_bytes(store: Store, tmp_path: Path) -> None:
    """Again and again: safetensors itself writes metadata in an order that changes."""
    written = set()
    for order in [1, -1] * 10:
        store.save(artifacts.FISHER, dict(list(tensors().items())[::order]))
        written.add(store.path(artifacts.FISHER).read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("name", DEPENDS)
def test_an_artefact_of_other_making_is_made_again(name: str, store: Store, tmp_path: Path) -> None:
    store.save(name, tensors())
    decisive = DEPENDS[name] | {"schema_version", "dtype"}
    for field in FIELDS:
        other = Store(folder=tmp_path, fields=FIELDS | {field: 1})
        assert other.has(name) == (field not in decisive), field


def test_an_artefact_that_should_be_there(store: Store) -> None:
    with pytest.raises(StoredDataError, match=r"fisher\.safetensors: missing.*made anew"):
        store.require(artifacts.FISHER)


def test_every_flipped_bit_is_seen(store: Store, tmp_path: Path) -> None:
    store.save(artifacts.FISHER, tensors())
    path = store.path(artifacts.FISHER)
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
        try:
            found = store.load(artifacts.FISHER)
        except StoredDataError:
            continue
        # A bit of the stored fields may make them other fields: then the artefact is made again, never used.
        assert found is None, place


def test_cut_and_foreign_files_are_refused(store: Store, tmp_path: Path) -> None:
    store.save(artifacts.FISHER, tensors())
    path = store.path(artifacts.FISHER)
    good = path.read_bytes()
    for length in (0, 1, 8, 100, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(StoredDataError, match=r"fisher\.safetensors: damaged.*Delete it"):
            store.load(artifacts.FISHER)
    for metadata in (None, {"alphatoken_curate": "{}"}, {"alphatoken_curate": "3"}, {"alphatoken_curate": "{"}):
        save_file({"x": torch.zeros(2)}, path, metadata=metadata)
        with pytest.raises(StoredDataError, match="damaged"):
            store.load(artifacts.FISHER)


def test_what_depends_on_the_model_is_kept_for_each_generation(store: Store, tmp_path: Path) -> None:
    later = Store(folder=tmp_path, fields=FIELDS, generation=2)
    for kind, depends in DEPENDS.items():
        store.save(kind, tensors())
        assert later.has(kind) == ("model" not in depends), kind
    assert later.path(artifacts.TARGET).name == "target-00002.safetensors"
    assert later.path(artifacts.REFERENCE_NLL, 3).name == "reference_nll-00003.safetensors"


def test_what_an_earlier_release_made_does_not_name_its_rows_and_is_the_runs_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(artifacts, "OF_ROWS", frozenset())
        Store(folder=tmp_path, fields=FIELDS).save(artifacts.FISHER, tensors())
    own = Store(folder=tmp_path, fields=FIELDS, rows="these")
    assert own.has(artifacts.FISHER) and own.is_made(artifacts.FISHER)
    assert not Store(folder=tmp_path / "new", fields=FIELDS, rows="these", reuse=tmp_path).has(artifacts.FISHER)
    own.save(artifacts.FISHER, tensors())
    assert own.has(artifacts.FISHER) and not Store(folder=tmp_path, fields=FIELDS, rows="others").has(artifacts.FISHER)


def test_what_another_run_made_is_taken_over(tmp_path: Path) -> None:
    other = Store(folder=tmp_path / "other", fields=FIELDS, generation=4)
    for kind in DEPENDS:
        other.save(kind, {"x": torch.full((2,), 3.0)}, 1)
    mine = Store(folder=tmp_path / "mine", fields=FIELDS, reuse=other.folder)
    for kind in DEPENDS:
        assert mine.load(kind, part=1) is None and mine.has(kind, 1)
        assert torch.equal(mine.require(kind, part=1)["x"], torch.full((2,), 3.0))
        assert mine.path(kind, 1).is_file()
    others = Store(folder=tmp_path / "others", fields=FIELDS, reuse=other.folder, rows="others")
    assert {kind for kind in DEPENDS if others.has(kind, 1)} == {k for k, d in DEPENDS.items() if "tokens" not in d}
    strange = Store(folder=tmp_path / "strange", fields=FIELDS | {"seed": 1}, reuse=other.folder)
    assert {kind for kind in DEPENDS if strange.has(kind, 1)} == {k for k, d in DEPENDS.items() if "seed" not in d}
