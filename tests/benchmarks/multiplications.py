"""How many multiplications a job cannot do without: the bound that its seconds are held against.

Counted are the products with the weights of the decoder blocks and of the output head, and those of attention, each
only at the positions where it is needed: forwards of the trunk everywhere, logits, error signals and contractions at
positions that predict a response token (for a backward through the trunk: from the first of them on). Padding,
normalisation, softmax and activations count as nothing, so no implementation reaches the bound. Dense models only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alphatoken_curate.engine.blocks import decoder_blocks, linear_maps, trunk
from alphatoken_curate.tokens.plan import Batch

DIRECTIONS = 2
"""Adaptation and stability."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a model: multiplications a position costs."""

    blocks: int
    block: int
    """Weights of a block's linear maps."""
    head: int
    """Weights of the output head."""
    width: int
    """Query heads times head size: what a query and a key cost in each of attention's two products."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Of rows: positions, and pairs of a query and a key it sees."""

    positions: int
    pairs: int
    live: int
    """Positions from the first that predicts a response token on."""
    live_pairs: int
    responses: int


def shape_of(model: Any) -> Shape:
    """The shape of a dense decoder. Its blocks must be alike."""
    config = model.config.get_text_config()
    blocks = decoder_blocks(model, trunk(model))
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        blocks=len(blocks),
        block=sum(m.weight.numel() for m in linear_maps(model, blocks[0])),
        head=model.get_output_embeddings().weight.numel(),
        width=config.num_attention_heads * size,
    )


def work_of(batches: Sequence[Batch]) -> Work:
    """Positions and pairs of the rows of some batches, without their padding."""
    lengths, starts, responses = [], [], 0
    for batch in batches:
        for i in range(len(batch.rows)):
            mine = batch.position[batch.row == i]
            lengths.append(mine.max() + 1)
            starts.append(mine.min())
            responses += len(mine)
    length, start = np.array(lengths), np.array(starts)
    pairs, before = length * (length + 1) // 2, start * (start + 1) // 2
    return Work(
        positions=int(length.sum()),
        pairs=int(pairs.sum()),
        live=int((length - start).sum()),
        live_pairs=int((pairs - before).sum()),
        responses=responses,
    )


def multiplications(job: str, shape: Shape, work: Work) -> int:
    """Multiplications of a job on rows: `forward`, `training step`, or layers and estimator, as `3 exact`."""
    attention = 2 * shape.width
    trunk = shape.blocks * (shape.block * work.positions + attention * work.pairs)
    if job in ("forward", "training step"):
        # An error signal and a weight's gradient cost as much as the forward; so do attention's two backwards.
        return (1 if job == "forward" else 3) * (trunk + shape.head * work.positions)
    layers, estimator = job.split()[:2]
    blocks = shape.blocks if layers == "all" else int(layers)
    losses = 2 * shape.head * work.responses
    if estimator == "influence":
        # Of each direction W h' and M h; Q' K, Q K', P' V and P V'.
        each = blocks * (2 * shape.block * work.positions + 2 * attention * work.pairs)
        return trunk + losses + DIRECTIONS * each
    contraction = DIRECTIONS * blocks * shape.block * work.responses
    backward = blocks * (shape.block * work.live + 2 * attention * work.live_pairs)
    # The second backward takes no gradient to other keys and values.
    second = blocks * (shape.block * work.live + attention * work.live_pairs) if estimator == "exact" else 0
    return trunk + losses + contraction + backward + second
