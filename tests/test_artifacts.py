from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from alphatoken_curate import StoredDataError, artifacts
from alphatoken_curate.artifacts import Store

FIELDS: dict[str, Any] = {
    name: 0
    for name in (
        *("schema_version", "dtype", "layers", "model", "reference", "target", "target_rows", "estimator", "tokens"),
        *("seed", "fisher", "fisher_rows", "rows_per_shard", "window", "stability_weight"),
    )
}
NAMES = {
    artifacts.TARGET: {"model", "target", "target_rows", "estimator", "tokens", "seed"},
    artifacts.FISHER: {"reference", "fisher", "fisher_rows", "tokens", "seed"},
    artifacts.REFERENCE: {"reference"},
    artifacts.reference_nll(3): {"reference", "tokens", "rows_per_shard"},
}


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


@pytest.mark.parametrize("name", NAMES)
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
        written.add((tmp_path / artifacts.FISHER).read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("name", NAMES)
def test_an_artefact_of_other_making_is_made_again(name: str, store: Store, tmp_path: Path) -> None:
    store.save(name, tensors())
    decisive = NAMES[name] | {"schema_version", "dtype", "layers"}
    for field in FIELDS:
        other = Store(folder=tmp_path, fields=FIELDS | {field: 1})
        assert other.has(name) == (field not in decisive), field


def test_an_artefact_that_should_be_there(store: Store) -> None:
    with pytest.raises(StoredDataError, match=r"fisher\.safetensors: missing.*made anew"):
        store.require(artifacts.FISHER)


def test_every_flipped_bit_is_seen(store: Store, tmp_path: Path) -> None:
    store.save(artifacts.FISHER, tensors())
    path = tmp_path / artifacts.FISHER
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
    path = tmp_path / artifacts.FISHER
    good = path.read_bytes()
    for length in (0, 1, 8, 100, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(StoredDataError, match=r"fisher\.safetensors: damaged.*Delete it"):
            store.load(artifacts.FISHER)
    for metadata in (None, {"alphatoken_curate": "{}"}, {"alphatoken_curate": "3"}, {"alphatoken_curate": "{"}):
        save_file({"x": torch.zeros(2)}, path, metadata=metadata)
        with pytest.raises(StoredDataError, match="damaged"):
            store.load(artifacts.FISHER)
