"""Tensors that cost a pass over data, kept in artifacts/ with the fingerprint of what they were made from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson
import torch
from torch import Tensor

from alphatoken_curate.atomic import atomic_file
from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.fingerprint import Json, canonical, differing

TARGET = "target.safetensors"
"""G: the gradient of the mean response loss over target rows, a (d_out, d_in) tensor per linear map of S."""

FISHER = "fisher.safetensors"
"""F: the Fisher diagonal of the reference, likewise."""

REFERENCE = "reference.safetensors"
"""The reference's weights of S, where they cannot be read from its own safetensors."""


def reference_nll(shard: int) -> str:
    """Name of the file with the reference's nll of a shard's response tokens."""
    return f"reference_nll-{shard:05d}.safetensors"


_ABOUT = "alphatoken_curate"
"""The metadata key of an artefact: JSON of its fields and of the digest of its tensors."""

_EVERY = ("schema_version", "dtype", "layers")
_DEPENDS = {
    "target": ("model", "target", "target_rows", "estimator", "tokens", "seed"),
    "fisher": ("reference", "fisher", "fisher_rows", "tokens", "seed"),
    "reference": ("reference",),
    "reference_nll": ("reference", "tokens", "rows_per_shard"),
}
"""The fingerprint fields of a run that each kind of artefact depends on, beside those that all do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """The artifacts/ of a run: `fields` are the run's fingerprint fields."""

    folder: Path
    fields: Mapping[str, Json]

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Commit tensors with the fields they were made from. The same tensors and fields give the same bytes."""
        from safetensors.torch import save as to_bytes

        ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        about = canonical({"fields": self._fields_of(name), "sha256": _digest(ready)}).decode()
        with atomic_file(self.folder / name) as sink:
            # One key alone: safetensors writes several in an order that changes from one call to the next.
            sink.write(to_bytes(ready, metadata={_ABOUT: about}))

    def has(self, name: str) -> bool:
        """Whether the artefact is there, whole, and made from the same fields."""
        return self.load(name) is not None

    def load(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor] | None:
        """The tensors of an artefact made from the same fields; None where there is none.

        Raises StoredDataError where the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self.folder / name
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = orjson.loads((file.metadata() or {}).get(_ABOUT, "null"))
                tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
        except (SafetensorError, OSError, orjson.JSONDecodeError) as error:
            raise _damaged(path, str(error)) from error
        if not isinstance(about, dict) or about.get("sha256") != _digest(tensors) or "fields" not in about:
            raise _damaged(path, "it is not as it was written")
        if differing(about["fields"], self._fields_of(name)):
            return None
        return {key: tensor.to(device) for key, tensor in tensors.items()}

    def require(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The same, of an artefact that an earlier stage has made."""
        found = self.load(name, device)
        if found is None:
            raise StoredDataError(f"{self.folder / name}: missing. Run the same command again; it will be made anew.")
        return found

    def _fields_of(self, name: str) -> dict[str, Json]:
        kind = name.removesuffix(".safetensors").split("-")[0]
        return {field: self.fields[field] for field in (*_EVERY, *_DEPENDS[kind])}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _damaged(path: Path, found: str) -> StoredDataError:
    return StoredDataError(f"{path}: damaged ({found}). Delete it and run the same command again.")
