"""What older releases of transformers and its Hub client do otherwise, put right or found where it is.

Each function says until which release it is needed. What a release cannot do at all is refused elsewhere, by name.
"""

from __future__ import annotations

import importlib
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
