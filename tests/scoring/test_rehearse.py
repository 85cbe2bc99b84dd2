"""Rehearsed values from files to files: what a run stores against autograd through the whole unrolled training."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl
import pytest
import torch
from daily import daily
from killed import kill
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_rows
from tiny_files import (
    NAN_TOKEN,
    Notes,
    command,
    contents,
    perturbed,
    quiet,
    rows_of,
    token_records,
    write_jsonl,
)
from torch import Tensor
from transformers import AutoModelForCausalLM
from unrolled import J, mean_over, values_by_windows

from alphatoken_curate import InputError, ScoreConfig, refresh, score, verify
from alphatoken_curate.directions.course import Course, plan_steps
from alphatoken_curate.directions.groups import deal
from alphatoken_curate.directions.optimisers import Optimiser
from alphatoken_curate.directions.rehearsal import Rehearsal, mean_loss
from alphatoken_curate.directions.shelves import InMemory
from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.runs import manifest
from alphatoken_curate.scoring import rehearse
from alphatoken_curate.scoring.courses import kept_bytes, optimiser_of
from alphatoken_curate.tokens.tokenise import TokenRow

ROWS, TARGET, KEPT = token_records(9, seed=2), token_records(10, seed=9), token_records(6, seed=5)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base, a tuned model of a family that computes all of it in the dtype it is given, and rows."""
    folder = tmp_path_factory.mktemp("files")
    with quiet():
        tiny_model("gpt2", dtype=torch.float32).save_pretrained(folder / "base")
        perturbed(tiny_model("gpt2", dtype=torch.float32)).save_pretrained(folder / "tuned")
    model = tiny_model("gpt2", dtype=torch.float32)
    draw = torch.Generator().manual_seed(1)
    save_file({n: torch.rand(p.shape, generator=draw) for n, p in named(model).items()}, folder / "fisher")
    rows = {"data": ROWS, "target": TARGET, "retention": KEPT}
    made = {name: write_jsonl(folder / f"{name}.jsonl", records) for name, records in rows.items()}
    return made | {name: str(folder / name) for name in ("base", "tuned", "fisher")}


def named(model: Any) -> dict[str, Tensor]:
    """Tensors of a direction by name: GPT-2's maps are kept transposed."""
    with torch.no_grad():
        trainee = Trainee(model, "all", "all")
        names = [m.parameter for m in trainee.maps]
        weights = trainee.as_direction(trainee.weights)
        rest = [n for n, p in zip(trainee.names, trainee.weights, strict=True) if p not in trainee._matrices]
        return {n: w.detach().contiguous() for n, w in zip([*names, *rest], weights, strict=True)}


def config(files: dict[str, str], **settings: Any) -> ScoreConfig:
    known = {"data": (files["data"],), "target": files["target"], "model": files["base"], "dtype": "float64"}
    known |= {"direction": "rehearsal", "rehearse_lr": 1e-2, "rehearse_rows_per_step": 4, "rehearse_root": 1e-6}
    return ScoreConfig(**{**known, "fisher": files["fisher"], **settings})


def stored(run: Path, *names: str, generation: int = 0) -> dict[str, np.ndarray]:
    """(N,) of each column, all scored rows."""
    frame = pl.read_parquet(run / f"values/generation={generation}/*.parquet").filter(status="scored").sort("row_id")
    return {name: frame[name].explode().drop_nulls().to_numpy() for name in names}


def load(folder: str) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def drift_by_hand(fisher: dict[str, Tensor], reference: dict[str, Tensor], transposed: set[str]) -> J:
    """1/2 sum F (w - w_ref)^2, tensor by tensor."""

    def outcome(_: Any, held: dict[str, Tensor]) -> Tensor:
        parts = [
            ((fisher[n].t() if n in transposed else fisher[n]) * (w - reference[n]) ** 2).sum() for n, w in held.items()
        ]
        return torch.stack(parts).sum() / 2

    return outcome


