"""Where states of a rehearsal are kept, by name: in memory, among the artefacts of a run, or in temp files."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from alphatoken_curate.engine import below
from alphatoken_curate.runs.artifacts import REHEARSAL, Store


class Shelf(below.Shelf, Protocol):
    """Where states are kept, by name: in memory or on disk."""

    def has(self, name: str) -> bool:
        """Whether something is kept under a name, by the look of it."""
        ...


class InMemory:
    """A shelf of copies in memory."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, Tensor]] = {}

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a copy."""
        self._held[name] = {key: tensor.detach().clone() for key, tensor in tensors.items()}

    def get(self, name: str) -> dict[str, Tensor] | None:
        """A copy of what was kept under a name; None where nothing was."""
        found = self._held.get(name)
        return None if found is None else {key: tensor.clone() for key, tensor in found.items()}

    def has(self, name: str) -> bool:
        """Whether something is kept under a name."""
        return name in self._held

    def drop(self, name: str) -> None:
        """Forget it, where it is there."""
        self._held.pop(name, None)


class Artefacts:
    """A shelf of sealed files in artifacts/, each there whole or not at all: who is killed goes on from them."""

    def __init__(self, store: Store, device: torch.device | str, *, prefix: str) -> None:
        self.store, self.device, self.prefix = store, device, prefix

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Commit them. Raises CurateError where the disk refuses."""
        self.store.save(REHEARSAL, tensors, f"{self.prefix}-{name}")

    def get(self, name: str) -> dict[str, Tensor] | None:
        """What was committed by a run of the same fields. Raises StoredDataError where the file is damaged."""
        return self.store.load(REHEARSAL, self.device, part=f"{self.prefix}-{name}")

    def has(self, name: str) -> bool:
        """Whether a run of the same fields committed it; damage shows when it is got."""
        return self.store.is_made(REHEARSAL, f"{self.prefix}-{name}")

    def drop(self, name: str) -> None:
        """Delete its file, where it is there."""
        self.store.path(REHEARSAL, f"{self.prefix}-{name}").unlink(missing_ok=True)


class Scratch:
    """A shelf of temp files, which the next writer sweeps where this one is killed (`runs.atomic.sweep`).

    `name`: with it theirs begin.
    """

    def __init__(self, folder: Path, device: torch.device | str, *, name: str = REHEARSAL) -> None:
        self.folder, self.device, self.name = folder, device, name
        self._files: dict[str, Path] = {}

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a file of them."""
        from safetensors.torch import save_file

        self.drop(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files[name] = self.folder / f".{self.name}.{secrets.token_hex(8)}.tmp"
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, self._files[name])

    def get(self, name: str) -> dict[str, Tensor] | None:
        """What was written under a name; None where nothing was."""
        from safetensors.torch import load_file

        path = self._files.get(name)
        return None if path is None else load_file(path, device=str(self.device))

    def has(self, name: str) -> bool:
        """Whether something was written under a name."""
        return name in self._files

    def drop(self, name: str) -> None:
        """Delete its file, where it is there."""
        with contextlib.suppress(KeyError):
            self._files.pop(name).unlink(missing_ok=True)
