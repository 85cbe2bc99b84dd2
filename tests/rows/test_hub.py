"""Datasets of the Hub: which configuration and split is asked for, and what is said where it cannot be had."""

from __future__ import annotations

from typing import Any

import pytest

from alphatoken_curate.errors import InputError
from alphatoken_curate.rows.read import Reading, RowStream

datasets: Any = pytest.importorskip("datasets")
GOOD = {"prompt": "1 + 1 =", "completion": " 2"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is asked of `datasets`, which has owner/name, of which a configuration must be named, and plain."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None = None, split: str | None = None) -> Any:
        calls.append((path, name, split))
        if path == "owner/name" and name is None:
            raise ValueError("Config name is missing. Please pick one among the available configs: ['main', 'other']")
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    return calls


def read(*data: str, **reading: Any) -> list[Any]:
    return list(RowStream(data, reading=Reading(**reading)))


def test_a_subset_and_a_split(asked: list[tuple[Any, ...]]) -> None:
    assert read("owner/name", subset="main")[0].source == "owner/name"
    read("owner/name", subset="main", split="test")
    read("owner/name:dev", "plain", subset="main", split="test")
    assert asked == [
        ("owner/name", "main", "train"),
        ("owner/name", "main", "test"),
        ("owner/name", "main", "dev"),
        ("plain", "main", "test"),
    ]


def test_a_configuration_that_is_missing_is_asked_for(asked: list[tuple[Any, ...]]) -> None:
    with pytest.raises(InputError) as caught:
        read("owner/name")
    told = str(caught.value)
    assert "'owner/name' (split 'train') cannot be read: Config name is missing" in told and "['main', 'other']" in told
    assert told.endswith("Name one with --subset.")
