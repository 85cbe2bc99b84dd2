"""The arithmetic of tests/benchmarks/pays, and that the tables of results/README.md are those of its result lines."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

ROOT = Path(__file__).parents[3]


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tests/benchmarks/pays"))
    return importlib.import_module


def test_the_page_has_every_table_of_the_result_lines(pays: Any) -> None:
    tables = pays("tables")
    text = tables.PAGE.read_text(encoding="utf-8")
    marked = {(name, setting) for _, name, setting, _ in tables.MARKED.findall(text)}
    assert marked == {(name, one["config"]["setting"]) for name in tables.TABLES for one in pays("lines").read(name)}
    assert tables.filled(text) == text, "run: python tests/benchmarks/pays/tables.py --readme"


@pytest.fixture
def data(smollm2_tokenizer: Any) -> Path:
    """The folder of the real rows, which the tokenizer of the model cuts."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real rows in {folder}")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("name", ["outcome", "counterfactual", "fidelity"])
def test_lines_are_of_the_settings_as_they_are(name: str, pays: Any, data: Path) -> None:
    for line in pays("lines").read(name):
        assert line["config"]["about"] == pays("settings").about(line["config"]["setting"], data)


def test_lines_are_of_the_selections_as_they_are(pays: Any) -> None:
    selections = pays("grid").SELECTIONS
    for line in pays("lines").read("outcome"):
        told = selections[line["config"]["selection"]].about()
        assert {name: line["config"][name] for name in told} == told


@pytest.mark.long
def test_lines_of_the_first_look_are_of_its_settings_as_they_are(pays: Any, data: Path) -> None:
    first_look = pays("first_look")
    for line in pays("lines").read("rehearsal"):
        told = line["config"]
        where = first_look.trained(told["setting"], told["training"], data)
        assert told == first_look.config_of(where, told["selection"], told["training"])


SPLIT_SETTINGS = [
    f"{split} {noise}{size}" for split in "AB" for noise in ("digits", "model-wrong") for size in ("", " 128")
]


EVERY_SETTING = [
    "clean",
    "corrupted",
    "lightly",
    "mixture",
    "narrow",
    "preference",
    "pairs",
    *SPLIT_SETTINGS,
    "D swapped 128",
    "B words second",
    "B mixture 128",
]


@pytest.mark.long
@pytest.mark.parametrize("name", EVERY_SETTING)
def test_what_is_measured_on_trains_nothing(name: str, pays: Any, data: Path) -> None:
    where = pays("settings").setting(name, data)
    parts = ("train", "held", "target", "retention", "remember", "beside")
    rows = [row.ids.tobytes() for part in parts for row in getattr(where, part)]
    assert len(where.train) >= 64 and len(where.held) >= 48
    assert len(set(rows)) == len(rows)


@pytest.mark.long
def test_no_row_is_in_two_splits(pays: Any, data: Path) -> None:
    settings = pays("settings")
    dealt = settings.splits(data)
    parts = [*dealt.train.values(), dealt.validation, dealt.test, dealt.target, *dealt.wrong.values()]
    assert [len(part) for part in parts] == [128] * 4 + [48, 208, 244] + [52] * 4
    questions = [row.ids[: row.response.argmax()].tobytes() for part in parts for row in part]
    assert len(set(questions)) == len(questions)
    before = settings.setting("clean", data)
    seen = {row.ids.tobytes() for row in (*before.train, *before.held)}
    later = [*(dealt.train[name] for name in "BCD"), dealt.test, dealt.target]
    assert not seen & {row.ids.tobytes() for part in later for row in part}


@pytest.mark.long
def test_noise_of_half_of_a_split_is_that_of_all_of_it(pays: Any, data: Path) -> None:
    settings = pays("settings")
    clean = settings.setting("A clean 128", data).train
    for noise, bad in {"digits": None, "words": None, "swapped": 19, "model-wrong": 26}.items():
        whole, *halves = (settings.setting(f"A {noise}{size}", data).train for size in (" 128", "", " second"))
        assert [row.ids.tobytes() for row in whole] == [row.ids.tobytes() for half in halves for row in half]
        if bad:
            for rows in (whole[:64], whole[64:]):
                assert sum(not row.good.any() for row in rows) == bad
        for row, other in zip(clean, whole, strict=True):
            assert (row.ids.tobytes() == other.ids.tobytes()) == bool((other.response == other.good).all())


