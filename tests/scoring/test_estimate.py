from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_files import Notes, command, contents, token_records, write_jsonl

from alphatoken_curate import CurateError, ScoreConfig, score
from alphatoken_curate.directions.rehearsal import mean_loss
from alphatoken_curate.models.load import find_model
from alphatoken_curate.scoring.check import check
from alphatoken_curate.scoring.engines import Here
from alphatoken_curate.scoring.estimate import Estimate, RehearsalEstimate, StageEstimate, _Trials, estimate
from alphatoken_curate.scoring.meter import Meter, peak_of_process
from alphatoken_curate.scoring.probes import Size, choose, predict
from alphatoken_curate.scoring.spec import ScorerSpec
from alphatoken_curate.scoring.steps import Tried
from alphatoken_curate.signals.paths import PathScorer

MIB = 1 << 20


def size(padded: int, width: int) -> Size:
    return Size(padded=padded, width=width)


# --- arithmetic


def test_a_stage_of_one_or_two_batches_is_what_they_took() -> None:
    assert choose([size(9, 3)]) == ([], [0]) and choose([size(9, 3), size(4, 2)]) == ([], [0, 1])
    assert choose([]) == ([], [])
    assert predict([size(9, 3)], {0: 1.5}) == 1.5
    assert predict([size(9, 3), size(400, 2)], {0: 1.5, 1: 2.0}) == 3.5
    assert predict([], {}) == 0.0


def test_the_batches_in_the_middle_of_both_halves_are_tried_after_the_largest() -> None:
    sizes = [size(100, width) for width in (10, 80, 70, 60, 50, 40, 30, 20)] + [size(120, 5)]
    # Longest first: 80 70 60 50 40 30 20 10 5; a quarter of 920 lies in the third, three quarters in the seventh.
    assert choose(sizes) == ([8], [3, 7])


def test_tokens_and_squares_of_lengths_are_told_apart() -> None:
    widths = [10, 20, 30, 40, 50]
    sizes = [size(6 * width, width) for width in widths]

    def truth(width: int) -> float:
        return 6 * (0.5 * width + 0.25 * width**2)

    found = predict(sizes, {1: truth(20), 3: truth(40)})
    assert found == pytest.approx(sum(map(truth, widths)), rel=1e-12)


def test_batches_of_one_width_give_a_rate() -> None:
    sizes = [size(n, 7) for n in (10, 20, 30, 40)]
    assert predict(sizes, {0: 1.0, 2: 5.0}) == pytest.approx(100 * (0.1 + 5 / 30) / 2)
    assert predict(sizes, {3: 8.0}) == pytest.approx(100 * 0.2)


def test_no_batch_costs_less_than_half_of_the_cheapest() -> None:
    sizes = [size(100, 10), size(100, 20), size(100, 100)]
    # Per token 0.1 and 0.06: the line goes below zero.
    assert predict(sizes, {0: 10.0, 1: 6.0}) == pytest.approx(10 + 6 + 3)


def test_the_total_is_that_of_the_stages() -> None:
    stages = tuple(StageEstimate(name=name, seconds=seconds) for name, seconds in (("a", 1.5), ("b", 2.0)))
    assert Estimate(stages=stages, peak_bytes=1, batch_tokens=1).seconds == 3.5


# --- of a run


@pytest.fixture
def settings(folder: Path, models: dict[str, str]) -> dict[str, Any]:
    data = write_jsonl(folder / "rows.jsonl", token_records(60))
    return {"data": data, "model": models["tuned"], "layers": 2, "rows_per_shard": 20, "batch_tokens": 64}


def stages(found: Estimate) -> list[str]:
    return [stage.name for stage in found.stages]


def scored_stages(settings: dict[str, Any], run: Path) -> list[str]:
    notes = Notes()
    score(ScoreConfig(**settings), run, notes)
    return [name for name, tokens in notes.stages if tokens]


