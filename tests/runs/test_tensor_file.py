from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from alphatoken_curate.runs.atomic import atomic_file
from alphatoken_curate.runs.tensor_file import write_tensors

KINDS = (
    torch.float64,
    torch.int64,
    torch.float32,
    torch.int32,
    torch.float16,
    torch.bfloat16,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def some() -> dict[str, Tensor]:
    """Of every kind, shape and size that files hold, names out of order."""
    generator = torch.Generator().manual_seed(0)
    found = {f"x {kind}": torch.randint(0, 2, (3, 5), generator=generator).to(kind) for kind in KINDS}
    lone = {"zero": torch.tensor(2.5), "nothing": torch.empty(0, 4), "a": torch.randn(7, generator=generator)}
    return {**found, **lone, 'ä "quoted"\n': torch.arange(3)}


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    path, given, about = tmp_path / "x.safetensors", some(), {"about": '{"é": 1}'}
    with atomic_file(path, hashed=False) as sink:
        write_tensors(sink, given, about)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == about and set(file.keys()) == set(given)
        for name, tensor in given.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype and found.shape == tensor.shape and torch.equal(found, tensor)


def test_the_order_of_names_changes_no_byte(tmp_path: Path) -> None:
    paths, given = [tmp_path / "one", tmp_path / "two"], some()
    for path, names in zip(paths, (sorted(given), sorted(given, reverse=True)), strict=True):
        with atomic_file(path, hashed=False) as sink:
            write_tensors(sink, {name: given[name] for name in names}, {})
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_numbers_start_where_they_can_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with atomic_file(path) as sink:
        write_tensors(sink, {"odd": torch.zeros(3, dtype=torch.uint8), "wide": torch.ones(2, dtype=torch.float64)}, {})
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert header % 8 == 0 and content[8 + header :] == torch.ones(2, dtype=torch.float64).numpy().tobytes() + b"\0\0\0"


@pytest.mark.parametrize("kind", [torch.complex64])
def test_other_numbers_are_refused(kind: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_file(tmp_path / "x") as sink:
        write_tensors(sink, {"x": torch.zeros(2, dtype=kind)}, {})
    assert not (tmp_path / "x").exists()
