"""What older releases of transformers and its Hub client do otherwise, put right or found where it is.

Each function says until which release it is needed. What a release cannot do at all is refused elsewhere, by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GGUF_STOPS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""By the name that transformers has for a special token: the one that a GGUF has."""


def before(release: str) -> bool:
    """Whether the transformers that is installed is older."""
    from packaging.version import Version
    from transformers import __version__

    return Version(__version__) < Version(release)


def network_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises where no answer comes: of httpx2, or until huggingface_hub 2 of httpx."""
    from huggingface_hub.errors import HfHubHTTPError

    kin = (one for one in HfHubHTTPError.__mro__ if one.__module__.startswith("httpx"))
    return OSError, *(one for one in kin if issubclass(one, Exception))


def reads_without_maps() -> bool:
    """Whether safetensors can read tensors into memory, rather than map their file."""
    from packaging.version import Version
    from safetensors import __version__

    return Version(__version__) >= Version("0.8")


@contextmanager
def unmapped() -> Iterator[None]:
    """Have transformers read weights into memory.

    It maps their files, so that a file that is written again while the model is in use changes its weights, and one
    that is cut ends the process with a bus error. Before safetensors 0.8 there is no other way: see `in_memory`.
    """
    if not reads_without_maps():
        yield
        return
    modeling: Any = importlib.import_module("transformers.modeling_utils")
    own = modeling.safe_open
    modeling.safe_open = lambda file, **options: own(file, **{**options, "backend": "pread"})
    try:
        yield
    finally:
        modeling.safe_open = own


def in_memory(model: Any) -> Any:
    """The model, once no weight of it is a view of its file: until safetensors 0.8 they may be, and are copied."""
    if reads_without_maps() or model.device.type != "cpu":
        return model
    copies: dict[Any, Any] = {}
    for weight in (*model.parameters(), *model.buffers()):
        place = (weight.data_ptr(), tuple(weight.shape), weight.stride())  # tied weights stay tied
        weight.data = copies.setdefault(place, weight.data.clone())
    return model


def keep_soft_caps(model: Any) -> None:
    """Have a model that caps its attention's scores (Gemma 2) use the one attention that does so.

    Until transformers 5.20 such a model begins with PyTorch's, which leaves the cap out without a word.
    """
    config = model.config
    if getattr(config, "attn_logit_softcapping", None) is not None and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def name_stops(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Give a GGUF's tokenizer the special tokens that the file names.

    Until transformers 5.17 it takes others for them: of SmolLM2 the token that begins a turn for the one that ends it.
    It also decodes without spaces before marks, in 5.6.
    """
    tokenizer.clean_up_tokenization_spaces = False
    gguf: Any = importlib.import_module("gguf")
    fields = gguf.GGUFReader(path).fields
    for name, theirs in _GGUF_STOPS.items():
        field = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if field is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(int(field.contents())))