def by_hand(files: dict[str, str], made: ScoreConfig, outcomes: list[J]) -> np.ndarray:
    """-dJ / dw of each outcome, mean over orders, (n, N) float64."""
    rows, found = rows_of(ROWS), []
    for order in range(made.rehearse_seeds):
        model = load(made.model)
        names = Trainee(load(made.model), made.layers, made.parameters).names  # type: ignore[arg-type]
        steps = plan_steps(
            rows, epochs=made.rehearse_epochs, rows_per_step=made.rehearse_rows_per_step, seed=made.seed + order
        )
        how = {"summed": made.rehearse_denominator == "sum"}
        window, optimiser = made.rehearse_window or len(steps), optimiser_of(made, len(steps))
        ends = [*range(len(steps), 0, -window)][::-1]
        found.append(values_by_windows(model, names, rows, steps, optimiser, outcomes, ends, **how))
    return np.mean([one.numpy() for one in found], axis=0)


def groups_of(records: list[dict[str, Any]], groups: int) -> list[list[TokenRow]]:
    return deal(rows_of(records), groups, seed=0)


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "tuned": {"model": "=tuned", "reference": "=base"},
    "kept": {"retention": "=retention", "target_groups": 3},
    "both": {"retention": "=retention", "drift": "weights", "target_groups": 1},
    "orders": {"rehearse_seeds": 2, "rehearse_epochs": 2, "rehearse_denominator": "sum", "target_groups": 2},
    "sgd": {"rehearse_optimizer": "sgd", "rehearse_momentum": 0.9, "rehearse_lr": 0.5, "rehearse_clip": 0.2},
    "last": {"layers": 1, "parameters": "linear", "rehearse_schedule": "cosine", "rehearse_warmup": 1},
    "windows": {
        **{"rehearse_window": 2, "rehearse_epochs": 2, "rehearse_rows_per_step": 4, "rehearse_seeds": 2},
        **{"retention": "=retention", "drift": "weights", "target_groups": 2},
    },
}


_OFTEN = ("default", "kept", "orders")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", daily(SETTINGS, _OFTEN))
def test_a_run_holds_what_autograd_finds_through_the_unrolled_training(
    name: str, files: dict[str, str], tmp_path: Path
) -> None:
    given = {key: files[v[1:]] if str(v).startswith("=") else v for key, v in SETTINGS[name].items()}
    made, run = config(files, **given), tmp_path / "run"
    score(made, run)
    assert not verify(run)
    targets = groups_of(TARGET, made.target_groups or 5)
    keeps = groups_of(KEPT, made.target_groups or 5) if made.retention else []
    outcomes = [mean_over(group) for group in (*targets, *keeps)]
    has_drift = not made.retention or made.drift is not None
    if has_drift:
        model = load(made.model)
        trainee = Trainee(load(made.model), made.layers, made.parameters)  # type: ignore[arg-type]
        reference = {n: p.detach() for n, p in load(made.reference or made.model).named_parameters()}
        fisher = {n: t.double() for n, t in _fisher(files).items()}
        transposed = {n for n, p in model.named_parameters() if n in fisher and fisher[n].shape != p.shape}
        transposed |= {f"{m.owner}.{m.slot}" for m in trainee.maps if m.transposed}
        outcomes.append(drift_by_hand(fisher, reference, transposed))
    values = by_hand(files, made, outcomes)
    expected = _expected(values, targets, keeps, has_drift=has_drift)
    found = stored(run, *expected)
    for column, wanted in expected.items():
        np.testing.assert_allclose(found[column], wanted, rtol=2e-6, atol=2e-7 * np.abs(wanted).max(), err_msg=column)
    value = expected["adapt_influence"] + 1.5 * expected["stab_influence"]
    np.testing.assert_allclose(stored(run, "value")["value"], value, rtol=1e-5, atol=1e-6 * np.abs(value).max())


def _fisher(files: dict[str, str]) -> dict[str, Tensor]:
    return load_file(files["fisher"])


