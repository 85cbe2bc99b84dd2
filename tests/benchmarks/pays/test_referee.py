"""The arithmetic of tests/benchmarks/pays/referee.py, held_out.py and verdict.py."""

from __future__ import annotations

import importlib
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model
from tiny_files import rows_of, token_records
from torch.nn.functional import cross_entropy

from alphatoken_curate.signals.student import quantile


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module


def made(pays: Any, count: int, seed: int = 3) -> list[Any]:
    settings = pays("settings")
    rows = rows_of(token_records(count, seed=seed))
    return [settings.Row(ids=row.input_ids, response=row.response, good=row.response) for row in rows]


def test_held_rows_are_measured_each_by_itself(pays: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out, rows = pays("held_out"), made(pays, 11)
    monkeypatch.setattr(held_out, "answer_digits", lambda row: row.response & (row.ids % 3 == 0))
    model: Any = tiny_model("llama", dtype=torch.float32).eval()
    with torch.no_grad():
        found = held_out.held_out(model, rows)
    every = np.zeros((len(held_out.TEMPERATURES), len(rows)))
    for i, row in enumerate(rows):
        ids = torch.from_numpy(row.ids.astype(np.int64))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[None]).logits[0, :-1][torch.from_numpy(row.response[1:])]
        target = ids[torch.from_numpy(row.response)]
        every[:, i] = [float(cross_entropy(logits.float() / t, target, reduction="sum")) for t in held_out.TEMPERATURES]
        assert found.tokens[i] == len(target)
        digits = (row.ids % 3 == 0)[row.response]
        assert found.digits[i] == digits.sum()
        assert found.digits_right[i] == (digits & (logits.argmax(-1) == target).numpy()).sum()
    best = every.sum(axis=1).argmin()
    assert found.temperature == held_out.TEMPERATURES[best] != 1.0
    np.testing.assert_allclose(found.nll, every[0], rtol=1e-2)
    np.testing.assert_allclose(found.tempered, every[best], rtol=1e-2)
    told = found.about()
    assert sum(told["nll"]) == pytest.approx(found.nll.sum(), abs=1e-2) and told["tokens"] == found.tokens.tolist()


def test_the_likeliest_is_what_argmax_says_and_losses_need_no_company(
    pays: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, draws = pays("training"), torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (60, 13), generator=draws).to(torch.bfloat16)  # the greatest is there several times
    targets = torch.randint(0, 13, (60,), generator=draws)
    found = training.likeliest(logits, targets)
    assert found.tolist() == (logits.argmax(-1) == targets).tolist() and 0 < found.sum() < 60
    assert (logits.gather(-1, targets[:, None])[:, 0] == logits.amax(-1)).sum() > found.sum()
    each = cross_entropy(logits.float() / 2, targets, reduction="none")
    for at_once in (1, 30, 9999):
        monkeypatch.setattr(training, "_LOGITS_AT_ONCE", at_once)
        assert torch.equal(training.nll_of(logits, targets, 2.0), each)


def test_gains_and_intervals_by_hand(pays: Any) -> None:
    verdict = pays("verdict")
    plain, sizes = np.array([[4.0, 6.0], [5.0, 7.0]]), np.array([2.0, 3.0])
    arms = np.stack([plain - sizes, plain + np.eye(2)[::-1] * [[1], [0]]])
    one = verdict.gains(arms, plain, sizes, together=1)
    assert one.gain == pytest.approx([1, -1 / 10])
    # Of the second its seeds gain -1/5 and 0, and its rows 0 and -1/2 where they should 2 and 3 times -1/10.
    seeds, rows = 12.7062 * (1 / 5 / 2), 1.95996 * np.sqrt(2 * (0.2**2 + 0.2**2)) / 5
    assert one.half == pytest.approx([0, np.hypot(seeds, rows)], rel=1e-5, abs=1e-12)
    (_, wider) = verdict.gains(arms, plain, sizes, together=2).half
    assert wider == pytest.approx(np.hypot(25.4517 * seeds / 12.7062, 2.24140 * rows / 1.95996), rel=1e-5)
    assert verdict.gains(plain[None, :1] - 1, plain[:1], sizes, together=1).half is None


