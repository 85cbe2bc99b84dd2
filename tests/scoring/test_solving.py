"""Runs with --precondition astra from files to files: what is stored against an explicit system, solved exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracles
import polars as pl
import pytest
import torch
from curved import root_of
from killed import kill
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_files import Notes, contents, pair_records, perturbed, quiet, rows_of, token_records, write_jsonl
from torch import Tensor
from transformers import AutoModelForCausalLM

from alphatoken_curate import ScoreConfig, UsageError, refresh, score, verify
from alphatoken_curate.directions.sums import PART_ROWS
from alphatoken_curate.scoring import solving
from alphatoken_curate.tokens.tokenise import PairRow

DAMPING = 30.0
ROWS = token_records(PART_ROWS + 3, seed=2, longest=7)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base, a tuned model of a family that computes all of it in the dtype it is given, and rows."""
    folder = tmp_path_factory.mktemp("files")
    with quiet():
        tiny_model("gpt2", dtype=torch.float32).save_pretrained(folder / "base")
        perturbed(tiny_model("gpt2", dtype=torch.float32)).save_pretrained(folder / "tuned")
    records = {
        "rows": ROWS,
        "task": token_records(6, seed=9),
        "kept": token_records(5, seed=5),
        "pairs": pair_records(9),
    }
    made = {name: write_jsonl(folder / f"{name}.jsonl", each) for name, each in records.items()}
    weights = load_file(folder / "tuned/model.safetensors")
    fisher = {name: torch.rand_like(w.t().contiguous()) for name, w in weights.items() if w.ndim == 2}
    save_file(fisher, folder / "fisher.safetensors")  # GPT-2 keeps its maps transposed
    return made | {name: str(folder / name) for name in ("base", "tuned", "fisher.safetensors")}


def config(files: dict[str, str], **changes: Any) -> ScoreConfig:
    known = {"data": "=rows", "target": "=task", "model": "=tuned", "dtype": "float64", "layers": 1}
    known |= {"precondition": "astra", "precondition_damping": DAMPING, "estimator": "influence", "threads": 1}
    given = {**known, **changes}
    named = {n: files[v[1:]] if isinstance(v, str) and v.startswith("=") else v for n, v in given.items()}
    return ScoreConfig(**named)