def _expected(
    values: np.ndarray, targets: list[list[TokenRow]], keeps: list[list[TokenRow]], *, has_drift: bool
) -> dict[str, np.ndarray]:
    """Means weighed by tokens, and the standard error of that ratio, group by group."""
    found, first = {}, 0
    for prefix, groups in (("adapt", targets), ("stab", keeps)):
        mine = values[first : first + len(groups)]
        first += len(groups)
        if not groups:
            continue
        counts = np.array([sum(int(row.response.sum()) for row in group) for group in groups], float)
        mean = (counts[:, None] * mine).sum(axis=0) / counts.sum()
        found[f"{prefix}_influence"] = mean
        if len(groups) > 1:
            spread = ((counts[:, None] / counts.sum() * (mine - mean)) ** 2).sum(axis=0)
            found[f"{prefix}_error"] = np.sqrt(spread * len(groups) / (len(groups) - 1))
    if has_drift:
        found["drift_influence" if keeps else "stab_influence"] = values[-1]
    if "adapt_error" in found:
        squares = found["adapt_error"] ** 2 + (1.5 * found.get("stab_error", 0.0)) ** 2
        found["value_error"] = np.sqrt(squares)
    return found


@pytest.mark.long
def test_paths_are_stored_along_each_step(files: dict[str, str], tmp_path: Path) -> None:
    score(config(files, estimator="influence", parameters="linear"), tmp_path / "whole")
    score(config(files, estimator="exact+influence"), tmp_path / "parted")
    whole = stored(tmp_path / "whole", "adapt_influence", "stab_influence")
    parted = stored(
        tmp_path / "parted", *(f"{o}_{p}" for o in ("adapt", "stab") for p in ("direct", "causal", "upstream"))
    )
    for one in ("adapt", "stab"):
        wanted = whole[f"{one}_influence"]
        found = parted[f"{one}_direct"] + parted[f"{one}_upstream"]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())
        assert np.abs(parted[f"{one}_causal"]).max() > 1e-3 * np.abs(wanted).max()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("stability", ["retention", "drift"])
def test_a_row_without_a_finite_loss_is_left_out_of_the_training(
    stability: str, files: dict[str, str], models: dict[str, str], tmp_path: Path
) -> None:
    odd = {"input_ids": [5, NAN_TOKEN, 7, 8], "labels": [-100, NAN_TOKEN, 7, 8]}
    with_it = write_jsonl(tmp_path / "data.jsonl", [*ROWS[:4], odd, *ROWS[4:]])
    given = {"model": models["broken"], "layers": 1, "parameters": "linear", "fisher": "sampled", "dtype": "float32"}
    given |= {"retention": files["retention"]} if stability == "retention" else {}
    notes = Notes()
    done = score(config(files, data=(with_it,), **given), tmp_path / "run", notes)
    assert (done.manifest.counts.scored, done.manifest.counts.failed) == (len(ROWS), 1)
    left_out = [text for text in notes.warnings if "of the Fisher has no finite loss" in text]
    assert len(left_out) == (stability == "drift")
    frame = pl.read_parquet(tmp_path / "run/values/generation=0/*.parquet")
    assert frame["status"][4] == "failed" and np.isfinite(stored(tmp_path / "run", "value")["value"]).all()


@pytest.mark.long
def test_a_warmup_that_never_ends_is_told(files: dict[str, str], tmp_path: Path) -> None:
    for warmup, told in ((40, ["40: the training has 3 steps, so its rate ends at 5% of --rehearse-lr."]), (2, [])):
        notes = Notes()
        score(config(files, rehearse_warmup=warmup, retention=files["retention"]), tmp_path / str(warmup), notes)
        assert [text.partition("--rehearse-warmup ")[2] for text in notes.warnings if "warmup" in text] == told


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["target", "retention"])
def test_a_row_that_makes_an_outcome_infinite_is_named(
    kind: str, files: dict[str, str], models: dict[str, str], tmp_path: Path
) -> None:
    odd = {"input_ids": [5, NAN_TOKEN, 7, 8], "labels": [-100, NAN_TOKEN, 7, 8]}
    with_it = write_jsonl(tmp_path / "odd.jsonl", [*ROWS[:4], odd])
    given = {"model": models["broken"], "layers": 1, "parameters": "linear", "dtype": "float32", kind: with_it}
    given |= {"fisher": "sampled", "fisher_rows": 4}
    with pytest.raises(InputError, match=r"odd.jsonl:5: 1 target or retention row to which the model gives no finite"):
        score(config(files, **given), tmp_path / "run")
    with pytest.raises(InputError, match="smaller --rehearse-lr"):  # which is no fault of a row
        score(config(files, rehearse_lr=1000.0, dtype="float32"), tmp_path / "other")


