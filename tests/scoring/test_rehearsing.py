"""A rehearsal that several do: the same bytes whatever its portions are, whoever does them, and who of them dies."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pooled
import pytest
import torch
from daily import daily
from killed import kill
from safetensors.torch import load_file
from tiny import tiny_model, tiny_pairs, tiny_rows
from tiny_files import Notes, contents, pair_records, token_records, write_jsonl

from alphatoken_curate import Local, ScoreConfig, refresh, score
from alphatoken_curate.errors import CurateError
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs.artifacts import REHEARSAL, Store
from alphatoken_curate.runs.atomic import TEMPORARY
from alphatoken_curate.scoring import rehearse
from alphatoken_curate.scoring.engines import Here
from alphatoken_curate.scoring.material import Material, put_away_in
from alphatoken_curate.scoring.portions import Portion, deal, known
from alphatoken_curate.scoring.rehearse import RehearsalScorer, together
from alphatoken_curate.scoring.spec import ScorerSpec
from alphatoken_curate.scoring.worker import Done, Stage, Worker


class Apart(Here):
    """Workers that are all in this process, each with models of its own; who has the last task is done first."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self._all = workers
        self.stages: list[list[str]] = []

    @property
    def workers(self) -> int:
        return self._all

    def begin(self, spec: ScorerSpec, threads: int | None) -> None:
        super().begin(spec, threads)
        self._each = [Worker(spec) for _ in range(self._all)]

    def run(self, stage: Stage, progress: Progress) -> Iterator[tuple[int, Done]]:  # type: ignore[override]
        tasks = list(stage.tasks)
        self.stages.append([task.what for task in tasks])
        if stage.tokens:
            progress.stage(stage.name, stage.tokens)
        for n in reversed(range(len(tasks))) if not stage.in_order else range(len(tasks)):
            yield n, self._each[n % self._all].do(stage.of, tasks[n], Silenced(progress))


class Silenced:
    """Tells of all but stages, as workers do."""

    def __init__(self, progress: Progress) -> None:
        self.advance, self.note, self.warn = progress.advance, progress.note, progress.warn

    def stage(self, name: str, tokens: int) -> None:
        """Nothing."""


