"""Influence from files to files: what a run stores against gradients of whole models that autograd takes by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from directed import by_gradients, ids_of, places
from safetensors.torch import save_file
from small_run import published
from tiny import tiny_model
from tiny_files import perturbed, quiet, rows_of, token_records, write_jsonl
from torch import Tensor
from transformers import AutoModelForCausalLM

from alphatoken_curate import ScoreConfig, mask, scan, score, score_tokens, verify
from alphatoken_curate.engine.capture import ScoringModel

TARGET, KEYS = token_records(4, seed=9), ("input_ids", "labels")


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base and a tuned model on disk. transformers writes experts one by one, under names of their own."""
    folder = tmp_path_factory.mktemp(request.param)
    family = {"dtype": torch.float32}
    with quiet():
        tiny_model(request.param, **family).save_pretrained(folder / "base")
        perturbed(tiny_model(request.param, **family)).save_pretrained(folder / "tuned")
    return {"reference": str(folder / "base"), "model": str(folder / "tuned")}


def load(folder: str) -> Any:
    with quiet():
        return oracles.eager(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)).eval()


def scope(folder: str, parameters: Any) -> tuple[list[str], ScoringModel]:
    """Names of whole parameters in S, as the model has them."""
    scoring = ScoringModel(load(folder), 2, parameters)
    return list(dict.fromkeys([*(f"{m.owner}.{m.slot}" for m in scoring.maps), *scoring.rest])), scoring


def mean_gradient(model: Any, names: list[str]) -> dict[str, Tensor]:
    """Gradient of the mean loss of the target's response tokens."""
    model.requires_grad_(True)
    rows = rows_of(TARGET)
    total = sum(oracles.losses(model, ids_of(row), places(row)).sum() for row in rows)
    held = dict(model.named_parameters())
    grads = torch.autograd.grad(total, [held[n] for n in names], allow_unused=True)
    tokens = sum(int(r.response.sum()) for r in rows)
    return {n: torch.zeros_like(held[n]) if g is None else g / tokens for n, g in zip(names, grads, strict=True)}


def fisher_file(scoring: ScoringModel, path: Path) -> dict[str, Tensor]:
    """A made-up Fisher, saved matrix by matrix; by whole parameters."""
    generator = torch.Generator().manual_seed(8)
    shapes = zip(scoring.names, (w.shape for w in scoring.weights), strict=True)
    each = {name: torch.rand(shape, generator=generator) for name, shape in shapes}
    save_file(each, path)
    whole = {n: torch.zeros(p.shape) for n, p in scoring.model.named_parameters()}
    for m in scoring.maps:
        kept = each[m.parameter].t() if m.transposed else each[m.parameter]
        if m.expert is None:
            whole[f"{m.owner}.{m.slot}"] = kept
        else:
            whole[f"{m.owner}.{m.slot}"][m.expert] = kept
    return whole | {name: each[name] for name in scoring.rest}