def test_in_bfloat16_products_alone_are_rounded(files: dict[str, str], tmp_path: Path) -> None:
    """Weights, losses before the first step and sums are as in float32; Adam would turn small roundings to steps."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        score(config(files, dtype=dtype, layers=1, rehearse_optimizer="sgd"), tmp_path / dtype)
        found[dtype] = stored(tmp_path / dtype, "nll", "adapt_influence", "stab_influence")
    exact, rounded = found["float32"], found["bfloat16"]
    np.testing.assert_array_equal(exact.pop("nll"), rounded.pop("nll"))
    for name, values in exact.items():
        off = np.linalg.norm(values - rounded[name]) / np.linalg.norm(values)
        assert 1e-4 < off < 0.05, (name, off)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "at",
    [
        pytest.param("mid-write@rehearsal-00000-losses.safetensors", marks=pytest.mark.long),
        pytest.param("after-rename@rehearsal-00000-0-state-1.safetensors", marks=pytest.mark.long),
        "after-rename@rehearsal-00000-0-adjoint-0-3.safetensors",
        pytest.param("mid-write@rehearsal-00000-0-adjoint-0-1.safetensors", marks=pytest.mark.long),
        pytest.param("after-rename@rehearsal-00000-1-values-0.safetensors", marks=pytest.mark.long),
        "mid-write@rehearsal-00000-columns.safetensors",
        "after-rename@rehearsal-00000-columns.safetensors",
        pytest.param("mid-write@part-00000.parquet", marks=pytest.mark.long),
    ],
)
def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(
    at: str, files: dict[str, str], tmp_path: Path
) -> None:
    made = config(files, rehearse_seeds=2, layers=1)
    score(made, tmp_path / "whole")
    kill(at, lambda: score(made, tmp_path / "run"))
    score(made, tmp_path / "run")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    left = [path.name for path in (tmp_path / "run/artifacts").glob("rehearsal*")]
    assert left == ["rehearsal-00000-columns.safetensors"], "states are gone"


@pytest.mark.long
@pytest.mark.parametrize(
    ("at", "outcomes"),
    [("adjoint-0-1", [2, 2, 2]), ("values-0", [6])],
)
def test_where_a_killed_one_finds_less_memory_fewer_outcomes_go_back_together(
    at: str, outcomes: list[int], files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not once values are there, which fewer outcomes would have others of."""
    made = config(files, layers=1)
    score(made, tmp_path / "whole")
    kill(f"after-rename@rehearsal-00000-0-{at}.safetensors", lambda: score(made, tmp_path / "run"))
    seen: list[int] = []
    plain = Rehearsal._run_part

    def counted(self: Rehearsal, n: int, some: Any, *others: Any, **named: Any) -> Any:
        seen.append(len(some))
        return plain(self, n, some, *others, **named)

    monkeypatch.setattr(Rehearsal, "_run_part", counted)
    monkeypatch.setattr(rehearse, "at_once", lambda *_: 2)
    score(made, tmp_path / "run")
    assert seen == outcomes
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


BETWEEN = ("1-values-0w0", "0-values-2w1", "0-state-3", "1-adjoint-2w1-1", "1-values-2w1", "columns")


