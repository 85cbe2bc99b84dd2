"""Where a model's blocks lie: nothing of it changes a bit, and no operation meets tensors of two devices."""

from __future__ import annotations

import gc
import importlib.util
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from directed import directions as directions_of
from directed import random_direction
from tiny import tiny_model, tiny_rows
from tiny_adapters import save_adapter
from tiny_files import plain_llama, quiet, save_gguf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alphatoken_curate.directions.drift import drift_direction
from alphatoken_curate.directions.fisher import fisher_sums
from alphatoken_curate.directions.parameters import rest_fisher_sums, rest_sums
from alphatoken_curate.directions.precondition import factor_sums, moment_sums
from alphatoken_curate.directions.target import target_sums
from alphatoken_curate.engine.capture import Direction, ScoringModel
from alphatoken_curate.engine.moving import Moving
from alphatoken_curate.engine.placement import Placement, deal, load_placed, place, told
from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.load import find_model
from alphatoken_curate.signals.influence import InfluenceScorer
from alphatoken_curate.signals.paths import PathScorer, _stack
from alphatoken_curate.signals.stored import losses_of
from alphatoken_curate.tokens.plan import collate

CPU, META = torch.device("cpu"), torch.device("meta")
ON_DISK = Placement(devices=(CPU,), trunk="disk")
DEALT = Placement(devices=(torch.device("cpu", 0), torch.device("cpu", 1)))
"""Two names of one device: all that a pipeline does is done."""


