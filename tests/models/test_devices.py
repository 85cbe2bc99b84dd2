"""Where a model computes and in which dtype."""

from __future__ import annotations

import pytest
import torch

from alphatoken_curate import UsageError
from alphatoken_curate.models.devices import devices_of, kind_of, names_of, resolve_device, resolve_dtype

CPU = torch.device("cpu")


def test_devices_and_dtypes() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_dtype("auto", "cuda", in_full=False) == "bfloat16"
    assert resolve_dtype("auto", "cuda", in_full=True) == "float32"
    assert resolve_dtype("auto", "cpu", in_full=False) == "float32"
    assert resolve_dtype("float64", "cuda", in_full=True) == "float64"
    with pytest.raises(UsageError, match="--device potato"):
        resolve_device("potato")
    if not torch.cuda.is_available():
        assert resolve_device("auto") == CPU
        with pytest.raises(UsageError, match="--device cpu"):
            resolve_device("cuda:1")


def test_several_cards_are_named_by_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    two = (torch.device("cuda", 0), torch.device("cuda", 2))
    assert devices_of("cuda:0,cuda:2") == two and names_of(two) == "cuda:0,cuda:2"
    assert resolve_device("cuda:0,cuda:2") == two[1], "where losses come out"
    assert kind_of("cuda:0,cuda:2") == kind_of("cuda") == "cuda" and kind_of("cpu") == "cpu"
    assert devices_of("auto") == (torch.device("cuda"),)
    for name in ("cuda:0,cuda:0", "cuda,cuda:1", "cuda:0,cpu", "cpu:0,cpu:1", "cuda:0,xpu:1"):
        with pytest.raises(UsageError, match=f"--device {name}: several devices are cards of one kind"):
            devices_of(name)
    with pytest.raises(UsageError, match="--device cuda:0,cuda:3: torch sees 3 CUDA cards here, from cuda:0"):
        devices_of("cuda:0,cuda:3")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda:0,cuda:1: torch sees no CUDA card here"):
        devices_of("cuda:0,cuda:1")