def load(folder: str) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def solved(run: Path, generation: int = 0) -> dict[str, dict[str, Tensor]]:
    """By whose direction it is, its matrices by name."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(run / f"artifacts/solved-{generation:05d}.safetensors").items():
        whose, _, name = key.rpartition(" ")
        found.setdefault(whose, {})[name] = tensor
    return found


def system_of(run: Path, root: Tensor, names: list[str], share: float) -> Tensor:
    """H + lambda as one matrix; what EK-FAC stores decides lambda."""
    stored = load_file(run / "artifacts/precondition-00000.safetensors")
    moments = [stored[f"{name}.second_moment"].double() for name in names]
    lambdas = torch.cat([DAMPING * moment.mean().expand(moment.numel()) for moment in moments])
    return share * root.t() @ root + torch.diag(lambdas)


def flat(matrices: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([matrices[name].double().reshape(-1) for name in names])


def pairs_of(records: list[dict[str, Any]]) -> list[PairRow]:
    """The pairs of records of tokens, by hand."""
    both = [
        rows_of([{part: one[f"{branch}_{part}"] for part in ("input_ids", "labels")} for one in records])
        for branch in ("chosen", "rejected")
    ]
    return [PairRow(chosen=one, rejected=other) for one, other in zip(*both, strict=True)]


def test_values_are_along_the_exact_solution(files: dict[str, str], tmp_path: Path) -> None:
    records = token_records(4, seed=2, longest=6)
    data, notes = write_jsonl(tmp_path / "few.jsonl", records), Notes()
    made = score(config(files, data=data, precondition_iterations=40, target_groups=2), tmp_path / "run", notes)
    assert not verify(made.run)
    found, model, rows = solved(made.run), load(files["tuned"]), rows_of(records)
    assert set(found) == {"adapt", "adapt 0", "adapt 1"}
    names = list(oracles.weights(model, 1))
    stored = {name.removesuffix(".weight"): matrix for name, matrix in found["adapt"].items()}
    root = root_of(model, 1, rows, names)
    share = float(np.mean([1 / row.response.sum() for row in rows]))
    system = system_of(made.run, root, [f"{name}.weight" for name in names], share)
    places = [
        (torch.from_numpy(r.input_ids).long(), np.flatnonzero(r.response).tolist())
        for r in rows_of(token_records(6, seed=9))
    ]
    v = flat(oracles.mean_loss_gradient(model, 1, places), names)
    wanted = torch.linalg.solve(system, v)
    torch.testing.assert_close(flat(stored, names), wanted, rtol=1e-8, atol=1e-9 * float(wanted.abs().max()))
    residuals = made.manifest.settings["precondition_residuals"]
    assert {name: len(one) for name, one in residuals.items()} == dict.fromkeys(found, 41)  # type: ignore[union-attr]
    assert residuals["adapt"][-1] < 1e-8 < residuals["adapt"][0]  # type: ignore[index]
    assert '"precondition_residuals": {' in (made.run / "README.md").read_text()
    (told,) = (note for note in notes.notes if "astra" in note)
    assert (
        told.startswith("--precondition astra: 40 iterations leave ") and " at most, of 3 directions; EK-FAC " in told
    )
    assert not notes.warnings
    frame = pl.read_parquet(made.run / "values/generation=0/*.parquet").sort("row_id")
    values = frame["adapt_influence"].explode().drop_nulls().drop_nans().to_numpy()
    plain = oracles.eager(model).requires_grad_(True)
    each = []
    for row in rows:
        ids = torch.from_numpy(row.input_ids).long()
        for loss in oracles.losses(plain, ids, np.flatnonzero(row.response).tolist()):
            each.append(float(flat(oracles.weight_gradients(plain, 1, loss), names) @ wanted))
    np.testing.assert_allclose(values, each, rtol=1e-5, atol=1e-6 * np.abs(each).max())


@pytest.mark.long
def test_stability_is_solved_where_it_is_to_be_scaled(files: dict[str, str], tmp_path: Path) -> None:
    """Of pairs, whose margins are not 0: by the gradient of what is kept, by the drift, and by groups of each."""
    about = {"data": "=pairs", "retention": "=kept", "reference": "=base", "drift": "weights", "target_groups": 2}
    about |= {"precondition_iterations": 25, "fisher": "=fisher.safetensors", "estimator": "exact"}
    plain = score(config(files, **about), tmp_path / "plain").run
    run = score(config(files, **about, precondition_stability=True), tmp_path / "run").run
    assert set(solved(plain)) == {"adapt", "adapt 0", "adapt 1"}
    assert set(solved(run)) == {"adapt", "adapt 0", "adapt 1", "stab", "stab 0", "stab 1", "drift"}
    model, base = load(files["tuned"]), load(files["base"])
    held, before = oracles.weights(model, 1), oracles.weights(base, 1)
    reference = load_file(run / "artifacts/reference_nll-00000.safetensors")["nll"]
    rows = pairs_of(pair_records(9))
    lengths = [int(row.response.sum()) for pair in rows for row in (pair.chosen, pair.rejected)]
    sums = [float(part.double().sum()) for part in reference.split(lengths)]
    root = root_of(model, 1, rows, list(held), reference=sums)
    system = system_of(run, root, [f"{name}.weight" for name in held], 1.0)
    fisher = load_file(files["fisher.safetensors"])
    drift = {f"{n}.weight": fisher[f"{n}.weight"] * (w - before[n]).detach().t() for n, w in held.items()}
    wanted = {"drift": drift}
    for objective, kind in (("adapt", "target"), ("stab", "retention")):
        wanted[objective] = load_file(run / f"artifacts/{kind}-00000.safetensors")
        groups = load_file(run / f"artifacts/{kind}_groups-00000.safetensors")
        for n in ("0", "1"):
            wanted[f"{objective} {n}"] = {
                k.removeprefix(f"{n} "): g for k, g in groups.items() if k.startswith(f"{n} ")
            }
    names = [f"{name}.weight" for name in held]
    found = solved(run)
    exact = torch.linalg.solve(system, torch.stack([flat(wanted[whose], names) for whose in found], dim=1))
    for whose, x in zip(found, exact.t(), strict=True):
        assert float((flat(found[whose], names) - x).norm() / x.norm()) < 1e-6, whose
    one, two = (pl.read_parquet(at / "values/generation=0/*.parquet") for at in (plain, run))
    assert one["chosen_adapt_direct"].equals(two["chosen_adapt_direct"])
    assert not one["chosen_stab_direct"].equals(two["chosen_stab_direct"])
    assert not one["chosen_drift_direct"].equals(two["chosen_drift_direct"])


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "at",
    [
        "after-rename@solved-00000-along-1.safetensors",
        "after-rename@solved-00000-state-1.safetensors",
        *(
            pytest.param(f"after-rename@solved-00000{part}.safetensors", marks=pytest.mark.long)
            for part in ("-state-0", "-along-2", "-residuals", "")
        ),
    ],
)
def test_killed_it_goes_on_from_the_last_iterate_to_the_same_bytes(
    at: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(files, precondition_iterations=3)
    score(made, tmp_path / "whole")
    kill(at, lambda: score(made, tmp_path / "run"))
    steps, plain = list[int](), solving.step
    monkeypatch.setattr(solving, "step", lambda scorer, k, *others: steps.append(k) or plain(scorer, k, *others))
    score(made, tmp_path / "run")
    left = {"along-1": [0, 1, 2], "state-1": [1, 2], "state-0": [0, 1, 2], "along-2": [1, 2], "residuals": [2]}
    assert steps == left.get(at.removesuffix(".safetensors").partition("00000-")[2], [])
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    names = {path.name for path in (tmp_path / "run/artifacts").glob("solved*")}
    assert names == {"solved-00000.safetensors", "solved-00000-residuals.safetensors"}


def test_how_far_it_came_is_told(files: dict[str, str]) -> None:
    notes, made = Notes(), config(files, precondition_damping=0.2)
    residuals = {"adapt": torch.tensor([20.0, 3.0, 0.04]), "adapt 0": torch.tensor([5.0, 1.5, 0.5])}
    solving.tell(residuals, made, notes)
    assert notes.notes == [
        "--precondition astra: 2 iterations leave 0.5 of what is to be solved for at most, of 2 directions; EK-FAC 5."
    ]
    assert not notes.warnings
    solving.tell({"adapt": torch.tensor([20.0, 3.0])}, made, notes)
    assert notes.notes[1] == "--precondition astra: 1 iteration leave 3 of what is to be solved for; EK-FAC 20."
    assert notes.warnings == [
        "--precondition astra is far from solved: a --precondition-damping above 0.2 takes fewer iterations, or give"
        " more --precondition-iterations than 8."
    ]


def test_a_checkpoint_is_solved_for_by_its_own_curvature(files: dict[str, str], tmp_path: Path) -> None:
    about = {"reference": "=base", "precondition_iterations": 2, "target_groups": 2}
    run = score(config(files, **about, model="=base"), tmp_path / "run").run
    refresh(run, files["tuned"])
    alone = score(config(files, **about), tmp_path / "alone")
    one, two = (pl.read_parquet(at) for at in (run / "values/generation=1/*.parquet", alone.run / "values/*/*.parquet"))
    assert one.drop("generation").equals(two.drop("generation")) if "generation" in one.columns else one.equals(two)
    assert not verify(run)


def test_what_it_is_not_made_for_is_refused(files: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="--precondition astra with --parameters all: only linear maps"):
        config(files, parameters="all")
    with pytest.raises(UsageError, match="--precondition astra with --direction rehearsal: the optimiser"):
        config(files, direction="rehearsal", rehearse_lr=1e-3, parameters="linear")
