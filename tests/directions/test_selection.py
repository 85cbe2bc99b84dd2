from __future__ import annotations

import pytest
import torch

from alphatoken_curate.directions.selection import Selection


@pytest.mark.parametrize("positions", [[], [0], [1, 4, 5], list(range(8))])
@pytest.mark.parametrize("where", [None, [], [2], [0, 1, 5, 7], list(range(8))])
def test_selected_rows_are_those_at_the_positions(positions: list[int], where: list[int] | None) -> None:
    chosen = Selection(torch.tensor(positions, dtype=torch.int64), 8)
    held = list(range(8)) if where is None else where
    one, two = torch.randn(len(held), 3), torch.randn(len(held), 2)
    given = None if where is None else torch.tensor(where, dtype=torch.int64)
    places, (first, second) = chosen.rows(given, one, two)
    both = [p for p in held if p in positions]
    assert torch.equal(first, one[[held.index(p) for p in both]])
    assert torch.equal(second, two[[held.index(p) for p in both]])
    assert (list(range(len(positions))) if places is None else places.tolist()) == [positions.index(p) for p in both]


def test_tensors_of_another_device_are_selected_there() -> None:
    """Of two devices that there are everywhere."""
    chosen, meta = Selection(torch.tensor([1, 4, 5]), 8), torch.device("meta")
    _, (found,) = chosen.rows(None, torch.empty(8, 3, device=meta))
    assert (found.shape, found.device) == ((3, 3), meta)
    _, (found,) = chosen.rows(None, torch.arange(8.0)[:, None])
    assert found.flatten().tolist() == [1, 4, 5]


def test_where_every_position_is_selected_nothing_is_copied() -> None:
    x = torch.randn(4, 2)
    places, (found,) = Selection(torch.arange(4), 4).rows(None, x)
    assert places is None
    assert found is x
