"""Where the blocks of a model lie: on one device, dealt over several, or, below S, where each is fetched from to run.

Whatever is no block (embeddings, final norm, head) lies on the last device: token ids go in there, and losses come out.
A block computes on its own device, whatever goes into it is brought there, and values are the same bits wherever that
is on devices of one type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alphatoken_curate.engine.blocks import decoder_blocks, embeddings, trunk
from alphatoken_curate.engine.tangents import each_leaf
from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.disk import Disk, check_disk
from alphatoken_curate.models.load import ModelSource, load_model, skeleton
from alphatoken_curate.wording import count


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What a user asked for: `devices`, first to last, and where blocks below S stay until they run, if not there."""

    devices: tuple[torch.device, ...]
    trunk: Literal["cpu", "disk"] | None = None

    @property
    def plain(self) -> bool:
        """Whether all of a model lies on one device."""
        return len(self.devices) == 1 and (self.trunk is None or self.trunk == self.devices[0].type)


def placement_of(device: str, trunk: str | None) -> Placement:
    """By the names that --device and --trunk-device have."""
    return Placement(devices=tuple(map(torch.device, device.split(","))), trunk=trunk)  # type: ignore[arg-type]


def load_placed(
    source: ModelSource,
    placement: Placement,
    *,
    dtype: torch.dtype,
    layers: int | Literal["all"],
    directions: int,
    trust_remote_code: bool = False,
) -> Any:
    """A model, frozen, where it was asked for; `directions` of S will lie beside its last `layers` blocks.

    Raises ModelError where it cannot lie there.
    """
    if placement.plain:
        return load_model(source, dtype=dtype, device=placement.devices[0], trust_remote_code=trust_remote_code)
    check_placed(source, placement)
    disk = _left_on_disk(source, layers, trust_remote_code) if placement.trunk == "disk" else None
    host = torch.device("cpu")
    model = load_model(source, dtype=dtype, device=host, trust_remote_code=trust_remote_code, disk=disk)
    place(model, placement, layers=layers, directions=directions, disk=disk)
    return model


def check_placed(source: ModelSource, placement: Placement) -> None:
    """Raise ModelError where a model cannot lie where it was asked for, as far as its files tell.

    Merging an adapter takes all weights, and rounds as the device does that it is done on.
    """
    asked = f"--trunk-device {placement.trunk}" if placement.trunk else "several devices"
    if source.adapter is not None and not placement.plain:
        raise ModelError(
            f"{source.name}: an adapter is merged into a model that is on one device, not with {asked}. Merge it"
            " (peft's merge_and_unload), save the result and the tokenizer with save_pretrained, and name that folder."
        )
    if placement.trunk == "disk":
        check_disk(source.name)
    if placement.trunk == "disk" and source.gguf:
        raise ModelError(
            f"{source.name}: a GGUF file is unpacked into memory as a whole, so none of it can stay on disk. Give"
            " --trunk-device cpu, or a folder with safetensors."
        )


def _left_on_disk(source: ModelSource, layers: int | Literal["all"], trust_remote_code: bool) -> Disk:
    model = skeleton(source, trust_remote_code=trust_remote_code)
    blocks = decoder_blocks(model, trunk(model))
    below = _below(model, blocks, layers)
    names = {module: name for name, module in model.named_modules()}
    return Disk([names[block] for block in blocks[:below]], [names[block] for block in blocks[below:]])


def _below(model: Any, blocks: Sequence[nn.Module], layers: int | Literal["all"]) -> int:
    """How many blocks are below S. Raises ModelError where there is none, so that nothing could lie elsewhere."""
    below = 0 if layers == "all" else len(blocks) - layers
    if below < 1:
        raise ModelError(
            f"--trunk-device with --layers {layers}: all {count(len(blocks), 'block')} of {type(model).__name__} score,"
            f" and none is left that could lie elsewhere. Give --layers {len(blocks) - 1} or less."
        )
    return below


# ------------------------------------------------------------------------------------------------------------- dealing


def place(
    model: Any,
    placement: Placement,
    *,
    layers: int | Literal["all"],
    directions: int,
    disk: Disk | None = None,
) -> None:
    """Put a model that is on the CPU where it was asked for. `disk`: what reads the weights that are not there.

    Blocks are dealt in their order so that the fullest device holds as little as can be, S with its directions.
    Raises ModelError where there are fewer blocks than devices, or no block below S that could lie elsewhere.
    """
    devices, blocks = placement.devices, decoder_blocks(model, trunk(model))
    away = _below(model, blocks, layers) if placement.trunk else 0
    names = {parameter: name for name, parameter in model.named_parameters()}
    within = {module for block in blocks for module in block.modules()}
    moved: dict[Tensor, Tensor] = {}
    beside = [module for module in model.modules() if module not in within]
    for block, device in zip(blocks, _dealt(blocks, beside, away, layers, directions, devices), strict=True):
        if len(devices) > 1:
            block.register_forward_pre_hook(_brings(device), with_kwargs=True)
        if block in blocks[:away]:
            _Fetched(block, device, names if disk else {}, disk)
        _move(block.modules(), device, moved, parameters=block not in blocks[:away])
    _move(beside, devices[-1], moved)