def test_measures_of_a_ranking_against_plain_loops(pays: Any) -> None:
    fidelity = pays("fidelity")
    draws = np.random.default_rng(0)
    x, effect = draws.integers(0, 12, 40).astype(float), draws.normal(size=40)
    good = draws.random(40) < 0.7
    pairs = list(itertools.product(x[good], x[~good]))
    assert math.isclose(fidelity.area(x, good), sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs))

    def plain_ranks(values: Any) -> list[float]:
        return [sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values]

    wanted = np.corrcoef(plain_ranks(x), plain_ranks(effect))[0, 1]
    assert math.isclose(fidelity.spearman(x, effect), wanted)
    assert fidelity.positive_kept(effect, effect) == pytest.approx(
        sum(sorted(effect.clip(0))[-20:]) / sum(effect.clip(0))
    )


def test_what_is_dropped_has_no_weight(pays: Any) -> None:
    settings, counterfactual = pays("settings"), pays("counterfactual")
    rows = [
        settings.Row(ids=np.arange(4, dtype=np.int32), response=np.array(r, bool), good=np.array(r, bool))
        for r in ([0, 1, 1, 0], [0, 0, 1, 1])
    ]
    where = settings.Setting(
        name="clean",
        train=rows,
        target=[],
        held=[],
        retention=[],
        remember=[],
        beside=[],
        learning_rate=1.0,
        epochs=1,
        batch=1,
    )
    weights = counterfactual._without(where, np.array([True, False, False, True]))
    assert [w.tolist() for w in weights] == [[0, 0, 1, 0], [0, 0, 1, 0]]


def test_products_by_float32_are_rounded_where_those_in_bfloat16_are(pays: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 96, generator=draw, requires_grad=True)
    layer = torch.nn.Linear(96, 40, bias=False)
    along = torch.randn(3, 5, 40, generator=draw).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), pays("training").ByFloat32():
        found = layer(x)
    assert type(found.grad_fn).__name__ == "_ProductBackward"
    found.backward(along)
    ours = (found, x.grad, layer.weight.grad)
    x.grad = layer.weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).backward(along)
    exact = [each.detach().bfloat16().double() for each in (x, layer.weight, along)]
    wanted = (exact[0] @ exact[1].T, exact[2] @ exact[1], exact[2].flatten(0, 1).T @ exact[0].flatten(0, 1))
    for one, double in zip(ours, wanted, strict=True):
        assert one is not None
        assert (one.double() == double.bfloat16().double()).double().mean() > 0.98, "sums in float32, rounded once"
    for one, theirs in zip(ours[1:], (x.grad, layer.weight.grad), strict=True):
        assert one is not None and theirs is not None and one.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(one, theirs, rtol=2**-7, atol=1e-3)


def test_what_is_no_such_product_is_torchs_own(pays: Any) -> None:
    training = pays("training")
    x, weight, bias = torch.randn(2, 6), torch.randn(3, 6, requires_grad=True), torch.randn(3)
    calls: list[Callable[[], Tensor]] = [
        lambda: linear(x, weight, bias),
        lambda: linear(x, weight, bias=bias),
        lambda: linear(input=x, weight=weight),
        lambda: linear(x.double(), weight.double(), None),
    ]
    for call in calls:
        with torch.autocast("cpu", torch.bfloat16):
            wanted = call()
            with training.ByFloat32():
                found = call()
        assert torch.equal(found, wanted) and found.dtype == wanted.dtype
    with training.ByFloat32():
        assert torch.equal(linear(x, weight, None), linear(x, weight)), "out of autocast"
        with torch.autocast("cpu", torch.bfloat16):
            linear(x[0], weight, None).sum().backward()
    assert weight.grad is not None and weight.grad.shape == (3, 6)


@pytest.mark.parametrize(
    ("has", "told"),
    [
        ({"avx512_bf16": True}, "bfloat16"),
        ({"bf16": True}, "bfloat16"),
        ({"avx512_f": True}, "float32"),
        (None, "float32"),
    ],
    ids=["x86", "ARM", "without", "older torch"],
)
def test_products_are_by_float32_where_bfloat16_is_not_in_hardware(
    pays: Any, monkeypatch: pytest.MonkeyPatch, has: dict[str, bool] | None, told: str
) -> None:
    if has is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert pays("lines")._versions()["products"] == told
    assert isinstance(pays("training").products(), pays("training").ByFloat32) == (told == "float32")
