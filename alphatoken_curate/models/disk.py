"""Weights that stay on disk: transformers loads a model without them, and says where each of them lies."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.tensors import opened

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor in a safetensors file, and the dtype that the model has it in."""

    file: Path
    name: str
    dtype: str


def check_disk(name: str) -> None:
    """Raise ModelError, which begins with the model's `name`, where what leaves weights on disk is not installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise ModelError(
            f"{name}: --trunk-device disk needs the package accelerate. Run: pip install 'alphatoken-curate[disk]'."
        )


class Disk:
    """Some modules of a model, by name, whose weights are read from disk each time they are asked for.

    Most are read from the model's own files. What transformers puts together on loading (experts) it writes to a
    temporary folder, which goes with this object. `others`: modules beside them, which are loaded; transformers takes
    `layers.1` for the beginning of `layers.10` where that is not named itself.
    """

    def __init__(self, modules: Sequence[str], others: Sequence[str] = ()) -> None:
        self._modules, self._others = modules, others
        self._places: dict[str, _Place] = {}

    @contextmanager
    def left(self) -> Iterator[dict[str, Any]]:
        """Options of `from_pretrained`, and what it takes inside this block, to leave the modules' weights there."""
        modeling: Any = importlib.import_module("transformers.modeling_utils")
        own, folder = modeling.accelerate_dispatch, tempfile.mkdtemp(prefix="alphatoken-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        # Its hooks move whatever passes a module, tangents too, and map files that may change: ours do neither.
        modeling.accelerate_dispatch = self._note
        try:
            where = dict.fromkeys(self._others, "cpu") | dict.fromkeys(self._modules, "disk")
            yield {"device_map": {"": "cpu", **where}, "offload_folder": folder}
        finally:
            modeling.accelerate_dispatch = own

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters by their names in the model, in the dtype that the model has them in.

        Raises ModelError where a file cannot be read any more.
        """
        import torch
        from safetensors import SafetensorError

        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._places[name].file, []).append(name)
        found = {}
        for path, mine in by_file.items():
            try:
                with opened(path) as file:
                    for name in mine:
                        place = self._places[name]
                        found[name] = file.get_tensor(place.name).to(getattr(torch, place.dtype))
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{path}: blocks that stay on disk are read from it, and it fails: {error}."
                ) from error
        return found

    def _note(self, _model: Any, _quantizer: Any, _map: Any, _folder: Any, index: dict[str, Any], *_: Any) -> None:
        """Called in place of transformers' own last step, with where it left which weight."""
        self._places = {
            name: _Place(Path(one["safetensors_file"]), one["weight_name"], one["dtype"]) for name, one in index.items()
        }