@pytest.mark.parametrize(
    ("seeds", "of_seeds", "of_rows"),
    [(2, 1.0, 0.3), (3, 1.0, 0.3), (5, 1.0, 0.3), (3, 0.2, 1.0), (5, 0.2, 1.0)],
    ids=["2 seeds", "3 seeds", "5 seeds", "rows, 3 seeds", "rows, 5 seeds"],
)
def test_intervals_hold_for_all_arms_together(pays: Any, seeds: int, of_seeds: float, of_rows: float) -> None:
    """Whether seeds or held rows are what differs most; arms differ in each row of each seed as well."""
    verdict, draws, covered, widths = pays("verdict"), np.random.default_rng(0), 0, []
    for _ in range(500):
        arms = -0.3 - of_seeds * draws.normal(size=(5, seeds, 1)) - of_rows * draws.normal(size=(5, 1, 60))
        found = verdict.gains(arms - draws.normal(size=(5, seeds, 60)), np.zeros((seeds, 60)), np.ones(60), together=5)
        covered += bool((np.abs(found.gain - 0.3) <= found.half).all())
        widths.append(found.half.mean())
    assert covered / 500 >= 0.95 - 2 * (0.05 * 0.95 / 500) ** 0.5
    least = quantile(1 - 0.05 / 10, seeds - 1) * of_seeds / seeds**0.5 + 2.576 * of_rows / 60**0.5
    assert np.mean(widths) < 1.6 * least, "wider than what differs asks for"


def test_arms_that_are_told_what_is_bad_leave_it_out(pays: Any) -> None:
    referee, settings = pays("referee"), pays("settings")
    rows = made(pays, 10)
    rows = [
        settings.Row(ids=row.ids, response=row.response, good=row.response & (i not in (2, 5, 6)))
        for i, row in enumerate(rows)
    ]
    parts = {"train": rows, "target": made(pays, 12, 9), "held": [], "retention": [], "remember": [], "beside": []}
    where = settings.Setting(name="tiny", **parts, learning_rate=1e-2, epochs=1, batch=3)
    weights = referee.without_worst_rows(where)
    assert [i for i, weight in enumerate(weights) if not weight.any()] == [2, 5, 6]
    assert all(np.array_equal(weights[i] > 0, rows[i].response) for i in (0, 1, 9))

    alone, too = (referee.ARMS[f"target rows {how}"] for how in ("alone", "too"))
    there, whole = referee.with_targets(where, alone, weights)
    assert there.train == where.target[:10]
    assert [w.sum() for w in whole] == [row.response.sum() for row in there.train]
    there, both = referee.with_targets(where, too, weights)
    assert there.train == [*rows, *where.target] and len(both) == 22 and not both[2].any()
    assert referee.with_targets(where, referee.ARMS["all tokens"], weights) == (where, weights)


def test_every_run_of_the_test_is_of_rows_that_chose_nothing(pays: Any) -> None:
    referee = pays("referee")
    runs = referee.runs()
    assert len({(r.stage, r.noise, r.seed, r.arm, r.rate) for r in runs}) == len(runs)
    assert {run.setting[0] for run in runs if run.stage == referee.CHOOSE} == {"A"}
    others = [run for run in runs if run.stage != referee.CHOOSE]
    assert {run.setting[0] for run in others} == set("BCD")
    assert not any(referee.ARMS[run.arm].wants_bad for run in others if run.noise == "clean")
    tested = [run for run in others if run.stage == referee.TEST]
    assert {run.noise for run in tested} == set(pays("settings").NOISES)
    for run in tested:
        second = [referee.SECOND[run.noise]] if run.noise in referee.SECOND and run.arm in referee.AT_SECOND else []
        assert run.arm == referee.PLAIN or run.rate in (referee.CHOSEN[run.arm], *second)
    for stage in {run.stage for run in others}:
        plain = [run for run in others if run.stage == stage and run.arm == referee.PLAIN]
        assert {run.rate for run in plain} in ({*referee.RATES}, {referee.FORGETTING_RATE, 3e-5}, {1e-4, 3e-5}, set())


def test_each_arm_has_the_rate_of_least_loss_where_rates_were_chosen(pays: Any) -> None:
    referee, losses = pays("referee"), dict[str, dict[float, float]]()
    for line in pays("lines").read("referee"):
        if line["config"]["stage"] == referee.CHOOSE and line["config"]["model"] == "smollm2-135m":
            rate = line["config"]["about"]["learning_rate"]
            losses.setdefault(line["config"]["arm"], {})[rate] = pays("verdict").held_loss(line["found"])
    best = {arm: min(by_rate, key=by_rate.__getitem__) for arm, by_rate in losses.items() if len(by_rate) == 3}
    assert best.keys() >= referee.MAIN.keys()
    assert best | {referee.RESCORED: best["published 0.5"]} == referee.CHOSEN