@pytest.mark.parametrize("at", daily(BETWEEN, [], BETWEEN[::2]))
def test_killed_between_windows_the_same_command_ends_with_the_same_bytes(
    at: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two orders, three parts of two outcomes each, and two windows: a step, and two."""
    made = config(files, rehearse_seeds=2, layers=1, rehearse_window=2)
    monkeypatch.setattr(rehearse, "at_once", lambda *_: 2)
    score(made, tmp_path / "whole")
    kill(f"after-rename@rehearsal-00000-{at}.safetensors", lambda: score(made, tmp_path / "run"))
    monkeypatch.setattr(rehearse, "at_once", lambda *_: 1)
    score(made, tmp_path / "run")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    assert len(list((tmp_path / "run/artifacts").glob("rehearsal*"))) == 1, "states are gone"


@pytest.mark.parametrize(
    "at",
    [
        "after-rename@rehearsal-00000-0-adjoint-0-1",
        pytest.param("mid-write@rehearsal-00000-columns", marks=pytest.mark.long),
    ],
)
def test_what_is_kept_below_what_trains_decides_nothing_and_leaves_nothing(
    at: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory, on disk, or lost with the process that kept it."""
    made = config(files, layers=1, parameters="linear", retention=files["retention"], dtype="float32")
    score(made, tmp_path / "whole")
    monkeypatch.setattr("alphatoken_curate.engine.below.ROOM", 1)
    kill(f"{at}.safetensors", lambda: score(made, tmp_path / "run"))
    assert ("adjoint" in at) == bool(list((tmp_path / "run/artifacts").glob(".rehearsal.*.tmp")))
    score(made, tmp_path / "run")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.long
def test_a_window_of_all_steps_gives_the_values_of_none(files: dict[str, str], tmp_path: Path) -> None:
    columns = {}
    for window in (None, 3, 2):
        score(config(files, layers=1, rehearse_window=window), tmp_path / str(window))
        (kept,) = (tmp_path / str(window) / "artifacts").glob("rehearsal*")
        columns[window] = {name: tensor.numpy().tobytes() for name, tensor in load_file(kept).items()}
    assert columns[3] == columns[None]
    assert columns[2] != columns[None] and columns[2]["nll"] == columns[None]["nll"]
    assert ["its window" in (tmp_path / name / "README.md").read_text() for name in "32"] == [False, True]


@pytest.mark.long
def test_a_checkpoint_is_rehearsed_from_where_it_is(files: dict[str, str], tmp_path: Path) -> None:
    settings = {"reference": files["base"], "layers": 1}
    score(config(files, **settings), tmp_path / "run")
    refresh(tmp_path / "run", files["tuned"])
    score(config(files, model=files["tuned"], **settings), tmp_path / "alone")
    names = ("nll", "adapt_influence", "stab_influence", "value", "value_error")
    found, wanted = stored(tmp_path / "run", *names, generation=1), stored(tmp_path / "alone", *names)
    for name in names:
        np.testing.assert_array_equal(found[name], wanted[name])
    assert not verify(tmp_path / "run")


@pytest.mark.long
def test_a_finished_rehearsal_is_left_alone_and_another_one_refused(files: dict[str, str], tmp_path: Path) -> None:
    run, made = tmp_path / "run", config(files, layers=1)
    score(made, run)
    before = contents(run)
    assert score(made, run).shards_scored == 0 and contents(run) == before
    ended = command("score", "--config", run / "config.yaml", "--rehearse-lr", "0.02", "-o", run)
    assert ended.code == 4 and "rehearse_lr (0.01 in the run, 0.02 now)" in ended.err
    replayed = command("score", "--config", run / "config.yaml", "-o", tmp_path / "again")
    assert replayed.code == 0, replayed.err
    values = "values/generation=0/part-00000.parquet"
    assert (tmp_path / "again" / values).read_bytes() == (run / values).read_bytes()


def test_what_it_was_told_stands_in_the_run(files: dict[str, str], tmp_path: Path) -> None:
    score(config(files, layers=1, rehearse_window=2), tmp_path / "run")
    told = manifest.read(tmp_path / "run").settings
    assert told["direction"] == "rehearsal" and told["rehearse_lr"] == 0.01 and told["groups"] == 5
    assert "rehearse_momentum" not in told and told["rehearse_betas"] == "0.9,0.999" and told["rehearse_window"] == 2
    assert "each step by the outcome at the end of its window of 2 steps" in (tmp_path / "run/README.md").read_text()
    # On a CPU: where memory runs out there, nothing is left to halve it.
    assert orjson.loads((tmp_path / "run/artifacts/run.json").read_bytes())["first"] == 1024


class Tallied(InMemory):
    """A shelf that, with others, notes the most bytes they held."""

    def __init__(self, others: list[Tallied]) -> None:
        super().__init__()
        self.all, self.most = others, 0
        others.append(self)

    def put(self, name: str, tensors: Any) -> None:
        super().put(name, tensors)
        every = (t for shelf in self.all for held in shelf._held.values() for t in held.values())
        self.most = max(self.most, sum(t.nbytes for t in every))


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("window", "at_once"), [(None, 2), (5, 1), (5, 2), (1, 2)])
def test_what_is_said_to_lie_on_disk_does(window: int | None, at_once: int) -> None:
    rows = tiny_rows()
    optimiser = Optimiser(lr=0.01, steps=12)
    course = Course(rows=rows, steps=[(i % 6,) for i in range(12)], optimiser=optimiser, window=window)
    trainee, shelves = Trainee(tiny_model("gpt2", dtype=torch.float32), 1, "linear"), list[Tallied]()
    rehearsal = Rehearsal(trainee, course, Tallied(shelves), steps=Tallied(shelves))
    rehearsal.run([mean_loss(rows[:1], 100), mean_loss(rows[1:], 100)], at_once=at_once)
    settings = ScoreConfig(data=("d",), direction="rehearsal", rehearse_lr=0.01)
    said, most = kept_bytes(rehearsal.state, course, at_once, 2, settings), max(shelf.most for shelf in shelves)
    assert 0.9 * said < most < 1.02 * said


