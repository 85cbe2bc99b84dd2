from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
import yaml
from tiny_files import Notes, command, contents, quiet, token_records, write_jsonl
from transformers import AutoModelForCausalLM

from alphatoken_curate import ScoreConfig, score
from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.progress import Silent
from alphatoken_curate.runs.shards import listed, values_folder
from alphatoken_curate.scoring import trial
from alphatoken_curate.scoring.budget import LEAST
from alphatoken_curate.scoring.meter import Meter
from alphatoken_curate.scoring.trial import grow, pays, planned, usual_budget
from alphatoken_curate.signals.paths import PathScorer
from alphatoken_curate.tokens.plan import Batch, plan_batches
from alphatoken_curate.tokens.tokenise import TokenRow


def rows(*lengths: int) -> list[TokenRow]:
    return [
        TokenRow(
            row_id=i,
            source="",
            line=i + 1,
            id=None,
            input_ids=np.ones(length, np.int32),
            response=np.arange(length) > 0,
            end_of_turn=np.zeros(length, np.bool_),
            truncated=0,
        )
        for i, length in enumerate(lengths)
    ]


# --- how far a budget grows


def speeds(known: dict[int, float]) -> tuple[Callable[[int], float], list[int]]:
    tried: list[int] = []

    def speed(budget: int) -> float:
        tried.append(budget)
        return known[budget]

    return speed, tried


@pytest.mark.parametrize(
    ("known", "most", "afforded", "found", "tried"),
    [
        ({512: 1, 1024: 2, 2048: 2.04}, 9999, 9999, 1024, [512, 1024, 2048]),  # no faster: the smaller one
        ({512: 1, 1024: 2, 2048: 4}, 2048, 9999, 2048, [512, 1024, 2048]),  # no more rows than that
        ({512: 1, 1024: 2, 2048: 4}, 9999, 2048, 2048, [512, 1024, 2048]),  # no more time
        ({512: 1, 1024: 2, 2048: 0}, 9999, 9999, 1024, [512, 1024, 2048]),  # no more memory
        ({512: 1, 1024: 0.9}, 9999, 9999, 512, [512, 1024]),
        ({512: 0, 256: 0, 128: 1}, 9999, 9999, 128, [512, 256, 128]),  # what ran out of memory is not tried again
        ({512: 0, 256: 0, 128: 0, 64: 0}, 9999, 9999, LEAST, [512, 256, 128, 64]),
    ],
)
def test_a_budget_grows_while_that_pays(
    known: dict[int, float], most: int, afforded: int, found: int, tried: list[int]
) -> None:
    speed, asked = speeds(known)
    assert grow(speed, 512, most, lambda budget: budget <= afforded) == found
    assert asked == tried


@pytest.mark.parametrize(
    ("lengths", "device", "found"),
    [
        ([[4, 5]], "cpu", 512),
        ([[100] * 6], "cpu", 1024),
        ([[100] * 6, [100] * 12], "cpu", 2048),
        ([[100] * 60], "cpu", 2048),
        ([[100] * 60], "mps", 2048),
        ([[100] * 60], "cuda", 8192),
        ([[100] * 600], "cuda", 16384),
    ],
)
def test_the_budget_without_a_trial_holds_all_rows_or_is_the_usual_one(
    lengths: list[list[int]], device: str, found: int
) -> None:
    shards = [rows(*shard) for shard in lengths]
    assert usual_budget(shards, device) == found
    assert not pays(shards, device)


def test_a_trial_pays_for_a_long_run_alone() -> None:
    assert pays([rows(*[100] * 656)], "cpu") and not pays([rows(*[100] * 655)], "cpu")
    assert not pays([rows(*[100] * 20)] * 40, "cpu")  # each shard is one batch
    assert not pays([rows(*[100] * 656)], "cuda")


def test_batches_and_padding_of_a_shard() -> None:
    assert planned(rows(10, 9, 4, 4), 20) == (2, 20 + 8)
    assert planned([], 20) == (0, 0)


# --- on a model


class Heavy(Meter):
    """A device on which each padded token needs that many bytes, of so many that there are."""

    def __init__(self, room: int) -> None:
        super().__init__(torch.device("cpu"))
        self.most, self.largest = room, 0

    def begin(self) -> None:
        self.largest = 0

    def used(self) -> int:
        return 0

    def peak(self) -> int:
        return 1000 * self.largest

    def room(self) -> int:
        return self.most


@pytest.fixture
def scoring(models: dict[str, str]) -> ScoringModel:
    with quiet():
        return ScoringModel(AutoModelForCausalLM.from_pretrained(models["base"]), 1)