@pytest.fixture
def settings(models: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """Six outcomes in two orders: three of target rows, two of rows to retain, and the drift."""
    return {
        "data": write_jsonl(tmp_path / "rows.jsonl", token_records(12, longest=18)),
        "target": write_jsonl(tmp_path / "target.jsonl", token_records(9, seed=5)),
        "retention": write_jsonl(tmp_path / "retention.jsonl", token_records(2, seed=6)),
        "drift": "weights",
        "model": models["tuned"],
        "reference": models["base"],
        "target_groups": 3,
        "rehearse_seeds": 2,
        "direction": "rehearsal",
        "rehearse_lr": 1e-3,
        "rehearse_rows_per_step": 4,
        "layers": 1,
        "rows_per_shard": 5,
        "batch_tokens": 200,
        "threads": 1,
    }


def states(run: Path) -> list[str]:
    """What a rehearsal keeps, as far as it is there."""
    return sorted(path.name for path in (run / "artifacts").glob("*rehearsal*"))


COLUMNS = ["rehearsal-00000-columns.safetensors"]


def pieces(of: int, orders: int) -> list[tuple[int, int]]:
    return list(itertools.product(range(orders), range(of)))


def test_portions_are_all_that_is_missing_and_a_share_for_each() -> None:
    draw = np.random.default_rng(0)
    for of, orders, workers in itertools.product((1, 2, 6, 9), (1, 2, 3), (1, 2, 3, 4, 40)):
        every = pieces(of, orders)
        for missing in (every, [piece for piece in every if draw.random() < 0.6] or every):
            found = deal(missing, of, orders, workers)
            assert sorted(piece for portion in found for piece in portion.pieces) == missing
            assert sum(map(len, found)) == len(missing) and [*map(len, found)] == sorted(map(len, found))[::-1]
            assert max(map(len, found)) <= min(of, -(-len(missing) // workers))
            if missing == every:
                assert len(found) <= workers + orders - 1
                at_work = np.zeros(workers)
                for portion in found:
                    at_work[at_work.argmin()] += len(portion)
                assert at_work.max() <= np.ceil(of * orders / workers) + (orders > 1) * (of % workers > 0)
    assert deal([], 6, 2, 3) == []


def test_what_was_begun_goes_on_unless_it_is_too_much_for_one() -> None:
    half, whole = Portion(order=0, first=0, end=3, of=6), Portion(order=0, first=0, end=6, of=6)
    every = pieces(6, 1)
    assert deal(every, 6, 1, 2, [half]) == [half, Portion(order=0, first=3, end=6, of=6)]
    assert deal(every, 6, 1, 1, [half]) == [half, Portion(order=0, first=3, end=6, of=6)]
    assert deal(every, 6, 1, 1, [whole]) == deal(every, 6, 1, 1) == [whole]
    assert whole not in deal(every, 6, 1, 2, [whole]) and half not in deal(every, 6, 1, 3, [half])
    assert whole in deal(pieces(6, 2), 6, 2, 2, [whole])
    assert half not in deal(every[1:], 6, 1, 2, [half])  # a part of it is there


def test_portions_are_known_by_what_they_keep(tmp_path: Path) -> None:
    store = Store(folder=tmp_path, fields={}, generation=3)
    one, other = Portion(order=1, first=2, end=4, of=6), Portion(order=1, first=0, end=6, of=6)
    single, far = Portion(order=1, first=2, end=3, of=6), Portion(order=11, first=0, end=6, of=6)
    for portion in (one, other, single, far):
        for what in ("state-3", "adjoint-0w1-3", "adjoint-0w1-3-0", "done"):
            store.save(REHEARSAL, {"x": torch.zeros(1)}, f"{portion.name}-{what}")
    for what in ("losses", "rows", "columns"):
        store.save(REHEARSAL, {"x": torch.zeros(1)}, what)
    assert {portion for _, portion, _ in known(store, 6)} == {one, other, single, far}
    assert len([*known(store, 6)]) == 16
    assert [path.name for path in one.kept(store, "adjoint-")] == [
        f"rehearsal-00003-1.2-3-adjoint-0w1-3{n}.safetensors" for n in ("", "-0")
    ]
    assert [len(portion.kept(store)) for portion in (one, other, single, far)] == [4, 4, 4, 4]
    assert one.told(2) == ", order 2 of 2, outcomes 3 to 4 of 6" and other.told(1) == ""
    assert single.told(1) == ", outcome 3 of 6"


@pytest.mark.parametrize("rows", [tiny_rows(), tiny_pairs()], ids=["rows", "pairs"])
def test_what_is_put_away_is_found_as_it_was(rows: list[Any], tmp_path: Path) -> None:
    store = Store(folder=tmp_path, fields={})
    given = Material(rows=rows, target=tiny_rows(), retention=[], reference=np.arange(3, dtype=np.float32))
    given.put_away(store)
    found = put_away_in(store)
    assert repr(found.rows) == repr(rows) and repr(found.target) == repr(given.target) and not found.retention
    assert found.reference is not None and found.reference.tolist() == [0, 1, 2]


KINDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "sum": {"rehearse_denominator": "sum", "rehearse_epochs": 2, "rehearse_clip": 0.5},
    "influence": {"estimator": "influence", "parameters": "all", "layers": 2},
    "exact": {"estimator": "exact", "layers": "all"},
    "windows": {"rehearse_window": 2, "rehearse_epochs": 2},
    "lora": {"rehearse_lora": 2, "retention": None},
    "lora windows": {"rehearse_lora": 2, "rehearse_window": 1, "drift": None},
    "narrow": {"dtype": "bfloat16", "rehearse_optimizer": "sgd"},
    "pairs": {"kind": "preference"},
    "pairs of one": {"kind": "preference", "reference": None, "drift": None, "rehearse_window": 2},
}


@pytest.mark.parametrize("name", daily(KINDS, [], ["exact", "lora", "narrow", "pairs of one", "windows"]))
def test_the_portions_of_a_rehearsal_change_no_byte(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= KINDS[name]
    if settings.pop("kind", "sft") == "preference":
        settings["data"] = write_jsonl(tmp_path / "pairs.jsonl", pair_records(12))
    made = ScoreConfig(**settings)
    score(made, tmp_path / "one")
    for workers in (5,) if name == "whole" else (2, 3, 5, 20):
        notes, engine = Notes(), Apart(workers)
        score(made, tmp_path / f"{workers}", notes, engine)
        assert contents(tmp_path / f"{workers}") == contents(tmp_path / "one")
        (dealt,) = (tasks for tasks in engine.stages if tasks[0].startswith("the rehearsal"))
        assert len(dealt) >= workers or workers == 20
        assert all(notes.done[stage] == tokens for stage, tokens in notes.stages if stage == "rehearsal")
    assert states(tmp_path / "one") == COLUMNS


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="whole", marks=pytest.mark.long),
        pytest.param({"rehearse_lora": 2, "retention": None}, id="lora", marks=pytest.mark.stress),
    ],
)
def test_any_number_of_workers_writes_the_same_bytes(
    changes: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    made, runs = ScoreConfig(**settings | changes), {workers: tmp_path / f"run{workers}" for workers in (1, 2, 3)}
    for workers, run in runs.items():
        score(made, run, engine=None if workers == 1 else Local(workers))
    assert contents(runs[2]) == contents(runs[1]) == contents(runs[3])


@pytest.mark.long
def test_a_worker_that_dies_goes_on_from_what_it_kept(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it was writing, or kept for itself, is swept."""
    made, notes, marks = ScoreConfig(**settings), Notes(), tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setenv(pooled.MARKS, str(marks))
    score(made, tmp_path / "one")
    with monkeypatch.context() as patch:
        patch.setattr(RehearsalScorer, "losses", pooled.rehearsal_losses)
        patch.setattr(RehearsalScorer, "rehearse", pooled.rehearse)
        score(made, tmp_path / "two", notes, Local(2))
    assert {path.name for path in marks.iterdir()} == {"rehearsal_losses", "rehearse 0", "rehearse 1"}
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    tokens = dict(notes.stages)["rehearsal"]
    assert notes.done["rehearsal"] == tokens, "no step was gone through twice"
    assert states(tmp_path / "two") == COLUMNS and not notes.warnings[1:]


@pytest.mark.long
def test_a_portion_that_always_kills_is_named_and_the_others_are_kept(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, run = ScoreConfig(**settings), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RehearsalScorer, "rehearse", pooled.rehearsed_but_one)
        told = r"the rehearsal, order 2 of 2: its worker was killed by SIGKILL, 3 times\. All else is kept"
        with pytest.raises(CurateError, match=told):
            score(made, run, engine=Local(2))
    assert "rehearsal-00000-0-done.safetensors" in states(run)
    score(made, run)
    score(made, tmp_path / "whole")
    assert contents(run) == contents(tmp_path / "whole")


KILLS = [
    ("after-rename@rehearsal-00000-rows.safetensors", 2),
    ("after-rename@rehearsal-00000-losses.safetensors", 3),
    ("after-rename@rehearsal-00000-1.2-5-adjoint-0-1.safetensors", 3),
    ("after-rename@rehearsal-00000-1.2-5-done.safetensors", 3),
    ("mid-write@rehearsal-00000-0.0-3-done.safetensors", 3),
    ("after-rename@rehearsal-00000-0-state-1.safetensors", 2),
    ("after-rename@rehearsal-00000-0-adjoint-0-1.safetensors", 1),
    ("after-rename@rehearsal-00000-0-done.safetensors", 1),
    ("after-rename@rehearsal-00000-columns.safetensors", 3),
]


@pytest.mark.parametrize(("at", "workers"), daily(KILLS, [], KILLS[1::2]))
def test_killed_anywhere_any_number_of_workers_goes_on(
    at: str, workers: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    made = ScoreConfig(**settings)
    score(made, tmp_path / "whole")
    for then in (1, 2, 3, 4):
        run = tmp_path / f"run{then}"
        kill(at, lambda run=run: score(made, run, engine=Apart(workers) if workers > 1 else None))  # type: ignore[misc]
        engine = Apart(then)
        score(made, run, engine=engine if then > 1 else None)
        assert contents(run) == contents(tmp_path / "whole")
        if "1.2-5-done" in at and then > 1:  # of the three other portions two are done, and one is not begun
            (dealt,) = (tasks for tasks in engine.stages if tasks[0].startswith("the rehearsal"))
            assert len(dealt) == then and all("order 1 of 2" in what for what in dealt)


@pytest.mark.long
def test_killed_with_the_same_workers_every_portion_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    """None of them is cut otherwise, though less is missing."""
    made, run, engine = ScoreConfig(**settings), tmp_path / "run", Apart(3)
    kill("after-rename@rehearsal-00000-0.0-3-adjoint-0-1.safetensors", lambda: score(made, run, engine=Apart(3)))
    assert [name for name in states(run) if name.endswith("-done.safetensors")]
    score(made, run, engine=engine)
    (dealt,) = (tasks for tasks in engine.stages if tasks[0].startswith("the rehearsal"))
    assert dealt == ["the rehearsal, order 1 of 2, outcomes 1 to 4 of 6"]


@pytest.mark.long
def test_memory_that_runs_out_for_a_portion_is_that_of_all(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in other batches round otherwise, and no value may depend on which outcomes went back together."""
    settings |= {"rehearse_seeds": 1, "reference": None, "drift": None}  # budgets are of these, too
    with monkeypatch.context() as patch:
        patch.setattr(RehearsalScorer, "rehearse", pooled.rehearsed_short_of_memory)
        score(ScoreConfig(**settings), tmp_path / "one")
        notes, engine = Notes(), Apart(2)
        score(ScoreConfig(**settings), tmp_path / "two", notes, engine)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert [said for said in notes.warnings if "halved to 100 for the rehearsal" in said]
    score(ScoreConfig(**settings | {"batch_tokens": 100}), tmp_path / "small")
    kept = [load_file(tmp_path / name / "artifacts" / COLUMNS[0]) for name in ("two", "small")]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[1])
    dealt = [tasks for tasks in engine.stages if tasks[0].startswith("the rehearsal")]
    assert [len(tasks) for tasks in dealt] == [2, 2]  # the last outcomes are done first, and once more


@pytest.mark.long
def test_refresh_keeps_its_workers(settings: dict[str, Any], models: dict[str, str], tmp_path: Path) -> None:
    for name in ("one", "two"):
        score(ScoreConfig(**settings), tmp_path / name)
    seen: list[set[int | None]] = []
    engine = Local(2)
    for model in (models["base"], models["tuned"]):
        refresh(tmp_path / "one", model)
        pids = lambda _: seen.append({one.handle.process.pid for one in engine._members})  # noqa: E731
        refresh(tmp_path / "two", model, engine=engine, told=pids)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(seen) == 2 and all(seen) and not engine._members
    assert not [path for path in tmp_path.rglob("*") if TEMPORARY.fullmatch(path.name)]


def test_workers_share_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearse, "fitting", lambda *_: 6.5)
    given: Any = None
    assert [rehearse.at_once(given, 6, given, sharing) for sharing in (1, 2, 3, 6, 40)] == [6, 3, 2, 1, 1]
    assert together(7, 6) == 4 and together(1, 0) == 1
    engine: Any = Local(5)
    assert engine.workers == 0
    for cards, sharing in ([], 5), (["0", "1"], 3), ([str(n) for n in range(8)], 1):
        monkeypatch.setattr("alphatoken_curate.scoring.processes.cards_of", lambda _, cards=cards: cards)
        engine._beginning, engine._workers = type("", (), {"spec": type("", (), {"device": "x"})}), 5
        assert engine.sharing() == sharing


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("family", "kind", "told"),
    [
        ("gpt2", "sft", "drops out as it trains (attn_pdrop 0.1, embd_pdrop 0.1, resid_pdrop 0.1)"),
        ("gpt2", "preference", None),
        ("olmoe", "preference", "router_aux_loss_coef is 0.01"),
        ("llama", "sft", None),
    ],
)
def test_what_a_training_adds_to_the_rehearsed_one_is_told(
    tmp_path: Path, family: str, kind: str, told: str | None
) -> None:
    changes = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1} if family == "gpt2" else {}
    tiny_model(family, dtype=torch.float32, **changes).save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "rows.jsonl", token_records(4) if kind == "sft" else pair_records(4))
    model, notes = str(tmp_path / "model"), Notes()
    config = ScoreConfig(data=data, model=model, direction="rehearsal", rehearse_lr=1e-3, layers=1)
    score(config, tmp_path / "run", progress=notes)
    found = [one for one in notes.warnings if "these values are of another training" in one]
    assert [told in one for one in found] == [True] if told else not found
