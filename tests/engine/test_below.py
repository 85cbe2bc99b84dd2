from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from alphatoken_curate.directions.shelves import Scratch
from alphatoken_curate.engine.below import Below
from alphatoken_curate.engine.blocks import decoder_blocks, trunk


def parts(family: str) -> tuple[Any, list[Any], list[int]]:
    """A model, its blocks, and a list that gets a number whenever the first of them runs."""
    model = tiny_model(family, dtype=torch.float32).requires_grad_(False)
    blocks, ran = decoder_blocks(model, trunk(model)), list[int]()
    next(blocks[0].children()).register_forward_hook(lambda *_: ran.append(1))
    return model, blocks, ran


def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_what_is_kept_is_not_run_again_and_gives_the_same_bits(family: str) -> None:
    model, blocks, ran = parts(family)
    one, other = torch.arange(3, 15).view(2, 6), torch.arange(9, 19).view(2, 5)
    wanted = [logits(model, ids) for ids in (one, other)]
    below = Below(blocks[:2])
    ran.clear()
    for _ in range(3):
        for key, ids in enumerate((one, other)):
            with below.kept(key):
                assert torch.equal(logits(model, ids), wanted[key])
    assert len(ran) == 2
    assert torch.equal(logits(model, one), wanted[0]) and len(ran) == 3


def test_what_was_used_longest_ago_makes_room() -> None:
    model, blocks, ran = parts("gpt2")
    ids = torch.arange(3, 13).view(2, 5)
    below = Below(blocks[:3], room=2 * 2 * 5 * 16 * 4)
    for key in (0, 1, 0, 2):
        with below.kept(key):
            logits(model, ids)
    ran.clear()
    for key, again in ((0, 0), (2, 0), (1, 1)):
        with below.kept(key):
            logits(model, ids)
        assert len(ran) == again
        ran.clear()


def test_what_is_given_is_gone_on_with_and_the_last_batch_is_there_whatever_the_room() -> None:
    model, blocks, ran = parts("gpt2")
    one, other = torch.arange(3, 15).view(2, 6), torch.arange(9, 19).view(2, 5)
    below = Below(blocks[:2], room=1)
    for key, ids in enumerate((one, other)):
        with below.kept(key):
            wanted = logits(model, ids)
    assert below.output(0) is None
    ran.clear()
    with below.given(below.output(1)):
        assert torch.equal(logits(model, other), wanted)
    with below.given(below.output(1)[1:]):
        torch.testing.assert_close(logits(model, other[1:]), wanted[1:])
    assert not ran
    with pytest.raises(KeyError), below.given(below.output(1)):
        raise KeyError
    logits(model, one)
    assert len(ran) == 1


def test_what_leaves_memory_lies_on_a_shelf_until_it_is_forgotten(tmp_path: Path) -> None:
    model, blocks, ran = parts("gpt2")
    each = [torch.arange(3 + n, 15 + n).view(2, 6) for n in range(4)]
    wanted = [logits(model, ids) for ids in each]
    below = Below(blocks[:2], room=2 * 2 * 6 * 16 * 4)
    below.shelf = Scratch(tmp_path, "cpu")
    ran.clear()
    for _ in range(3):
        for key, ids in enumerate(each):
            with below.kept(key):
                assert torch.equal(logits(model, ids), wanted[key])
            assert below._held <= below.room and len(below._kept) <= 2
    assert len(ran) == 4
    assert len(list(tmp_path.iterdir())) == 4
    below.forget([1, 3, 99])
    assert below.output(1) is None and below.output(0) is not None and len(list(tmp_path.iterdir())) == 2
    below.forget()
    assert below._held == 0 and not below._kept and not list(tmp_path.iterdir())


def test_without_blocks_nothing_is_kept() -> None:
    model, _, ran = parts("gpt2")
    below = Below([])
    for _ in range(2):
        with below.kept(0):
            logits(model, torch.arange(3, 8)[None])
    assert len(ran) == 2


def test_an_error_inside_leaves_the_blocks_as_they_were() -> None:
    model, blocks, ran = parts("gpt2")
    below, ids = Below(blocks[:2]), torch.arange(3, 8)[None]
    own = blocks[1].forward = lambda *args, **kwargs: type(blocks[1]).forward(blocks[1], *args, **kwargs)
    for _ in range(2):
        with pytest.raises(KeyError), below.kept(0):
            logits(model, ids)
            raise KeyError
    ran.clear()
    logits(model, ids)
    assert ran and "forward" not in vars(blocks[0]) and vars(blocks[1])["forward"] is own


def test_what_is_computed_in_another_way_is_not_kept_but_may_begin_from_what_is() -> None:
    model, blocks, ran = parts("gpt2")
    below, ids = Below(blocks[:2]), torch.arange(3, 8)[None]
    for new, runs in ((False, 1), (True, 2), (False, 2)):
        with below.kept(0, new=new):
            logits(model, ids)
        assert len(ran) == runs
