"""Whether a GGUF file is whole, and all of it is what transformers makes a model of.

transformers says nothing of what it does not read: tensors that it knows no place for, and how rotary positions are
scaled.
"""

from __future__ import annotations

import importlib
import mmap
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.positions import ropes_of
from alphatoken_curate.wording import count

_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 10: 8, 11: 8}  # of GGUF's kinds of whole numbers
_NUMBER = rb"([\x00-\x05\x0a\x0b])\0\0\0(.{8})"
_DEPTH = re.compile(rb"\.block_count" + _NUMBER, re.DOTALL)
_PARTS = re.compile(rb"\x0b\0{7}split\.count" + _NUMBER, re.DOTALL)
_SCALING = re.compile(rb"\.rope\.scaling\.type\x08\0\0\0(.)\0{7}", re.DOTALL)
_BLOCK = re.compile(rb"\bblk\.(\d{1,9})\.")
_METADATA = 1 << 26  # bytes of a file in which its metadata and the names of its tensors are looked for

_CONVERT = "Name the model in safetensors, as it was before it was converted."


def refuse_gguf_depth(path: Path) -> None:
    """Raise ModelError where a file is empty, one part of several, or has not as many blocks as it says."""
    if not path.stat().st_size:
        raise ModelError(f"{path}: it is empty. Fetch it again.")
    with _mapped(path) as data:
        named, parts = _number(_DEPTH, data), _number(_PARTS, data)
        held = {int(number) for number in _BLOCK.findall(data, 0, _METADATA)}
    if parts is not None and parts > 1:
        raise ModelError(
            f"{path}: it is one of {parts} files that a model was split into, and one is read. Put them together"
            " (llama-gguf-split --merge), and name that file."
        )
    if named is not None and held and named != max(held) + 1:
        raise ModelError(
            f"{path}: its metadata say {count(named, 'block')}, and it holds {max(held) + 1:,}. It is damaged, or"
            " was made wrongly: fetch or convert it again."
        )


@contextmanager
def gguf_needed(name: str, gguf: str | None) -> Iterator[None]:
    """A package that is missed in this block, where a GGUF file is read, is a ModelError that says what to install."""
    try:
        yield
    except ImportError as error:
        if gguf is None:
            raise
        raise ModelError(
            f"{name}: reading a GGUF file needs the packages gguf and accelerate."
            " Run: pip install 'alphatoken-curate[demo]'."
        ) from error


@contextmanager
def unplaced() -> Iterator[set[str]]:
    """Names, in the file, of the tensors of a GGUF that transformers reads in this block and has no place for."""
    reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    own, found = reader.get_gguf_hf_weights_map, set[str]()
    reader.get_gguf_hf_weights_map = lambda *args, **kwargs: _Places(own(*args, **kwargs), found)
    try:
        yield found
    finally:
        reader.get_gguf_hf_weights_map = own


class _Places(dict[str, str]):
    """Which parameter each tensor is; `unknown` gathers the names that are asked for and not known."""

    def __init__(self, places: Mapping[str, str], unknown: set[str]) -> None:
        super().__init__(places)
        self._unknown = unknown

    def __contains__(self, name: object) -> bool:
        known = super().__contains__(name)
        if not known and isinstance(name, str):
            self._unknown.add(name)
        return known


def refuse_left_out(name: str, path: Path, model: Any, unknown: Collection[str]) -> None:
    """Raise ModelError where the model of a file lacks tensors of it, or scales positions otherwise than it says."""
    with _mapped(path) as data:
        left = sorted(one for one in unknown if data.find(len(one).to_bytes(8, "little") + one.encode()) >= 0)
        scaling = _SCALING.search(data, 0, _METADATA)
        said = data[scaling.end() : scaling.end() + scaling[1][0]].decode("ascii", "replace") if scaling else "none"
    if left:
        raise ModelError(
            f"{name}: transformers reads {count(len(left), 'tensor')} of it into no part of a {type(model).__name__}"
            f" (the first: {left[0]}), so it would be another model. {_CONVERT}"
        )
    ropes = ropes_of(model.config.get_text_config().to_dict())
    if said != "none" and all(rope.get("rope_type", "default") == "default" for rope in ropes):
        raise ModelError(
            f"{name}: its rotary positions are scaled ({said}), which transformers does not read from a GGUF file, so"
            f" it would be another model. {_CONVERT}"
        )


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _number(pattern: re.Pattern[bytes], data: mmap.mmap) -> int | None:
    """The first whole number that the metadata have under a key."""
    one = pattern.search(data, 0, _METADATA)
    return None if one is None else int.from_bytes(one[2][: _BYTES[one[1][0]]], "little")