def made(scoring: ScoringModel, lengths: list[int], meter: Meter) -> trial.Trial:
    config = ScoreConfig(data="x.jsonl", layers=1)
    return trial.Trial(scoring, config, 2, trial.sample_of([rows(*lengths)]), meter, Silent())


def sizes(monkeypatch: pytest.MonkeyPatch, meter: Heavy | None = None, most: int = 10**9) -> list[tuple[int, int]]:
    """Shapes of the batches that are scored from now on; above `most` padded tokens memory runs out."""
    plain, seen = PathScorer.score, []

    def counted(self: PathScorer, batch: Batch) -> Any:
        shape = (batch.input_ids.shape[0], batch.input_ids.shape[1] + 1)
        seen.append(shape)
        if shape[0] * shape[1] > most:
            raise torch.OutOfMemoryError("none left")
        if meter is not None:
            meter.largest = max(meter.largest, shape[0] * shape[1])
        return plain(self, batch)

    monkeypatch.setattr(PathScorer, "score", counted)
    return seen


def test_speed_is_of_middling_rows_and_memory_of_the_longest(
    scoring: ScoringModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Heavy(10**9)
    tried, seen = made(scoring, [*[8] * 200, 20, 40], meter), sizes(monkeypatch, meter)
    assert tried.width == 8
    assert tried.speed(64) > 0
    assert seen == [(8, 8), (8, 8)]  # warmed up, then timed: memory is plenty
    meter.most = 1000 * 64 * 3
    assert tried.speed(128) > 0
    assert seen[2:] == [(3, 40), (16, 8)]  # the largest batch was run, to see
    meter.most = 10
    assert tried.speed(128) == 0.0


def test_padding_counts_against_a_budget(scoring: ScoringModel) -> None:
    tried = made(scoring, [*[8] * 300, *[16] * 300], Heavy(10**9))
    assert tried._padding(64) == 1.0
    odd = made(scoring, [8, 16], Heavy(10**9))
    assert odd._padding(1024) == 32 / 24


def test_a_trial_takes_few_of_the_rows_of_a_run() -> None:
    """They may go to another process."""
    shards = [rows(*[8 + (7 * i + n) % 60 for i in range(100)]) for n in range(64)]
    found, widths = trial.sample_of(shards), sorted(len(row.input_ids) for shard in shards for row in shard)
    assert found.tokens == sum(widths) and found.most == 8192
    assert [len(shard) for shard in found.shards] == [100] * 4 and {len(r.input_ids) for r in found.longest} == {66, 67}
    middle = len(found.middling[found.middle].input_ids)
    below = sum(width for width in widths if width < middle)
    assert below <= found.tokens / 2 <= below + sum(width for width in widths if width == middle)
    assert len(found.longest) + len(found.middling) <= 8192 // 67 + 8192 // middle + 1


def test_memory_that_runs_out_in_the_trial_backs_off(scoring: ScoringModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, seen = made(scoring, [8] * 600, Heavy(10**12)), sizes(monkeypatch, most=100)
    assert grow(tried.speed, 512, tried.sample.most, lambda _: True) == 64
    assert max(a * b for a, b in seen) == 512


def test_other_errors_in_the_trial_pass(scoring: ScoringModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: PathScorer, batch: Batch) -> Any:
        raise RuntimeError("shapes")

    tried = made(scoring, [8] * 600, Heavy(10**12))
    monkeypatch.setattr(PathScorer, "score", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        tried.speed(512)


def test_a_trial_is_short(scoring: ScoringModel) -> None:
    tried = made(scoring, [8] * 4096, Heavy(10**12))
    assert tried.affords(2048) and not tried.affords(2049)
    tried.speed(512)
    assert tried.affords(1024) and not tried.affords(1025)  # warming up counts
    tried._last = trial.SECONDS
    assert not tried.affords(64)


# --- in a run


@pytest.fixture
def settings(folder: Path, models: dict[str, str]) -> dict[str, Any]:
    data = write_jsonl(folder / "many.jsonl", token_records(200))
    return {"data": data, "model": models["tuned"], "layers": 1, "rows_per_shard": 100}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices so slow that small budgets are worth a trial."""
    monkeypatch.setattr(trial, "_SMALLEST", {"cpu": 32})
    monkeypatch.setattr(trial, "_USUAL", {"cpu": 64})
    monkeypatch.setattr(trial, "GAIN", 0.0)


def recorded(run: Path) -> dict[str, Any]:
    return dict(orjson.loads((run / "artifacts" / "run.json").read_bytes()))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.usefixtures("short")
def test_a_run_finds_its_budget_before_it_computes(
    reference: bool,
    settings: dict[str, Any],
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if reference:
        settings |= {"reference": models["base"]}
    loads, plain = [], trial.ScorerSpec.load

    def counted(self: Any, source: Any) -> Any:
        loads.append(source.name)
        return plain(self, source)

    monkeypatch.setattr(trial.ScorerSpec, "load", counted)
    notes, run = Notes(), tmp_path / "run"
    done = score(ScoreConfig(**settings), run, notes)
    # The model it was tried on went on to work.
    assert loads == ([models["base"], models["tuned"]] if reference else [models["tuned"]])
    stages = [name for name, tokens in notes.stages if tokens]
    assert stages[0] == "trial of --batch-tokens" and len(stages) > 1
    found = recorded(run)["first"]
    assert found >= 32 and found & (found - 1) == 0
    assert f"--batch-tokens auto: {found}" in notes.notes
    assert {plan.batch_tokens for plan in done.manifest.generations[0].plan} == {found}
    # config.yaml replays the run to the same bytes: it names what was found.
    assert yaml.safe_load((run / "config.yaml").read_text())["batch_tokens"] == found
    monkeypatch.setattr(trial, "Trial", None)
    replayed = tmp_path / "replayed"
    assert command("score", "--config", run / "config.yaml", "-o", replayed).code == 0
    mine, other = contents(run), contents(replayed)
    assert {n: b for n, b in mine.items() if n.startswith(("values", "train"))} == {
        n: b for n, b in other.items() if n.startswith(("values", "train"))
    }
    assert mine["config.yaml"] == other["config.yaml"]


@pytest.mark.usefixtures("short")
def test_a_budget_is_not_sought_again(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plain = tmp_path / "run", PathScorer.score

    def stop(self: PathScorer, batch: Batch) -> Any:
        if listed(values_folder(run, 0)):
            raise KeyboardInterrupt
        return plain(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(PathScorer, "score", stop)
        with pytest.raises(KeyboardInterrupt):
            score(ScoreConfig(**settings), run)
    found = recorded(run)["first"]
    monkeypatch.setattr(trial, "Trial", None)
    monkeypatch.setattr(trial, "_USUAL", {"cpu": 1 << 20})
    done = score(ScoreConfig(**settings), run)
    assert [plan.batch_tokens for plan in done.manifest.generations[0].plan] == [found] * 2
    assert yaml.safe_load((run / "config.yaml").read_text())["batch_tokens"] == found


def test_a_small_input_needs_no_trial(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "Trial", None)
    settings["data"] = write_jsonl(tmp_path / "few.jsonl", token_records(12))
    done = score(ScoreConfig(**settings), tmp_path / "run")
    assert {plan.batch_tokens for plan in done.manifest.generations[0].plan} == {512}


def test_the_first_model_is_the_one_that_lacks_something(
    settings: dict[str, Any], models: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings["data"] = write_jsonl(tmp_path / "few.jsonl", token_records(12))
    score(ScoreConfig(**settings | {"reference": models["base"]}), run)
    spec, _, _ = _spec(run, settings | {"reference": models["base"]})

    def first() -> str:
        return trial.needed_first(spec, [0])

    assert first() == "model"
    nll = run / "artifacts" / "reference_nll-00000.safetensors"
    nll.rename(tmp_path / "kept")
    assert first() == "reference"
    (tmp_path / "kept").rename(nll)
    (run / "artifacts" / "fisher.safetensors").unlink()
    assert first() == "reference"
    spec = replace(spec, config=replace(spec.config, fisher=str(nll)))  # the user's own
    assert first() == "model"


def _spec(run: Path, settings: dict[str, Any]) -> Any:
    from alphatoken_curate.models.load import find_model
    from alphatoken_curate.runs.artifacts import Store
    from alphatoken_curate.scoring.reference import ReferencePass
    from alphatoken_curate.scoring.scorer import ShardScorer
    from alphatoken_curate.scoring.spec import ScorerSpec

    spec = ScorerSpec(
        config=ScoreConfig(**settings),
        model=find_model(settings["model"]),
        reference=find_model(settings["reference"]),
        dtype="float32",
        device="cpu",
        store=Store(folder=run / "artifacts", fields=recorded(run)["fields"]),
    )
    return spec, ReferencePass(spec), ShardScorer(spec)


def test_a_plan_of_typical_rows_is_within_the_budget(scoring: ScoringModel) -> None:
    tried = made(scoring, list(range(4, 60)), Heavy(1))
    for budget in (64, 200, 1000):
        chosen = tried._typical(budget)
        assert len(plan_batches(chosen, budget)) == 1 and tried.width in {len(row.input_ids) for row in chosen}
