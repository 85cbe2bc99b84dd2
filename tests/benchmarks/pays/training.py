"""One training run with given token weights, and what it leaves: target loss, retention loss, answers.

AdamW on all weights in float32, products in bfloat16 (autocast), constant rate. The loss of a step is the mean over its
batch's tokens weighed by their weights. Every selection gets the same batches in the same order at one seed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import lines
import numpy as np
import torch
from numpy.typing import NDArray
from settings import MODEL, Row, Setting
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, logsigmoid
from torch.overrides import TorchFunctionMode

from alphatoken_curate.models.load import find_model, load_model

Weights = list[NDArray[np.float32]]
"""Of each training row (or branch) the weight of each token, (T,); 0 off the response."""

BETA = 0.1

_LOGITS_AT_ONCE = 8 * 49152
"""So many stay in a core's cache."""


def load() -> Any:
    """The model that every run starts from, trainable, float32."""
    return copy.deepcopy(_start())


@cache
def _start() -> Any:
    model = load_model(find_model(MODEL), dtype=torch.float32, device=torch.device("cpu")).requires_grad_(True)
    # Its weights are plain by now, but transformers saves and trains nothing that was read from GGUF.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def losses(model: Any, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """nll in nats, whether the token is the likeliest, and the row of each response token of some rows: (N,) each."""
    logits, targets, which = predictions(model, rows)
    return nll_of(logits, targets), likeliest(logits, targets), which


