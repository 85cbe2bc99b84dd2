"""What safetensors files say of their tensors: their headers alone are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from alphatoken_curate.models.releases import reads_without_maps

FLOATS = ("F64", "F32", "F16", "BF16")
"""Numbers that need no scale, as safetensors calls them."""

_LARGEST_HEADER = 100_000_000  # bytes; safetensors itself refuses more


def header_problems(path: Path) -> Iterator[str]:
    """What is wrong with a safetensors file, as far as its header and its size tell; nothing where it is whole.

    It is: 8 bytes, the length of the header; the header, JSON; the tensors, to the last offset.
    """
    size = path.stat().st_size
    found = _header(path)
    if found is None:
        yield f"{path.name} has no whole header in its {size} bytes"
        return
    length, header = found
    try:
        ends = [tensor["data_offsets"][1] for name, tensor in orjson.loads(header).items() if name != "__metadata__"]
        wanted = 8 + length + max(ends, default=0)
    except (orjson.JSONDecodeError, AttributeError, KeyError, IndexError, TypeError):
        yield f"{path.name} has no header of safetensors"
        return
    if not ends:
        yield f"{path.name} holds no tensor"
    elif size != wanted:
        yield f"{path.name} has {size} of {wanted} bytes"


def shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of safetensors files, by name. A file without a header gives none: its loader says so."""
    return {name: tuple(told["shape"]) for name, told in _told(files) if isinstance(told.get("shape"), list)}


def quantised(files: Iterable[Path]) -> list[tuple[str, str]]:
    """Name and kind (`I8`) of their tensors whose numbers need a scale, by name."""
    return sorted((name, kind) for name, kind in kinds(files).items() if kind not in FLOATS)


def kinds(files: Iterable[Path]) -> dict[str, str]:
    """What numbers each of their tensors is of, by name: `BF16`."""
    return {name: str(told.get("dtype")) for name, told in _told(files) if name != "__metadata__"}


def _told(files: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What headers say of each tensor."""
    for path in files:
        try:
            _, header = _header(path) or (0, b"{}")
            tensors: Any = orjson.loads(header)
        except (orjson.JSONDecodeError, OSError):
            continue
        for name, told in tensors.items() if isinstance(tensors, dict) else ():
            if isinstance(told, dict):
                yield name, told


def opened(path: Path) -> Any:
    """A safetensors file to take torch tensors from: into memory, where the installed release can; see `releases`."""
    from safetensors import safe_open

    return safe_open(path, framework="pt", **({"backend": "pread"} if reads_without_maps() else {}))


def _header(path: Path) -> tuple[int, bytes] | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(_LARGEST_HEADER, size - 8):
            return None
        return length, file.read(length)
