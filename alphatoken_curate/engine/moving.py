"""The weights of S along some directions at once: each carries a tangent for every one of them, in forward mode.

The model runs once, without a graph: alive at a time are one block's activations and their tangents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from alphatoken_curate.engine import tangent_attention, tangent_rules  # noqa: F401  (importing them registers their rules)
from alphatoken_curate.engine.capture import Direction, ScoringModel
from alphatoken_curate.engine.tangents import Dual, dual, parts


class Moving:
    """A model whose weights in S move along directions."""

    def __init__(self, scoring: ScoringModel, directions: Sequence[Direction]) -> None:
        self.scoring, self._weights = scoring, _moving(scoring, directions)

    def settle(self) -> None:
        """Compute as the model does from here on (`ScoringModel.settle`)."""
        self.scoring.settle()
        for n, (module, name, moving) in enumerate(self._weights):
            parameter, (_, tangents) = module._parameters[name], parts(moving)
            assert parameter is not None
            self._weights[n] = module, name, dual(parameter.detach(), [t.to(parameter.dtype) for t in tangents])

    def hidden(self, input_ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Last hidden states (B, T, D) of right-padded `input_ids` (B, T), and their tangents along each direction."""
        with self.swapped():
            return parts(self.scoring.hidden(input_ids))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The weights of S carry their tangents inside this block."""
        held = [(module, name, module._parameters[name]) for module, name, _ in self._weights]
        try:
            for module, name, moving in self._weights:
                module._parameters[name] = moving  # type: ignore[assignment]
            yield
        finally:
            for module, name, parameter in held:
                module._parameters[name] = parameter


def _moving(scoring: ScoringModel, directions: Sequence[Direction]) -> list[tuple[nn.Module, str, Dual]]:
    """Each parameter of S and its tangents, wherever the model holds it: (module, name there, parameter)."""
    moved: dict[nn.Parameter, list[Tensor]] = {}
    for index, m in enumerate(scoring.maps):
        each = moved.setdefault(m.bare, [])
        for n, direction in enumerate(directions):
            matrix = direction[index].to(m.bare)
            if m.expert is None:
                each.append(matrix.t() if m.transposed else matrix)
                continue
            if len(each) <= n:
                each.append(torch.zeros_like(m.bare, requires_grad=False))
            each[n][m.expert] = matrix.t() if m.transposed else matrix
    for index, parameter in enumerate(scoring.rest.values(), start=len(scoring.maps)):
        moved[parameter] = [direction[index].to(parameter) for direction in directions]
    return [
        (module, name, dual(parameter.detach(), moved[parameter]))
        for module in scoring.model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter in moved
    ]
