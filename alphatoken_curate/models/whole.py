"""Whether a model that transformers loaded is the one that its files hold.

transformers leaves out what it has no place for, with a warning at most: a bias that config.json turns off, blocks
beyond the number that it names, the scales of quantised weights. What is left is another model, whose numbers
look as good as any.
"""

from __future__ import annotations

import importlib
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.gguf_files import refuse_gguf_depth
from alphatoken_curate.models.tensors import quantised, shapes
from alphatoken_curate.wording import count

_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EXPERTS = re.compile(r"^(num|n)_(\w+_)?experts$")
_MOST_EXPERTS = 100_000
_FEW = 1000  # blocks that are soon made
_HARMLESS = re.compile(r"inv_freq$|rotary|\b(attn|attention)\.bias$|masked_bias$|position_ids$|_extra_state$")
"""Tensors that older releases kept in files, and that are worked out."""

_LONGEST = 300


@contextmanager
def quiet_loading() -> Iterator[None]:
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


class Readable(AbstractContextManager["Readable"]):
    """What transformers and its readers raise within it, of files that are not what they should be, is a ModelError.

    `what` begins its message. Memory that ran out is let through.
    """

    def __init__(self, what: str, gguf: str | None) -> None:
        self._what, self._gguf = what, gguf

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError
        from torch import OutOfMemoryError

        builtin = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError)
        known = (*builtin, TypeError, ValueError, struct.error, SafetensorError, StrictDataclassError)
        # Whatever is wrong with a tokenizer.json, `tokenizers` raises an Exception of no kind.
        if isinstance(error, OutOfMemoryError) or not (isinstance(error, known) or kind is Exception):
            return
        again = (
            " It is damaged, cut, or of a kind that transformers does not read: fetch it again." if self._gguf else ""
        )
        raise ModelError(f"{self._what}: {reason(error)}{again}") from error


def reason(error: BaseException) -> str:
    """What a reader of model files says, in one line that is not long: some say all that they read."""
    told = str(error) if isinstance(error, OSError | RuntimeError) or type(error) is Exception else repr(error)
    if "ignore_mismatched_sizes" in told:
        return "the shapes of its weights are not those that its configuration says"
    line = " ".join(told.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def depth_of(config: dict[str, Any]) -> int | None:
    """How many decoder blocks the config of a language model says; None where it does not."""
    return next((config[key] for key in _BLOCKS if type(config.get(key)) is int), None)


def blocks_that_score(layers: int | Literal["all"], depth: int) -> int:
    """How many of so many blocks --layers asks for. Raises ModelError where there are less."""
    wanted = depth if layers == "all" else layers
    if not 1 <= wanted <= depth:
        raise ModelError(
            f"--layers {layers}: the model has {count(depth, 'decoder block')}. Give 1 to {depth}, or all."
        )
    return wanted


def refuse_depth(name: str, config: dict[str, Any], files: list[Path]) -> None:
    """Raise ModelError where a config.json has more blocks than its files have tensors, or experts without end.

    transformers would first build them all. A GGUF, which has no config.json, must have as many blocks as it says.
    """
    for path in files:
        if path.suffix == ".gguf":
            return refuse_gguf_depth(path)
    tensors = len(shapes(files))
    for told in (config, config.get("text_config")):
        for key, value in told.items() if isinstance(told, dict) else ():
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            if (key in _BLOCKS and value > max(tensors, _FEW)) or (_EXPERTS.match(key) and value > _MOST_EXPERTS):
                raise ModelError(
                    f"{name}: its config.json says {key} {value:,}, and its files hold {count(tensors, 'tensor')}."
                    " Put back the config.json that belongs to them."
                )


def refuse_other(name: str, model: Any, keys: Iterable[str], config: dict[str, Any], files: list[Path]) -> None:
    """Raise ModelError where tensors of a model's files have no place in it, and would change what it says.

    `keys` are all that transformers had no use for: other heads, images and what older releases stored among them. Nor
    may weights be whole numbers, or of 8 bits, where `config` does not say of what scale.
    """
    _refuse_unused(name, model, keys)
    if not config.get("quantization_config"):
        _refuse_quantised(name, model, files)


def _refuse_unused(name: str, model: Any, keys: Iterable[str]) -> None:
    lists = _Lists(model)
    if unused := sorted(key for key in keys if lists.misses(key, keys)):
        raise ModelError(
            f"{name}: {count(len(unused), 'tensor')} of its files have no place in a {type(model).__name__} as its"
            f" configuration describes it (the first: {unused[0]}), so it would be another model. Put back the"
            " configuration that belongs to the weights (blocks, biases, quantization_config), or save the model again"
            " with save_pretrained."
        )


def _refuse_quantised(name: str, model: Any, files: list[Path]) -> None:
    own = {key for key, _ in model.named_parameters()}
    found = [(key, kind) for key, kind in quantised(files) if key in own]
    if found:
        raise ModelError(
            f"{name}: {count(len(found), 'weight')} in its files quantised (the first: {found[0][0]}, {found[0][1]}),"
            " and its config.json has no quantization_config that says how. Name the model before it was quantised."
        )


class _Lists:
    """The lists of blocks, and other modules, of a model."""

    def __init__(self, model: Any) -> None:
        self._modules = dict(model.named_modules())
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def misses(self, key: str, keys: Iterable[str]) -> bool:
        """Whether the model lacks a tensor by which it would say something else."""
        if _HARMLESS.search(key):
            return False
        for name in (key, self._prefix + key, key.removeprefix(self._prefix)):
            parts = name.split(".")
            for i, part in enumerate(parts[:-1]):
                blocks = self._modules.get(".".join(parts[:i])) if part.isdecimal() else None
                if blocks is not None and type(blocks).__name__ == "ModuleList":
                    return int(part) < len(blocks) or self._is_block(blocks, key, parts[i:], keys)
            parent = self._modules.get(".".join(parts[:-1]))
            if parent is not None and any(True for _ in parent.parameters(recurse=False)):
                return True
        return False

    def _is_block(self, blocks: Any, key: str, rest: list[str], keys: Iterable[str]) -> bool:
        """Whether what is beyond the last block is one more: those that predict further tokens have more to them."""
        front = key[: len(key) - len(".".join(rest))] + rest[0] + "."
        held = {one.removeprefix(front) for one in keys if one.startswith(front) and not _HARMLESS.search(one)}
        return any(held <= {name for name, _ in block.named_parameters()} for block in blocks)