def saved(family: str, folder: Path) -> str:
    with quiet():
        tiny_model(family, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def loaded(name: str, placement: Placement, layers: Any = 2, dtype: torch.dtype = torch.float32) -> Any:
    return load_placed(find_model(name), placement, dtype=dtype, layers=layers, directions=2)


# ------------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral", "gemma3_text"])
def test_a_model_says_the_same_wherever_its_blocks_lie(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Of plain and tied embeddings, buffers in blocks, experts that are put together on loading, two kinds of masks."""
    name, ids = saved(family, tmp_path), torch.arange(2 * 15).reshape(2, 15) % 61
    plain = loaded(name, Placement(devices=(CPU,)), dtype=dtype)(ids).logits
    for placement in (ON_DISK, DEALT, Placement(devices=DEALT.devices, trunk="disk")):
        model = loaded(name, placement, dtype=dtype)
        assert torch.equal(model(ids).logits, plain)
        below = [p.device.type for p in model.base_model.get_submodule(_blocks(model))[0].parameters()]
        assert set(below) == {"meta" if placement.trunk else "cpu"}, "nothing is kept of what was fetched"


def _blocks(model: Any) -> str:
    return "h" if hasattr(model.base_model, "h") else "layers"


def test_weights_that_tie_stay_tied_and_no_other_module_is_touched(tmp_path: Path) -> None:
    model = loaded(saved("qwen2", tmp_path), Placement(devices=DEALT.devices, trunk="disk"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [len(m._forward_pre_hooks) for m in model.model.layers] == [2, 2, 1, 1]
    hooks = [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks or hasattr(m, "_hf_hook")]
    assert hooks == list(model.model.layers), "accelerate leaves none"


def test_blocks_that_are_fetched_are_let_go_of_when_they_fail(tmp_path: Path) -> None:
    model = loaded(saved("llama", tmp_path), ON_DISK)

    def fails(*_: Any) -> None:
        raise MemoryError

    model.model.layers[0].mlp.down_proj.register_forward_hook(fails)
    with pytest.raises(MemoryError):
        model(torch.arange(6)[None])
    assert all(p.device == META for p in model.model.layers[0].parameters())


def test_the_temporary_folder_of_experts_goes_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "models").mkdir()
    model = loaded(saved("mixtral", tmp_path / "models"), ON_DISK)
    (kept,) = tmp_path.glob("alphatoken-*")
    assert len(list(kept.glob("*experts*"))) == 2 * 2, "gate_up_proj and down_proj of two blocks"
    del model
    gc.collect()
    assert not kept.exists()


# --------------------------------------------------------------------------------------------------- what cannot lie so


def test_what_cannot_be_placed_is_refused_by_name(tmp_path: Path) -> None:
    gguf, folder = save_gguf(plain_llama(), tmp_path / "m.gguf"), saved("llama", tmp_path / "llama")
    for name, placement, layers, says in (
        (gguf, ON_DISK, 2, "m.gguf: a GGUF file is unpacked .* --trunk-device cpu"),
        (folder, ON_DISK, 4, r"--trunk-device with --layers 4: all 4 blocks .* --layers 3 or less"),
        (folder, ON_DISK, "all", r"--trunk-device with --layers all"),
        (folder, Placement(devices=DEALT.devices, trunk="disk"), 1, r"--device: 2 devices for 1 block"),
    ):
        with pytest.raises(ModelError, match=says):
            loaded(name, placement, layers)
    assert torch.equal(
        loaded(gguf, Placement(devices=(CPU,)))(torch.arange(6)[None]).logits,
        loaded(gguf, DEALT)(torch.arange(6)[None]).logits,
    )


def test_adapters_are_refused_where_they_would_be_merged_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    save_adapter(saved("llama", tmp_path / "base"), tmp_path / "lora")
    for placement, asked in ((ON_DISK, "--trunk-device disk"), (DEALT, "several devices")):
        with pytest.raises(ModelError, match=f"an adapter is merged .*, not with {asked}"):
            loaded(str(tmp_path / "lora"), placement)


def test_without_accelerate_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, own = saved("llama", tmp_path), importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda what: None if what == "accelerate" else own(what))
    with pytest.raises(ModelError, match=r"needs the package accelerate.* 'alphatoken-curate\[disk\]'"):
        loaded(name, ON_DISK)


# -------------------------------------------------------------------------------------------------------------- dealing


def test_the_fullest_device_holds_as_little_as_can_be() -> None:
    draw = random.Random(0)
    for _ in range(200):
        sizes = [draw.randint(1, 9) for _ in range(draw.randint(1, 8))]
        devices, beside = draw.randint(1, len(sizes)), draw.randint(0, 20)
        counts = deal(sizes, beside, devices)
        assert sum(counts) == len(sizes) and len(counts) == devices and min(counts) >= 1
        borders = combinations(range(1, len(sizes)), devices - 1)
        assert _fullest(sizes, beside, counts) == min(
            _fullest(sizes, beside, [b - a for a, b in zip((0, *cut), (*cut, len(sizes)), strict=True)])
            for cut in borders
        )


def _fullest(sizes: list[int], beside: int, counts: Any) -> int:
    left, loads = list(sizes), []
    for n in counts:
        loads.append(sum(left[:n]))
        left = left[n:]
    return max(*loads[:-1], loads[-1] + beside) if len(loads) > 1 else loads[0] + beside


# ------------------------------------------------------------------------------------------------------- of two devices


class OneDeviceEach(TorchDispatchMode):
    """Any operation on tensors of two devices is an error, as between cards. What comes from meta has no numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func is torch.ops.aten._to_copy.default:
            x, wanted = args[0], kwargs.get("device") or args[0].device
            if x.device != wanted:
                return torch.zeros(x.shape, dtype=kwargs.get("dtype") or x.dtype, device=wanted)
        if len({x.device for x in given}) > 1:
            raise RuntimeError(f"{func}: {[(x.device.type, tuple(x.shape)) for x in given]}")
        return func(*args, **kwargs)


@contextmanager
def apart(model: Any, layers: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model over two devices. The first is meta, the second the CPU: others there are none without a card."""
    # What a block of queries may see of later keys is asked of the numbers of its mask.
    monkeypatch.setattr("alphatoken_curate.engine.probabilities._any_seen", lambda _: True)
    place(model, Placement(devices=(META, CPU)), layers=layers, directions=2)
    with OneDeviceEach():
        yield


def beside_weights(scoring: ScoringModel, direction: Direction) -> Direction:
    """A direction as it is read from an artefact."""
    return list(scoring.near(dict(zip(scoring.names, direction, strict=True))).values())


def on_devices_of(scoring: ScoringModel, direction: Direction) -> bool:
    return [x.device for x in direction] == [w.device for w in scoring.weights]


def test_no_step_of_the_paths_meets_tensors_of_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model("llama", dtype=torch.float32), tiny_rows()
    scoring = ScoringModel(model, 3)
    drawn = [random_direction(scoring, 1), random_direction(scoring, 2)]
    exact, published = (PathScorer(scoring, drawn, name, 32) for name in ("exact", "published"))  # type: ignore[arg-type]
    batch = collate(rows, range(4))
    with apart(model, 3, monkeypatch):
        assert told(model, 3, Placement(devices=(META, CPU))) == (
            "blocks 1-2 on meta, 3-4 on cpu; embeddings and head on cpu"
        )
        assert {w.device for w in scoring.weights} == {META, CPU}
        directions = [beside_weights(scoring, direction) for direction in drawn]
        assert all(on_devices_of(scoring, direction) for direction in directions)
        for whole in (True, False):
            assert on_devices_of(scoring, target_sums(scoring, [batch], all_positions=whole)[0])
        fisher, _ = fisher_sums(scoring, rows, [batch], sampled=True, seed=0)
        assert on_devices_of(scoring, fisher)
        drift = drift_direction(scoring, fisher, [torch.zeros_like(w, device=CPU) for w in scoring.weights], fisher)
        assert on_devices_of(scoring, drift)
        factors = factor_sums(scoring, [batch])
        assert on_devices_of(scoring, factors.inputs) and on_devices_of(scoring, factors.outputs)
        parts = {"input_vectors": factors.inputs, "output_vectors": factors.outputs}
        stored = {
            f"{m.parameter}.{part}": x[i].to(CPU) for part, x in parts.items() for i, m in enumerate(scoring.maps)
        }
        assert on_devices_of(scoring, moment_sums(scoring, [batch], bases=scoring.near(stored))[0])
        for scorer in (exact, published):
            each = enumerate(zip(*directions, strict=True))
            scorer.stacks = [[_stack(list(ms), scorer is exact or i in scorer.values)] for i, ms in each]
            homes = {i: scoring.maps[i].weight.device for i in scorer.values}
            scorer.values = {i: (n, x.to(homes[i])) for i, (n, x) in scorer.values.items()}
            scorer.settle()
            signals = scorer.score(batch)
            assert signals.direct is not None and signals.causal is not None
            assert {x.device for x in (signals.nll, signals.direct, signals.causal)} == {CPU}
            assert signals.direct.shape == signals.causal.shape == (2, len(batch.target))
        assert losses_of(scoring, batch).nll.device == CPU


@pytest.mark.one_in(2)
@pytest.mark.parametrize("parameters", ["linear", "all"])
def test_no_step_of_the_influence_meets_tensors_of_two_devices(
    parameters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = tiny_model("qwen2", dtype=torch.float32), tiny_rows()
    scoring = ScoringModel(model, 3, parameters)
    drawn = directions_of(scoring)
    scorer = InfluenceScorer(scoring, drawn)
    batch = collate(rows, range(4))
    with apart(model, 3, monkeypatch):
        scoring.rest = {name: model.get_parameter(name) for name in scoring.rest}
        directions = [beside_weights(scoring, direction) for direction in drawn]
        assert {x.device for x in directions[0]} == {META, CPU}
        scorer.moving = Moving(scoring, directions)
        signals = scorer.score(batch)
        assert signals.influence is not None and signals.influence.shape == (2, len(batch.target))
        assert signals.influence.device == CPU
        if scoring.rest:
            found = rest_sums(scoring, [batch])[0]
            found_too = rest_fisher_sums(scoring, rows[:2], sampled=True, seed=0)
            homes = [p.device for p in scoring.rest.values()]
            assert [x.device for x in found] == [x.device for x in found_too] == homes and set(homes) == {META, CPU}