def test_workers_share_the_pieces_of_a_stage() -> None:
    stages = (
        StageEstimate(name="loading", seconds=4.0),
        StageEstimate(name="gradient", seconds=6.0, pieces=2),
        StageEstimate(name="scoring", seconds=70.0, pieces=7),
    )
    found = Estimate(stages=stages, peak_bytes=1, batch_tokens=1)
    assert [stage.by(1) for stage in stages] == [4.0, 6.0, 70.0]
    assert [stage.by(2) for stage in stages] == [4.0, 3.0, 40.0]
    assert [stage.by(9) for stage in stages] == [4.0, 3.0, 10.0]
    assert found.by(1) == (80.0, 1.0) and found.by(2) == (47.0, 80 / 94) and found.by(9) == (17.0, 80 / 153)


def test_workers_share_the_outcomes_of_a_rehearsal_and_train_each_for_themselves() -> None:
    def states(at_once: int) -> int:
        return MIB * (10 + at_once)

    tried = Tried(
        orders=2, outcomes=6, there=10.0, again=2.0, back=3.0, fits=6.0, sharing=True, states=states, values=MIB
    )
    # One: 6 and 6. Two: as much. Three: 4, 4, 2 + 2 outcomes. All: one each, and those that are more have nothing.
    assert [tried.seconds(n) for n in (1, 2, 12, 40)] == [56.0, 10.0 + 1 * 2 + 18.0, 13.0, 13.0]
    assert tried.seconds(3) == 2 * (10.0 + 3 * 2)
    # Two have room for three outcomes each at a time, three for two, twelve for one and none for half of one.
    assert [tried.kept_bytes(n) // MIB for n in (1, 2, 3, 12, 40)] == [28, 38, 48, 144, 144]
    cards = replace(tried, sharing=False)
    assert cards.seconds(2) == 28.0 and cards.kept_bytes(2) == (16 + 16 + 12) * MIB
    small = replace(tried, fits=2.0, orders=1)
    assert small.seconds(1) == 10.0 + 2 * 2 + 6 * 3
    stage = RehearsalEstimate(name="rehearsal", seconds=56.0, steps=tried)
    found = Estimate(stages=(StageEstimate(name="loading", seconds=4.0), stage), peak_bytes=1, batch_tokens=1)
    assert found.by(1) == (60.0, 1.0) and found.by(2)[0] == 34.0
    assert found.kept_by(2) == "; 38.0 MiB of states on disk at most"
    assert replace(found, stages=found.stages[:1]).kept_by(2) == ""


def test_pieces_are_those_the_scoring_is_cut_into(
    settings: dict[str, Any], models: dict[str, str], tmp_path: Path
) -> None:
    """As many as tasks are dealt out, stage by stage."""
    settings |= {"reference": models["base"], "fisher": "generate", "fisher_new_tokens": 4, "precondition": "adam"}
    _, found = estimate(ScoreConfig(**settings))
    dealt: dict[str, int] = {}

    class Counting(Here):
        def run(self, stage: Any, progress: Any) -> Any:
            tasks = list(stage.tasks)
            if stage.tokens:
                dealt[stage.name] = len(tasks)
            return super().run(replace(stage, tasks=tasks), progress)

    score(ScoreConfig(**settings), tmp_path / "run", engine=Counting())
    assert {stage.name: stage.pieces for stage in found.stages if stage.name in dealt} == dealt
    assert set(dealt) >= {"scoring", "reference losses", "target gradient", "answers of the reference"}


CASES: dict[str, dict[str, Any]] = {
    "alone": {},
    "exact": {"estimator": "exact"},
    "reference": {"reference": True},
    "influence": {"reference": True, "estimator": "influence"},
    "both": {"estimator": "exact+influence", "layers": "all"},
    "generate": {
        "reference": True,
        "fisher": "generate",
        "fisher_new_tokens": 4,
        "fisher_rows": 8,
        "dtype": "bfloat16",
    },
    "retention": {"retention": True, "precondition": "adam", "precondition_rows": 20},
    "groups": {"retention": True, "target_groups": 3},
    "lookahead": {"drift": "lookahead", "lookahead_lr": 0.1, "lookahead_rows": 9, "precondition": "ekfac"},
    "astra": {"estimator": "influence", "precondition": "astra", "precondition_stability": True},
}


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", CASES)
def test_every_stage_of_a_scoring_is_tried(
    name: str, settings: dict[str, Any], models: dict[str, str], tmp_path: Path
) -> None:
    settings |= CASES[name]
    if settings.pop("reference", None):
        settings["reference"] = models["base"]
    if settings.pop("retention", None):
        settings["retention"] = write_jsonl(tmp_path / "retained.jsonl", token_records(8, seed=3))
    before, notes = contents(tmp_path), Notes()
    prepared, found = estimate(ScoreConfig(**settings), notes)
    assert contents(tmp_path) == before and len(prepared.rows) == 54
    tried = [one for one in stages(found) if not one.startswith(("reading", "loading"))]
    assert tried == scored_stages(settings, tmp_path / "run")
    assert stages(found)[0] == "reading rows" and stages(found).count("loading the model") == 1
    assert ("loading the reference" in stages(found)) == (name in ("reference", "influence", "generate", "lookahead"))
    assert all(stage.seconds > 0 for stage in found.stages) and found.batch_tokens == 64
    assert 0 < found.peak_bytes <= peak_of_process() + MIB  # the kernel counts in lumps
    assert [name.removeprefix("estimate: ") for name, tokens in notes.stages if tokens] == [
        n for n in tried if "answers" not in n
    ]
    assert all(notes.done[stage] == tokens for stage, tokens in notes.stages)


@pytest.mark.long
def test_a_rehearsal_is_tried_on_two_of_its_steps(settings: dict[str, Any]) -> None:
    settings |= {"direction": "rehearsal", "rehearse_lr": 1e-4, "layers": 1, "rehearse_rows_per_step": 16}
    notes = Notes()
    _, found = estimate(ScoreConfig(**settings), notes)
    wanted = ["Fisher of the reference", "Fisher of all parameters", "losses before the rehearsal"]
    assert [one for one in stages(found) if not one.startswith(("reading", "loading"))] == [
        *wanted,
        "preparing the rehearsal",
        "rehearsal: 4 steps there and back",
    ]
    assert all(notes.done[stage] == tokens for stage, tokens in notes.stages)
    seeds = estimate(ScoreConfig(**settings, rehearse_seeds=50, rehearse_window=1))[1]
    assert seeds.stages[-1].seconds > 10 * found.stages[-1].seconds
    told = r"states of the rehearsal on disk, ([0-9.]+) MiB at most at a time"
    disk = [re.fullmatch(told, one.placement[-1]) for one in (found, seeds)]
    assert all(one is not None and float(one[1]) > 0 for one in disk)
    assert seeds.by(1)[0] == pytest.approx(seeds.seconds)
    rest = sum(stage.by(2) for stage in seeds.stages[:-1])
    assert seeds.by(2)[0] - rest == pytest.approx(
        seeds.stages[-1].seconds / 2, rel=0.1
    )  # each takes half of the orders


@pytest.mark.long
def test_every_window_takes_the_gradient_of_its_outcomes(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all target rows, here a second for each batch of them."""
    settings |= {"direction": "rehearsal", "rehearse_lr": 1e-4, "layers": 1, "rehearse_rows_per_step": 16}

    class Slow(Meter):
        late = 0.0

        def now(self) -> float:
            return super().now() + self.late

    def slow(rows: Any, batch_tokens: int) -> Any:
        def outcome(trainee: Any) -> Any:
            Slow.late += 100.0
            return mean_loss(rows, batch_tokens)(trainee)

        return outcome

    monkeypatch.setattr("alphatoken_curate.scoring.estimate.Meter", Slow)
    monkeypatch.setattr("alphatoken_curate.scoring.steps.mean_loss", slow)
    seconds = [estimate(ScoreConfig(**settings, rehearse_window=n))[1].stages[-1] for n in (4, 1)]
    assert seconds[1].name == "rehearsal: 4 steps there and back, 4 windows"
    assert seconds[1].seconds / seconds[0].seconds == pytest.approx(4, rel=0.1) and seconds[0].seconds >= 100


def test_all_parameters_are_tried(settings: dict[str, Any], models: dict[str, str]) -> None:
    settings |= {"reference": models["base"], "estimator": "influence", "parameters": "all"}
    _, found = estimate(ScoreConfig(**settings))
    assert "Fisher of all parameters" in stages(found) and stages(found)[-1] == "scoring"


def test_pairs_are_tried_as_pairs(models: dict[str, str], tmp_path: Path) -> None:
    records = [
        {f"{name}_{key}": one[key] for name, one in (("chosen", a), ("rejected", b)) for key in ("input_ids", "labels")}
        for a, b in zip(token_records(20), token_records(20, seed=1), strict=True)
    ]
    data = write_jsonl(tmp_path / "pairs.jsonl", records)
    settings = {"data": data, "model": models["tuned"], "reference": models["base"], "batch_tokens": 64}
    prepared, found = estimate(ScoreConfig(**settings))
    assert prepared.kind == "preference" and stages(found)[-1] == "scoring"
    settings |= {"direction": "rehearsal", "rehearse_lr": 1e-4, "layers": 1, "rehearse_rows_per_step": 8}
    notes = Notes()
    found = estimate(ScoreConfig(**settings), notes)[1]
    assert "reference losses" in stages(found) and stages(found)[-1] == "rehearsal: 3 steps there and back"
    assert all(notes.done[stage] == tokens for stage, tokens in notes.stages)


def test_only_a_few_batches_run(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = PathScorer.score, []

    def counted(self: PathScorer, batch: Any) -> Any:
        calls.append(batch)
        return plain(self, batch)

    monkeypatch.setattr(PathScorer, "score", counted)
    summary = check(ScoreConfig(**settings), estimated=True)
    assert summary.batches > 10 and len(calls) == 3
    assert summary.estimate is not None and summary.batch_tokens == summary.estimate.batch_tokens == 64


def test_memory_that_runs_out(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def out(self: PathScorer, batch: Any) -> Any:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(PathScorer, "score", out)
    with pytest.raises(CurateError, match=r"batches of 64 tokens.*smaller --batch-tokens"):
        estimate(ScoreConfig(**settings))


def test_the_command_prints_a_line_for_each_stage(
    settings: dict[str, Any], models: dict[str, str], tmp_path: Path
) -> None:
    flags = ["--model", settings["model"], "--reference", models["base"], "--layers", 2, "--keep", 0.3]
    before = contents(tmp_path)
    ended = command("check", settings["data"], *flags, "--estimate")
    assert ended.code == 0, ended.err
    assert contents(tmp_path) == before
    lines = ended.out.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("estimate")) :]
    names = [
        "starting", "reading rows", "loading the reference", "Fisher of the reference",
        "reference losses", "loading the model", "target gradient", "scoring", "total",
    ]  # fmt: skip
    assert [line[2:26].strip() for line in table[1:]] == names
    seconds = [float(line[26:].split()[0]) for line in table[1:]]
    assert seconds[-1] == pytest.approx(sum(seconds[:-1]), abs=0.05 * len(seconds) + 0.01)
    assert "peak memory" in table[-1] and "MiB, 2,048 tokens a batch" in table[-1]


def test_without_it_no_model_is_loaded(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScorerSpec, "load", None)
    summary = check(ScoreConfig(**settings | {"batch_tokens": "auto"}))
    assert summary.estimate is None and summary.batch_tokens == 512 and summary.shards == 3
    rehearsal = {"batch_tokens": "auto", "direction": "rehearsal", "rehearse_lr": 1e-3}
    assert check(ScoreConfig(**settings | rehearsal)).batch_tokens == 1024
    assert find_model(settings["model"])
    ended = command("check", settings["data"], "--model", settings["model"])
    assert ended.code == 0 and "estimate" not in ended.out


def test_it_tries_with_the_threads_that_are_named(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen, plain = torch.get_num_threads(), list[int](), _Trials.run

    def run(self: _Trials) -> Any:
        seen.append(torch.get_num_threads())
        return plain(self)

    monkeypatch.setattr(_Trials, "run", run)
    for threads in (before + 1, None):
        estimate(ScoreConfig(**settings, threads=threads))
    assert seen == [before + 1, before] and torch.get_num_threads() == before
