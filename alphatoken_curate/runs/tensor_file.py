"""Tensors as safetensors lays them out, written one by one: no copy of all of them is made on the way."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import orjson
import torch
from torch import Tensor

from alphatoken_curate.errors import CurateError
from alphatoken_curate.runs.atomic import Sink

_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls the kinds of numbers, wider ones first."""

_ALIGNED = 8  # bytes; the header is filled up with spaces, so that tensors start where their numbers can be read


def write_tensors(sink: Sink, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors of the CPU: 8 bytes that say how long the header is, the header (JSON), the numbers.

    Wider numbers come first, then the order of names, so that the same tensors and metadata give the same bytes.
    """
    if sys.byteorder != "little":
        raise CurateError("Tensors are stored as little-endian numbers, which this machine does not have.")
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    first = 0
    for name in order:
        tensor = tensors[name]
        last = first + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, last]}
        first = last
    text = orjson.dumps(header)
    text += b" " * (-len(text) % _ALIGNED)
    sink.write_parts([memoryview(len(text).to_bytes(8, "little") + text), *(raw(tensors[name]) for name in order)])


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor of the CPU, in place."""
    return tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
