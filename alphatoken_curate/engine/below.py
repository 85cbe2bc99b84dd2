"""What blocks that do not train give, kept: a rehearsal asks for the same batch three times."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from alphatoken_curate.engine.tangents import leaves

ROOM = 1 << 30
"""Bytes that are kept; what was used longest ago goes first."""


class Below:
    """Some of a model's first blocks, whose output for a batch is computed once while there is room for it."""

    def __init__(self, blocks: list[nn.Module], room: int = ROOM) -> None:
        self.blocks, self.room = blocks, room
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    @contextmanager
    def kept(self, key: Hashable, *, new: bool = True) -> Iterator[None]:
        """Inside this block a forward of the batch that `key` stands for begins above these blocks, if it can.

        Without `new` what is not kept yet is not kept now: it is computed in another way than is asked for later.
        """
        if not self.blocks or not (new or key in self._kept):
            yield
            return
        undo = self._skip(self._kept[key]) if key in self._kept else self._listen(key)
        try:
            yield
        finally:
            undo()
        if key in self._kept:
            self._kept.move_to_end(key)
        while sum(map(_bytes, self._kept.values())) > self.room:
            self._kept.popitem(last=False)

    def _listen(self, key: Hashable) -> Any:
        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            self._kept[key] = output

        return self.blocks[-1].register_forward_hook(note).remove

    def _skip(self, output: Any) -> Any:
        """Have each of the blocks give what the last of them gave; only that goes on."""
        held = [vars(block).get("forward") for block in self.blocks]
        for block in self.blocks:
            block.forward = lambda *_, **__: output

        def undo() -> None:
            for block, forward in zip(self.blocks, held, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward

        return undo


def _bytes(output: Any) -> int:
    return sum(x.nbytes for x in leaves(output) if isinstance(x, Tensor))
