"""Which linear map of a scoring block makes the values of its attention: what `published` propagates through."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alphatoken_curate.engine.capture import ScoringModel, probe_ids


def find_value_rows(scoring: ScoringModel) -> list[tuple[int, Tensor] | str]:
    """For each block of S, (index of the map that makes the values, its rows in the order of heads), or why not.

    Found by looking: a row of a linear map's output that carries, bit for bit, what attention received as values.
    Head h, feature j of the values is row `rows[h * D + j]`.
    """
    outputs: dict[int, Tensor] = {}
    hooks = [
        m.module.register_forward_hook(lambda _, __, z, i=i: outputs.__setitem__(i, z.detach().flatten(0, -2)))
        for i, m in enumerate(scoring.maps)
        if m.called
    ]
    try:
        with scoring.graph(probe_ids(scoring.model)):
            values = {call.module: call.value.detach() for call in scoring.tape.calls}
    finally:
        for hook in hooks:
            hook.remove()
    return [_match_values(scoring, block, outputs, values) for block in scoring.blocks]


def _match_values(
    scoring: ScoringModel, block: nn.Module, outputs: dict[int, Tensor], values: dict[nn.Module, Tensor]
) -> tuple[int, Tensor] | str:
    inside = set(block.modules())
    value = next(v for module, v in values.items() if module in inside)
    wanted = [bytes(v) for v in value.permute(1, 3, 0, 2).flatten(0, 1).flatten(1).contiguous().cpu().numpy()]
    for index, output in outputs.items():
        linear = scoring.maps[index]
        if linear.module not in inside:
            continue
        rows = _rows_of(wanted, [bytes(z) for z in output.t().contiguous().cpu().numpy()])
        if min(rows) < 0:
            continue
        if len(set(rows)) < len(rows):
            return f"{linear.name}: its values are shared between heads"
        if linear.weight.shape[1] != scoring.model.config.get_text_config().hidden_size:
            return f"{linear.name}: it makes values from a latent, not from the block's input"
        return index, torch.tensor(rows, device=value.device)
    return "attention does not receive the plain output of one linear map as its values"


def _rows_of(wanted: list[bytes], outputs: list[bytes]) -> list[int]:
    """Which output each value is, -1 where none is. Equal ones (rows that were pruned) are told by their order."""
    number = len(wanted)
    starts = [i for i, one in enumerate(outputs) if one == wanted[0] and outputs[i : i + number] == wanted]
    if len(starts) == 1:
        return [*range(starts[0], starts[0] + number)]
    found = {one: row for row, one in enumerate(outputs)}
    return [found.get(one, -1) for one in wanted]