def lowest_rates(pays: Any, model: str, seeds: Container[int]) -> dict[str, float]:
    """Of a model the rate at which all tokens of some seeds end lowest on V, noise by noise."""
    referee, verdict, found = pays("referee"), pays("verdict"), dict[str, list[Any]]()
    for line in pays("lines").read("referee"):
        config = line["config"]
        own = config["stage"] in (referee.TEST, "light")
        if own and config["model"] == model and config["seed"] in seeds:
            found.setdefault(config["noise"], []).append(line)
    each = {
        noise: verdict.least_on_v(verdict.by_arm(some), referee.PLAIN, referee.RATES) for noise, some in found.items()
    }
    return {noise: rate for noise, (rate, told) in each.items() if told}


def test_a_noise_has_a_second_rate_where_all_tokens_end_lowest_at_it(pays: Any) -> None:
    referee = pays("referee")
    own = {referee.CHOSEN[arm] for arm in referee.AT_SECOND}
    best = lowest_rates(pays, referee.TUNED, range(9))
    assert {noise: rate for noise, rate in best.items() if noise != "digits" and own != {rate}} == referee.SECOND


def test_another_model_trains_all_arms_where_its_all_tokens_end_lowest(
    pays: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    referee = pays("referee")
    models = {line["config"]["model"] for line in pays("lines").read("referee")} - {referee.TUNED}
    best = {model: lowest_rates(pays, model, [1]) for model in models}
    assert {model: rates for model, rates in best.items() if rates} == referee.OF_OTHERS
    monkeypatch.setattr(referee, "MODEL_NAME", "other")
    monkeypatch.setattr(referee, "OF_OTHERS", {"other": {"words": 1e-4}})
    tested = [run for run in referee.runs() if run.stage == referee.TEST]
    assert {run.noise for run in tested if run.arm != referee.PLAIN} == {"words"}
    assert {run.rate for run in tested if run.arm != referee.PLAIN} == {1e-4}
    assert {run.noise for run in tested if run.arm == referee.PLAIN} == {*pays("settings").NOISES}


def test_every_stage_is_told_beside_all_tokens(pays: Any) -> None:
    referee = pays("referee")
    tested = {(run.noise, run.seed, run.arm) for run in referee.runs() if run.stage == referee.TEST}
    for stage in referee.STAGES.values():
        assert referee.PLAIN in {*stage.arms, *stage.beside} and not {*stage.arms} & {*stage.beside}
        assert {(noise, n, arm) for noise in stage.noises for n in stage.seeds for arm in stage.beside} <= tested


def test_a_long_training_goes_by_values_of_one_epoch(pays: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    referee, settings = pays("referee"), pays("settings")
    rows = made(pays, 4)
    parts = {"train": rows, "target": rows, "held": [], "retention": [], "remember": [], "beside": []}
    where = settings.Setting(name="tiny", **parts, learning_rate=1e-2, epochs=8, batch=2)
    rehearsed: list[int] = []
    monkeypatch.setattr(referee, "rehearsed_weights", lambda chosen, setting, place: rehearsed.append(setting.epochs))
    referee.arm_weights(referee.ARMS["rehearsed, lowest 5%"], where, None, 0)
    assert rehearsed == [1]


def test_half_of_the_tokens_train_by_whole_rows(pays: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    referee, rehearsals, settings = pays("referee"), pays("rehearsals"), pays("settings")
    rows = [replace(row, good=row.good & (i % 3 > 0)) for i, row in enumerate(made(pays, 12))]
    parts = {"train": rows, "target": rows, "held": [], "retention": [], "remember": [], "beside": []}
    where = settings.Setting(name="tiny", **parts, learning_rate=1e-2, epochs=1, batch=2)
    lengths = np.array([int(row.response.sum()) for row in rows])
    values = rehearsals.GroupValues(
        own=np.random.default_rng(0).normal(size=(1, lengths.sum())),
        denominator=np.zeros((1, lengths.sum())),
        tokens=np.array([9]),
        root_share=0.0,
    )
    monkeypatch.setattr(rehearsals, "_ends", lambda groups: (244,))
    monkeypatch.setattr(rehearsals, "values_of", lambda *of: values)
    means = [part.mean() for part in np.split(values.own[0], np.cumsum(lengths)[:-1])]
    orders = {
        "rows at random": np.random.default_rng(5).permutation(12),
        "rows of the task": np.random.default_rng(5).permutation([i for i in range(12) if i % 3]),
        "rehearsed, rows": np.argsort(means)[::-1],
    }
    for name, order in orders.items():
        weights = referee.arm_weights(referee.ARMS[name], where, None, 5)
        counts = [int((weight > 0).sum()) for weight in weights]
        assert sum(counts) == -(-lengths.sum() // 2)
        taken = [i for i in order if counts[i]]
        assert taken == order[: len(taken)].tolist(), "no row before one that is ahead of it"
        assert all(counts[i] == lengths[i] for i in taken[:-1]), "whole rows but for the last"
        first = np.flatnonzero(rows[taken[-1]].response)[: counts[taken[-1]]]
        assert np.flatnonzero(weights[taken[-1]]).tolist() == first.tolist()
        assert {float(w) for weight in weights for w in weight if w} == {1.0}


def test_selectors_of_the_literature_are_those_of_the_page(pays: Any) -> None:
    page = (Path(__file__).parents[3] / "sample_data/README.md").read_text(encoding="utf-8")
    for name, arm in pays("referee").OF_LITERATURE.items():
        known = {"GCE": "generalised cross-entropy"}.get(name, name)
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {known} |"))
        mask = dict(arm.selection.mask)
        assert f'--by "{mask["by"]}"' in line and (f"--weights {mask.get('weights')}" in line) == ("weights" in mask)


def test_a_table_of_a_stage_holds_what_it_is_told_beside(pays: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = pays("verdict")

    def line(stage: str, arm: str, loss: float, rate: float = 1e-5, tuned: float = 1.0) -> dict[str, Any]:
        held = {"tokens": [2, 3], "nll": [2 * loss, 3 * loss], "tempered": [loss, loss], "digits": [1, 1]}
        curve = [{"retention_loss": 3.0, "target_loss": 9.0}, {"retention_loss": 3.0, "target_loss": tuned}]
        found = {"held": {**held, "digits_right": [0, 1]}, "curve": curve}
        counted = {"kept_tokens": 5, "response_tokens": 5, "kept_bad": 1, "bad_tokens": 1}
        about = {"learning_rate": rate}
        config = {"model": "tiny", "stage": stage, "noise": "digits", "seed": 1, "arm": arm, "about": about}
        return {"config": config, "found": {**found, **counted}}

    found = [line("rescored", "published 0.5 every 2", 1.5), line("test", "all tokens", 1.125, 1e-5, 1.5)]
    found += [line("test", "published 0.5", 2.0), line("test", "random 0.9", 1.25)]
    found += [line("test", "all tokens", 0.5, 1e-4, 1.5)]  # the least loss, but not on the rows that tune
    monkeypatch.setattr(verdict.lines, "read", lambda name: found)
    assert verdict.report() == "", "all tokens at one of the rates is not there"
    found += [line("test", "all tokens", 1.0, 3e-5)]
    test, rescored = verdict.report().split("### ")[1:]
    assert test.startswith("tiny: digits\n") and "random 0.9 | 1 | 100% | 100% | 1.250 | -0.250" in test
    assert "all tokens, 3e-05 | 1 | 100% | 100% | 1.000 |  |  |  | 9.000, 1.000 | 3.000 |" in test
    assert "all tokens, 1e-05 (higher on V) | 1 | 100% | 100% | 1.125 | -0.125 " in test
    assert rescored.startswith("tiny: digits, rescored\n") and "random" not in rescored
    found += [line("test", "random 0.9", 1.5, 1e-4, 0.5)]  # at two rates an arm is told of at each
    (test, _) = verdict.report().split("### ")[1:]
    assert "random 0.9, 0.0001 | 1 | 100% | 100% | 1.500 | -0.500 " in test
    assert "random 0.9, 1e-05 (higher on V) | 1 | 100% | 100% | 1.250 | -0.250 " in test
    for told in ("all tokens, 3e-05 | 1 |", "published 0.5 every 2 | 1 | 100% | 100% | 1.500 | -0.500", "| -1.000 |"):
        assert told in rescored