def _dealt(
    blocks: Sequence[nn.Module],
    beside: Iterable[nn.Module],
    away: int,
    layers: int | Literal["all"],
    directions: int,
    devices: Sequence[torch.device],
) -> list[torch.device]:
    """The device of each block; those that are `away` run on the first."""
    if len(blocks) - away < len(devices):
        there = count(len(blocks) - away, "block")
        raise ModelError(f"--device: {count(len(devices), 'device')} for {there}. Name no more than there are.")
    first = 0 if layers == "all" else max(0, len(blocks) - layers)
    sizes = [_bytes(block.modules()) for block in blocks]
    # While directions are made, S and each of them are float32; a sum more is being made.
    heft = [(2 + directions) * 4 * _numbers(block) if n >= first else sizes[n] for n, block in enumerate(blocks)]
    counts = deal(heft[away:], _bytes(beside), len(devices))
    return [devices[0]] * away + [device for device, n in zip(devices, counts, strict=True) for _ in range(n)]


def deal(sizes: Sequence[int], beside: int, devices: int) -> tuple[int, ...]:
    """How many blocks, of these sizes in their order, each device takes, one at least; the last holds `beside` too.

    The largest load is as small as can be.
    """
    before = [0, *accumulate(sizes)]

    @cache
    def best(first: int, left: int) -> tuple[int, tuple[int, ...]]:
        """The largest load of the last `left` devices, which take the blocks from `first` on, and how many each."""
        if left == 1:
            return before[-1] - before[first] + beside, (len(sizes) - first,)
        ways = []
        for n in range(1, len(sizes) - first - left + 2):
            load, counts = best(first + n, left - 1)
            ways.append((max(load, before[first + n] - before[first]), (n, *counts)))
        return min(ways)

    return best(0, devices)[1]


def _bytes(modules: Iterable[nn.Module]) -> int:
    own = {p: p.nbytes for module in modules for p in module.parameters(recurse=False)}
    return sum(own.values())


def _numbers(block: nn.Module) -> int:
    return sum(p.numel() for p in block.parameters())


# ------------------------------------------------------------------------------------------------------ moving weights


def _move(
    modules: Iterable[nn.Module], device: torch.device, moved: dict[Tensor, Tensor], *, parameters: bool = True
) -> None:
    """Have modules hold their parameters and buffers on a device; what several of them share stays one (`moved`)."""
    for module in modules:
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
        for name, own in module._parameters.items() if parameters else ():
            if own is not None:
                if own not in moved:
                    moved[own] = nn.Parameter(own.detach().to(device), requires_grad=own.requires_grad)
                module._parameters[name] = moved[own]  # type: ignore[assignment]


def _brings(device: torch.device) -> Callable[..., tuple[Any, Any]]:
    """A hook that has whatever tensors go into a module on its device; caches keep to theirs."""

    def to(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) and x.device != device else x

    def bring(_: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        return each_leaf(to, args), {name: each_leaf(to, value) for name, value in kwargs.items()}

    return bring


class _Fetched:
    """A block whose weights are fetched each time it runs, and let go of: from memory of the CPU, or from `disk`.

    `names`: of its parameters, where they are on disk.
    """

    def __init__(
        self, block: nn.Module, device: torch.device, names: Mapping[nn.Parameter, str], disk: Disk | None
    ) -> None:
        self.device, self.disk = device, disk
        self.kept = [(m, name, p) for m in block.modules() for name, p in m._parameters.items() if p is not None]
        self.names = {p: names[p] for _, _, p in self.kept} if disk is not None else {}
        block.register_forward_pre_hook(self._fetch)
        block.register_forward_hook(self._let_go, always_call=True)

    def _fetch(self, *_: Any) -> None:
        read = self.disk.read(self.names.values()) if self.disk is not None else {}
        for module, name, own in self.kept:
            weight = read[self.names[own]] if read else own.detach()
            module._parameters[name] = nn.Parameter(weight.to(self.device), requires_grad=False)

    def _let_go(self, *_: Any) -> None:
        for module, name, own in self.kept:
            module._parameters[name] = own


# -------------------------------------------------------------------------------------------------------------- telling


def told(model: Any, layers: int, placement: Placement) -> str:
    """Where a placed model lies: `blocks 1-28 on cpu, 29-32 on cuda:0; embeddings and head on cuda:0`."""
    blocks = decoder_blocks(model, trunk(model))
    away = len(blocks) - layers if placement.trunk and not placement.plain else 0
    homes = [
        str(placement.trunk) if n < away else str(next(block.parameters()).device) for n, block in enumerate(blocks)
    ]
    parts, first = [], 1
    for home, same in groupby(homes):
        last = first + len(list(same)) - 1
        parts.append(f"{first}-{last} on {home}" if last > first else f"{first} on {home}")
        first = last + 1
    return f"blocks {', '.join(parts)}; embeddings and head on {embeddings(model).device}"