def nll_of(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """nll in nats (N,) of ids (N,) by logits (N, V). A few tokens at once, from a core's cache, are 7 times faster."""
    size = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    parts = zip(logits.split(size), targets.split(size), strict=True)
    return torch.cat([cross_entropy(some.float() / temperature, ids, reduction="none") for some, ids in parts])


def likeliest(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether ids (N,) are what `argmax` says of logits (N, V): the first of the greatest. Argmax is 6 times slower."""
    greatest = logits.amax(-1)
    found = logits.gather(-1, targets[:, None])[:, 0] == greatest
    for i in found.nonzero()[:, 0].tolist():
        found[i] = not (logits[i, : targets[i]] == greatest[i]).any()
    return found


def predictions(model: Any, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, V), ids (N,) and rows (N,) of the response tokens of some rows."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    response = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.from_numpy(row.ids)
        response[i, : len(row.ids)] = torch.from_numpy(row.response)
    with torch.autocast("cpu", torch.bfloat16), products():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][response[:, 1:]])
    return logits, ids[response], response.nonzero()[:, 0]


def products() -> AbstractContextManager[object]:
    """How linear layers multiply in autocast: as torch does, or without bfloat16 in hardware by `ByFloat32`."""
    return nullcontext() if lines.multiplied_in() == "bfloat16" else ByFloat32()


class ByFloat32(TorchFunctionMode):
    """In autocast, products of linear layers without bias in bfloat16, multiplied and summed in float32.

    Faster than torch emulates them. Inputs, products and their gradients are rounded where the hardware rounds them.
    Sums are made in another order, and gradients of a weight that is used twice are summed in float32.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = func is linear and len(args) == 3 and args[2] is None and not kwargs
        if not plain or args[0].dtype is torch.float64 or not torch.is_autocast_enabled("cpu"):
            return func(*args, **(kwargs or {}))
        return _Product.apply(args[0].bfloat16(), args[1].bfloat16())  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        with torch.autocast("cpu", enabled=False):
            return (x.float() @ weight.float().T).bfloat16()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        wide, last = grad.float(), x.shape[-1]
        left = (wide @ weight.float()).bfloat16()
        return left, (wide.reshape(-1, grad.shape[-1]).T @ x.float().reshape(-1, last)).bfloat16()


def measure(model: Any, setting: Setting, reference: Sequence[Tensor] | None = None) -> dict[str, float]:
    """Mean loss over response tokens of held and retention rows; of pairs also DPO's loss and those ordered right."""
    with torch.no_grad():
        found = dict[str, float]()
        held = setting.held[::2] if setting.pairs else setting.held
        nll, right, _ = _parts(model, held)
        found["target_loss"], found["token_accuracy"] = float(nll.mean()), float(right.float().mean())
        found["retention_loss"] = float(_parts(model, setting.retention)[0].mean())
        if setting.pairs:
            assert reference is not None
            margins = [
                BETA * float((a - b)[0] - (a - b)[1])
                for a, b in zip(_pair_sums(model, setting.held), reference, strict=True)
            ]
            found["dpo_loss"] = float(np.mean([math.log1p(math.exp(-m)) for m in margins]))
            found["pair_accuracy"] = float(np.mean([m > 0 for m in margins]))
        return found


def train(
    model: Any,
    setting: Setting,
    weights: Weights,
    *,
    seed: int,
    measure_every: int,
    measure_start: bool = False,
    refresh_every: int = 0,
    refresh: Callable[[Any, int], Weights] | None = None,
    steps: int | None = None,
) -> list[dict[str, float]]:
    """Train, and measure every so many steps, at the end and if asked at the start. `refresh` gives new weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, weight_decay=0.0, fused=True)
    reference = reference_sums(model, setting)
    order = batches(setting, seed)[:steps]
    curve = [{"step": 0, "kept": 0, **measure(model, setting, reference[1])}] if measure_start else []
    kept = 0
    for step, chosen in enumerate(order, start=1):
        if refresh is not None and step > 1 and (step - 1) % refresh_every == 0:
            weights = refresh(model, step - 1)
        loss, count = loss_of(model, setting, weights, chosen, reference[0])
        kept += count
        if count:
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        optimizer.zero_grad()
        if step % measure_every == 0 or step == len(order):
            curve.append({"step": step, "kept": kept, **measure(model, setting, reference[1])})
    return curve


def batches(setting: Setting, seed: int) -> list[list[int]]:
    """Rows (or pairs) of each step."""
    units = len(setting.train) // (2 if setting.pairs else 1)
    draws = np.random.default_rng(seed)
    order = np.concatenate([draws.permutation(units) for _ in range(setting.epochs)])
    return [order[i : i + setting.batch].tolist() for i in range(0, len(order) - setting.batch + 1, setting.batch)]


def offered(setting: Setting, seed: int) -> int:
    """Response tokens of all steps, before any selection."""
    size = 2 if setting.pairs else 1
    units = [i for some in batches(setting, seed) for i in some]
    return sum(int(setting.train[size * i + n].response.sum()) for i in units for n in range(size))


def loss_of(
    model: Any, setting: Setting, weights: Weights, chosen: list[int], reference: list[Tensor]
) -> tuple[Tensor, int]:
    """The loss of a step, and how many tokens train in it. DPO masks policy and reference alike."""
    if setting.pairs:
        parts = [_pair_loss(model, setting, weights, i, reference) for i in chosen]
        return torch.stack([loss for loss, _ in parts]).mean(), sum(count for _, count in parts)
    rows = [setting.train[i] for i in chosen]
    weight = torch.from_numpy(np.concatenate([weights[i][setting.train[i].response] for i in chosen]))
    nll, _, _ = losses(model, rows)
    return (weight * nll).sum() / weight.sum().clamp(min=1e-9), int((weight > 0).sum())


def _pair_loss(
    model: Any, setting: Setting, weights: Weights, pair: int, reference: list[Tensor]
) -> tuple[Tensor, int]:
    rows, at = setting.train[2 * pair : 2 * pair + 2], (2 * pair, 2 * pair + 1)
    nll, _, which = losses(model, rows)
    weight = torch.from_numpy(np.concatenate([weights[i][row.response] for i, row in zip(at, rows, strict=True)]))
    gained = weight * (reference[pair] - nll)
    margin = BETA * (gained[which == 0].sum() - gained[which == 1].sum())
    return -logsigmoid(margin), int((weight > 0).sum())


def reference_sums(model: Any, setting: Setting) -> tuple[list[Tensor], list[Tensor]]:
    """Of each training pair the starting model's nll (N,); of each held pair its two branches' sums of log p (2,)."""
    if not setting.pairs:
        return [], []
    with torch.no_grad():
        train = [losses(model, setting.train[i : i + 2])[0] for i in range(0, len(setting.train), 2)]
        return train, _pair_sums(model, setting.held)


def _pair_sums(model: Any, rows: Sequence[Row]) -> list[Tensor]:
    found = []
    for i in range(0, len(rows), 2):
        nll, _, which = losses(model, rows[i : i + 2])
        found.append(-torch.stack([nll[which == 0].sum(), nll[which == 1].sum()]))
    return found


def _parts(model: Any, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    order = sorted(rows, key=lambda row: len(row.ids))
    parts = [losses(model, order[i : i + 8]) for i in range(0, len(order), 8)]
    nll, right, which = (torch.cat(part) for part in zip(*parts, strict=True))
    return nll, right, which