def stored(run: Path, name: str) -> list[Tensor]:
    """A column's values at the response tokens of each row."""
    found = scan(run).collect()
    return [torch.tensor([x for x in row if x is not None], dtype=torch.float64) for row in found[name].to_list()]


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Runs are float32, in which plain autograd errs by up to 2.8e-5 of the largest on these models."""
    largest = max(float(w.abs().max()) for w in wanted)
    assert largest > 0
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and float((one - other).abs().max()) < 4e-5 * largest


@pytest.mark.one_in(4)
@pytest.mark.parametrize("parameters", ["linear", "all"])
def test_a_run_holds_the_product_of_each_tokens_gradient_with_the_directions(
    both: dict[str, str], parameters: Any, tmp_path: Path
) -> None:
    records = token_records(5)
    data, target = (write_jsonl(tmp_path / n, r) for n, r in (("data.jsonl", records), ("target.jsonl", TARGET)))
    names, scoring = scope(both["model"], parameters)
    fisher = fisher_file(scoring, tmp_path / "fisher.safetensors")
    settings: dict[str, Any] = {"estimator": "influence", "parameters": parameters, "layers": 2, "target": target}
    config = ScoreConfig(data=(data,), fisher=str(tmp_path / "fisher.safetensors"), **settings, **both)
    score(config, tmp_path / "run")
    model, reference = load(both["model"]), load(both["reference"])
    before = dict(reference.named_parameters())
    drift = {n: fisher[n] * (p - before[n]).detach() for n, p in model.named_parameters() if n in names}
    rows = rows_of(records)
    task = mean_gradient(model, names)
    close(stored(tmp_path / "run", "adapt_influence"), [by_gradients(model, task, row) for row in rows])
    close(stored(tmp_path / "run", "stab_influence"), [by_gradients(model, drift, row) for row in rows])
    two = (stored(tmp_path / "run", f"{objective}_influence") for objective in ("adapt", "stab"))
    close(stored(tmp_path / "run", "value"), [a + 1.5 * s for a, s in zip(*two, strict=True)])
    mask(tmp_path / "run", published(keep=0.3, by="adapt_influence", stability_weight=0.0))
    assert not verify(tmp_path / "run")


@pytest.mark.one_in(2)
def test_upstream_is_stored_beside_the_paths_and_adds_up_to_influence(both: dict[str, str], tmp_path: Path) -> None:
    data, target = (write_jsonl(tmp_path / n, r) for n, r in (("d.jsonl", token_records(5)), ("t.jsonl", TARGET)))
    for estimator in ("influence", "exact", "exact+influence"):
        score(ScoreConfig(data=(data,), target=target, estimator=estimator, layers=2, **both), tmp_path / estimator)
    together = tmp_path / "exact+influence"
    for objective in ("adapt", "stab"):
        close(stored(together, f"{objective}_direct"), stored(tmp_path / "exact", f"{objective}_direct"))
        parts = zip(*(stored(together, f"{objective}_{path}") for path in ("direct", "upstream")), strict=True)
        close([a + b for a, b in parts], stored(tmp_path / "influence", f"{objective}_influence"))
    close(stored(together, "value"), stored(tmp_path / "exact", "value"))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("parameters", ["linear", "all"])
def test_in_memory_it_is_what_the_run_holds(both: dict[str, str], parameters: Any, tmp_path: Path) -> None:
    records = token_records(5)
    data, target = (write_jsonl(tmp_path / n, r) for n, r in (("d.jsonl", records), ("t.jsonl", TARGET)))
    settings: dict[str, Any] = {"estimator": "influence", "parameters": parameters, "layers": 2}
    score(ScoreConfig(data=(data,), target=target, **settings, **both), tmp_path / "run")
    with quiet():
        model, reference = (AutoModelForCausalLM.from_pretrained(both[n]).eval() for n in ("model", "reference"))
    found = score_tokens(model, records, target=TARGET, reference=reference, **settings)
    for name in ("adapt_influence", "stab_influence", "value"):
        mine = [torch.tensor([x for x in row if x is not None], dtype=torch.float64) for row in found[name].to_list()]
        close(mine, stored(tmp_path / "run", name))


@pytest.mark.one_in(2)
def test_pairs_count_with_the_sign_and_weight_of_their_branch(both: dict[str, str], tmp_path: Path) -> None:
    branches = token_records(4, seed=3), token_records(4, seed=4)
    pairs = [
        {f"{branch}_{key}": one[key] for branch, one in zip(("chosen", "rejected"), two, strict=True) for key in KEYS}
        for two in zip(*branches, strict=True)
    ]
    data, target = (write_jsonl(tmp_path / n, r) for n, r in (("d.jsonl", pairs), ("t.jsonl", TARGET)))
    score(ScoreConfig(data=(data,), target=target, estimator="influence", layers=2, **both), tmp_path / "run")
    model = load(both["model"])
    names, _ = scope(both["model"], "linear")
    direction = mean_gradient(model, names)
    omega = scan(tmp_path / "run").collect()["omega"].to_list()
    for branch, sign in (("chosen", 1), ("rejected", -1)):
        rows = rows_of([{key: pair[f"{branch}_{key}"] for key in KEYS} for pair in pairs])
        wanted = [sign * w * by_gradients(model, direction, row) for w, row in zip(omega, rows, strict=True)]
        close(stored(tmp_path / "run", f"{branch}_adapt_influence"), wanted)
