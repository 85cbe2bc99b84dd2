"""Where a model computes and in which dtype."""

from __future__ import annotations

import pytest
import torch

from alphatoken_curate import UsageError
from alphatoken_curate.models.devices import resolve_device, resolve_dtype

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
