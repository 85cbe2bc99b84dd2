"""What the folder of a model or an adapter holds, and how it comes from the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.formats import sharded, unfinished
from alphatoken_curate.models.releases import network_errors
from alphatoken_curate.models.tensors import shapes
from alphatoken_curate.urls import expanded
from alphatoken_curate.wording import count

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_OWN_ATTENTIONS = ("eager", "sdpa", "flex_attention", "None")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.gguf"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TRAINER_PICKLES = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "recipe_state")
_NO_WEIGHT = "_extra_state"
"""How the names of tensors end that hold no weight, and may be empty."""
_TORCHTUNE = " (torchtune: safe_serialization=True of its checkpointer)"


@contextmanager
def permitted() -> Iterator[None]:
    """What the system does not let be read is a ModelError that names it."""
    try:
        yield
    except PermissionError as error:
        raise ModelError(f"{error.filename}: cannot be read ({error.strerror}). Check its permissions.") from error


def names_a_path(name: str) -> bool:
    """Whether a model's name is that of a place on this machine rather than a Hub id."""
    return expanded(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def last_name(name: str) -> str:
    """The last component of a path of any system, or of a Hub id, in lower case."""
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()


def model_weights(folder: Path) -> list[Path]:
    """The safetensors files of a whole model, by name."""
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_model"))


def weights_read(folder: Path) -> list[Path]:
    """Those of `model_weights` that transformers reads: an earlier save may have left others beside them."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    told = json_object(folder / "config.json").get("transformers_weights")
    place = folder / told if told else whole if whole.is_file() else index
    if not place.is_file():
        return model_weights(folder)
    named = json_object(place)["weight_map"].values() if place.suffix == ".json" else [place.name]
    return [path for path in model_weights(folder) if path.name in named]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no whole model of its own."""
    whole = (folder / "config.json").is_file() and bool(model_weights(folder))
    return (folder / ADAPTER_CONFIG).is_file() and not whole


def pickled(folder: Path) -> str | None:
    """What pickled weights are all that a folder has, and how a model is made of them; None where there is better.

    What a trainer pickles beside the weights does not count.
    """
    if any(folder.glob("*.safetensors")) or unfinished(folder) is not None:
        return None
    if (told := sharded(folder)) is not None:
        return told
    found = {path.name for pattern in _PICKLES for path in folder.glob(pattern)}
    weights = sorted(name for name in found if not name.startswith(_TRAINER_PICKLES))
    if not weights:
        return None
    return (
        f"its weights are pickled ({weights[0]}), and reading a pickle can run any code. Save the model again with"
        f" save_pretrained, which writes safetensors{_TORCHTUNE if weights[0].startswith('hf_model_') else ''}."
    )


def refuse_pickles(folder: Path) -> None:
    """Raise ModelError where pickled weights are all that a folder has, as files or as the shards of a trainer."""
    if (told := pickled(folder)) is not None:
        raise ModelError(f"{folder}: {told}")


def refuse_empty(folder: Path, files: Iterable[Path]) -> None:
    """Raise ModelError where tensors of a model's or an adapter's files have no element.

    So they are saved where each process of ZeRO-3 has a part of them, and nobody gathered the parts.
    """
    found = shapes(files)
    empty = sorted(name for name, shape in found.items() if 0 in shape and not name.endswith(_NO_WEIGHT))
    if empty:
        merge = f" Of this folder, {told}" if (told := sharded(folder)) is not None else ""
        raise ModelError(
            f"{folder}: {len(empty):,} of {count(len(found), 'tensor')} in it are empty (the first: {empty[0]}), as a"
            " training with DeepSpeed's ZeRO-3 saves them before its weights are gathered. Save it again with"
            f" stage3_gather_16bit_weights_on_model_save: true.{merge}"
        )


def json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError where it holds something else."""
    try:
        with permitted():
            found = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ModelError(f"{path}: not JSON ({error}).") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: not a JSON object.")
    return found


def refuse_other_weights(folder: Path) -> None:
    """Raise ModelError where an index names weights that are no safetensors file of this folder.

    transformers would read them whatever they are: a pickle, or a file elsewhere that no digest covers.
    """
    named = {"config.json": [json_object(folder / "config.json").get("transformers_weights")]}
    for index in sorted(folder.glob("*.safetensors.index.json")):
        listed = json_object(index).get("weight_map")
        if not isinstance(listed, dict):
            raise ModelError(f"{index}: not an index of weights: no weight_map in it.")
        named[index.name] = list(listed.values())
    for place, names in named.items():
        for name in names:
            plain = isinstance(name, str) and not {"/", "\\"} & set(name)
            if name is not None and not (plain and name.endswith((".safetensors", ".safetensors.index.json"))):
                raise ModelError(
                    f"{folder}: {place} takes weights from {name!r}, which is no safetensors file of this folder."
                    " Save the model again with save_pretrained."
                )


def checked(folder: Path) -> Path:
    """The folder, once it is known to hold a whole model in safetensors. Raises ModelError where it does not."""
    if not model_weights(folder):
        refuse_pickles(folder)
        if (lacks := unfinished(folder)) is not None:
            raise ModelError(f"{folder}: not written to the end: {lacks}. Wait until it is saved.")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json in it. --model takes a folder that save_pretrained wrote.")
    if not model_weights(folder):
        raise ModelError(f"{folder}: no *.safetensors file in it.")
    refuse_other_weights(folder)
    refuse_empty(folder, model_weights(folder))
    if (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{folder}: it holds a whole model and an adapter ({ADAPTER_CONFIG}), so what to load is not clear."
            " If the adapter is merged already, move its two files elsewhere; if not, move the adapter to a folder"
            " of its own and name that."
        )
    return folder


def download(hub_id: str, revision: str | None, local: bool) -> Path:
    """The folder of a model of the Hub; `local` takes it from the cache alone. Raises ModelError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    refused: tuple[type[Exception], ...] = (HFValidationError, *network_errors())
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES, local_files_only=local))
    except refused as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{hub_id}: no such folder here, and the Hub did not give it ({reason}). Check the name, or the network."
        ) from error


def check_attentions(name: str, config: Any) -> None:
    """Refuse a config that asks for an attention which transformers would load from the Hub, as code."""
    if asked := sorted(set(_attentions(config)) - set(_OWN_ATTENTIONS)):
        raise ModelError(
            f"{name}: its config.json asks for the attention {asked[0]!r}, and transformers loads what it does not have"
            " from the Hub, as code. Remove attn_implementation there; if you trust it, add --trust-remote-code."
        )


def _attentions(value: Any) -> Iterator[str]:
    """Every attention that a config, or one within it, names."""
    for key, item in value.items() if isinstance(value, dict) else ():
        if key in ("attn_implementation", "_attn_implementation"):
            yield from map(str, item.values() if isinstance(item, dict) else [item])
        else:
            yield from _attentions(item)
