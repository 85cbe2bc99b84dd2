"""Runs with --precondition astra from files to files: what is stored against an explicit system, solved exactly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import polars as pl
import pytest
import torch
from curved import root_of
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_files import Notes, contents, pair_records, perturbed, quiet, rows_of, token_records, write_jsonl
from torch import Tensor
from transformers import AutoModelForCausalLM

from alphatoken_curate import ScoreConfig, UsageError, refresh, score, verify
from alphatoken_curate.directions.sums import PART_ROWS
from alphatoken_curate.scoring import solving

DAMPING = 30.0
KILL_AT = "ALPHATOKEN_CURATE_KILL_AT"
ROWS = token_records(PART_ROWS + 3, seed=2, longest=7)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base, a tuned model of a family that computes all of it in the dtype it is given, and rows."""
    folder = tmp_path_factory.mktemp("files")
    with quiet():
        tiny_model("gpt2", dtype=torch.float32).save_pretrained(folder / "base")
        perturbed(tiny_model("gpt2", dtype=torch.float32)).save_pretrained(folder / "tuned")
    records = {"rows": ROWS, "task": token_records(6, seed=9), "kept": token_records(5, seed=5), "pairs": pair_records(9)}
    made = {name: write_jsonl(folder / f"{name}.jsonl", each) for name, each in records.items()}
    weights = load_file(folder / "tuned/model.safetensors")
    save_file({name: torch.rand_like(w) for name, w in weights.items()}, folder / "fisher.safetensors")
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


def test_values_are_along_the_exact_solution(files: dict[str, str], tmp_path: Path) -> None:
    records = token_records(6, seed=2, longest=8)
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
    places = [(torch.from_numpy(r.input_ids).long(), np.flatnonzero(r.response).tolist()) for r in rows_of(token_records(6, seed=9))]
    v = flat(oracles.mean_loss_gradient(model, 1, places), names)
    wanted = torch.linalg.solve(system, v)
    torch.testing.assert_close(flat(stored, names), wanted, rtol=1e-8, atol=1e-9 * float(wanted.abs().max()))
    residuals = made.manifest.settings["precondition_residuals"]
    assert {name: len(one) for name, one in residuals.items()} == dict.fromkeys(found, 41)  # type: ignore[union-attr]
    assert residuals["adapt"][-1] < 1e-8 < residuals["adapt"][0]  # type: ignore[index]
    assert '"precondition_residuals": {' in (made.run / "README.md").read_text()
    (told,) = (note for note in notes.notes if "astra" in note)
    assert told.startswith("--precondition astra: 40 iterations leave ") and "at most, of 3 directions; EK-FAC" in told
    frame = pl.read_parquet(made.run / "values/generation=0/*.parquet").sort("row_id")
    values = frame["adapt_influence"].explode().drop_nulls().drop_nans().to_numpy()
    plain = oracles.eager(model).requires_grad_(True)
    each = []
    for row in rows:
        ids = torch.from_numpy(row.input_ids).long()
        for loss in oracles.losses(plain, ids, np.flatnonzero(row.response).tolist()):
            each.append(float(flat(oracles.weight_gradients(plain, 1, loss), names) @ wanted))
    np.testing.assert_allclose(values, each, rtol=1e-5, atol=1e-6 * np.abs(each).max())
