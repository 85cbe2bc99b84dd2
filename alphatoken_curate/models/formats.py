"""Checkpoints that are no model yet: which trainer wrote them, and the command that makes a model of them.

They are pickled, so that nothing but the names of their files is looked at:
* FSDP, accelerate, Trainer and `torch.distributed.checkpoint`: `pytorch_model_fsdp_0/` of `__0_0.distcp` and, written
  last, `.metadata`; or these two by themselves;
* DeepSpeed: `global_step500/` of `*_model_states.pt` and `*_optim_states.pt`, beside it `latest`, `zero_to_fp32.py`;
* Megatron and NeMo: `iter_0000100/`, `mp_rank_00/model_optim_rng.pt`, `common.pt`, NeMo's `weights/` and `context/`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

FSDP = "pytorch_model_fsdp"
_LAST_OF_FSDP = ".metadata"
_TO_FP32 = "zero_to_fp32.py"
_MEGATRON = (
    "latest_checkpointed_iteration.txt",
    "iter_*/",
    "mp_rank_*/model_optim_rng.pt",
    "common.pt",
    "weights/common.pt",
    "context/model.yaml",
)


def sharded(folder: Path) -> str | None:
    """What the folder of a sharded checkpoint holds, and how a model is made of it; None for any other folder."""
    if not folder.is_dir():
        return None
    return next((told for told in (_megatron(folder), _fsdp(folder), _deepspeed(folder)) if told is not None), None)


def unfinished(folder: Path) -> str | None:
    """What a sharded checkpoint of FSDP lacks while it is written; None where nothing is known to lack."""
    for place in _fsdp_folders(folder):
        if not (place / _LAST_OF_FSDP).is_file():
            return f"{place.relative_to(folder.parent)} has no {_LAST_OF_FSDP} yet, which is written last"
    return None


def _fsdp_folders(folder: Path) -> Iterator[Path]:
    for place in (folder, *sorted(folder.glob(f"{FSDP}_*/"))):
        if (place / _LAST_OF_FSDP).is_file() or any(place.glob("__*.distcp")):
            yield place


def _fsdp(folder: Path) -> str | None:
    place = next(_fsdp_folders(folder), None)
    if place is None:
        return None
    return (
        f"its weights are sharded, as FSDP saves them ({place.name}/__*.distcp), and no model yet. Merge them:"
        f" {_command('accelerate', 'merge-weights', place, 'OUT')}{_then(folder)}"
    )


def _deepspeed(folder: Path) -> str | None:
    inside = any(folder.glob("*_model_states.pt"))
    tags = [folder] if inside else sorted({path.parent for path in folder.glob("*/*_model_states.pt")})
    if not tags and not (folder / _TO_FP32).is_file():
        return None
    top = folder.parent if inside else folder
    script = [top / _TO_FP32] if (top / _TO_FP32).is_file() else ["-m", "deepspeed.utils.zero_to_fp32"]
    tag = ["--tag", tags[-1].name] if tags and (inside or not (top / "latest").is_file()) else []
    command = _command("python", *script, top, "OUT", "--safe_serialization", *tag)
    return (
        f"its weights are sharded, as DeepSpeed saves them ({tags[-1].name if tags else _TO_FP32}), and no model yet."
        f" Merge them, where deepspeed is installed: {command}{_then(top)}"
    )


def _megatron(folder: Path) -> str | None:
    mark = next((found for pattern in _MEGATRON for found in sorted(folder.glob(pattern))), None)
    if mark is None:
        return None
    command = _command("nemo", "llm", "export", f"path={folder}", "target=hf", "output_path=OUT")
    return (
        f"it is a checkpoint of Megatron or NeMo ({mark.relative_to(folder)}), which transformers cannot load. Export"
        f" it as safetensors with the tool that wrote it (Megatron-Bridge: AutoBridge.export_ckpt; NeMo: {command})"
        " and name that folder."
    )


def _command(*words: object) -> str:
    return f"`{shlex.join(map(str, words))}`"


def _then(folder: Path) -> str:
    home = "of this folder" if (folder / "config.json").is_file() else "of the model that was trained"
    return f". Then put config.json and the tokenizer {home} into OUT, and name OUT."