def test_few_target_rows_and_much_of_a_root_are_warned_of(files: dict[str, str], tmp_path: Path) -> None:
    notes = Notes()
    score(config(files, layers=1, rehearse_root=1.0), tmp_path / "run", notes)
    told = "\n".join(notes.warnings)
    assert "10 target rows" in told and "--rehearse-root 1 changes the steps by" in told
    assert "order 1" not in told


def test_a_training_that_diverges_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"The rehearsal diverges: in step 2 of 3 .* smaller --rehearse-lr"):
        score(config(files, rehearse_lr=100.0), tmp_path / "run")
    assert not list((tmp_path / "run").glob("values/*/*.parquet"))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("estimator", "use"),
    [("exact", "--by '7 - surprise' --keep positive"), ("exact+influence", "--by 'adapt_direct + adapt_upstream'")],
)
def test_the_mask_that_score_suggests_can_be_made(
    files: dict[str, str], tmp_path: Path, estimator: str, use: str
) -> None:
    """Of paths alone no number says what a token's own loss does, which a weight changes."""
    kept = write_jsonl(tmp_path / "kept.jsonl", token_records(4, seed=7))
    flags = ["--target", files["target"], "--retention", kept, "--drift", "weights", "--model", files["base"]]
    how = ["--direction", "rehearsal", "--rehearse-lr", 0.01, "--layers", 1, "--estimator", estimator]
    ended = command("score", files["data"], *flags, *how, "-o", tmp_path / "run")
    assert ended.code == 0, ended.err
    # It moves from the model that is its own reference, so there is a drift.
    assert (
        "no drift to store" not in ended.err and np.abs(stored(tmp_path / "run", "drift_direct")["drift_direct"]).max()
    )
    printed = ended.out.splitlines()[-1].split("alphatoken-curate ")[1]
    assert use in printed and command(*shlex.split(printed)).code == 0


def test_score_says_how_many_lie_below_zero_beyond_their_error(files: dict[str, str], tmp_path: Path) -> None:
    flags = ["--target", files["target"], "--model", files["base"], "--direction", "rehearsal", "--layers", "1"]
    ended = command("score", files["data"], *flags, "--rehearse-lr", "0.01", "-o", tmp_path / "run")
    assert ended.code == 0, ended.err
    found = stored(tmp_path / "run", "value", "value_error")
    below = int((found["value"] + 2.132 * found["value_error"] < 0).sum())  # Student, one-sided 95%, 4 degrees
    told = ended.out.split("  errors  ")[1].splitlines()
    assert told[0].startswith(f"{below} of {len(found['value'])} response tokens")
    assert "2.132 standard errors, of 5 groups of target rows" in told[0]
    assert "A mild use, for" in ended.out and "--by adapt_influence --weights tilt:0.25" in ended.out
    assert "no drift" not in ended.err
    made = command("mask", tmp_path / "run", "--by", "value + 2.132 * value_error", "--keep", "positive")
    assert f"{len(found['value']) - below} of {len(found['value'])} response tokens kept" in made.out or below == 0
