from __future__ import annotations

from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model, tiny_rows

from alphatoken_curate.directions.drift import checked_weights, drift_direction, read_direction, read_weights
from alphatoken_curate.directions.target import target_gradient
from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.errors import ModelError, UsageError
from alphatoken_curate.signals.paths import PathScorer
from alphatoken_curate.tokens.plan import collate


def ones(scoring: ScoringModel) -> list[torch.Tensor]:
    return [torch.ones_like(m.weight) for m in scoring.maps]


def test_the_direction_is_fisher_times_drift() -> None:
    scoring, reference = ScoringModel(tiny_model("llama"), 2), ScoringModel(tiny_model("llama", seed=9), 2)
    fisher = [torch.rand_like(m.weight) for m in scoring.maps]
    found = drift_direction(scoring, fisher, [m.weight for m in reference.maps])
    for v, f, m, r in zip(found, fisher, scoring.maps, reference.maps, strict=True):
        assert torch.equal(v, f * (m.bare - r.bare))


def test_an_unmoved_model_has_stability_exactly_zero() -> None:
    scoring = ScoringModel(tiny_model("llama"), 2)
    direction = drift_direction(scoring, ones(scoring), [m.weight.clone() for m in scoring.maps])
    for estimator in ("published", "exact"):
        found = PathScorer(scoring, [direction], estimator, 4).score(collate(tiny_rows(), range(6)))  # type: ignore[arg-type]
        assert not found.direct.any()
        assert not found.causal.any()


@pytest.mark.one_in(4)
@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("moved", [False, True])
def test_lookahead_is_the_drift_after_a_step_of_gradient_descent(family: str, moved: bool) -> None:
    """The step is really taken, on a copy, by autograd and an optimizer."""
    lr, layers, rows = 0.05, 3, tiny_rows()
    scoring = ScoringModel(tiny_model(family), layers)
    reference = [m.weight.clone() for m in ScoringModel(tiny_model(family, seed=9 if moved else 0), layers).maps]
    fisher = [torch.rand_like(m.weight) for m in scoring.maps]
    gradient = target_gradient(scoring, [collate(rows, [0, 1, 2]), collate(rows, [3, 4, 5])], all_positions=True)
    found = drift_direction(scoring, fisher, reference, [lr * g for g in gradient])

    stepped = oracles.eager(tiny_model(family))
    maps = oracles.linear_maps(stepped, layers)
    per_row = [
        oracles.losses(stepped, torch.from_numpy(row.input_ids.astype(np.int64)), np.flatnonzero(row.response).tolist())
        for row in rows
    ]
    torch.cat(per_row).mean().backward()
    torch.optim.SGD([module.weight for module in maps.values()], lr=lr).step()
    for v, f, m, w in zip(found, fisher, scoring.maps, reference, strict=True):
        wanted = f * (oracles.weight_of(maps[m.name]).detach() - w)
        assert ((v - wanted).abs().max() / wanted.abs().max()).item() < 1e-10


def test_a_small_step_from_the_reference_is_not_lost_to_rounding() -> None:
    scoring = ScoringModel(tiny_model("llama", dtype=torch.float32), 1)
    step = [torch.full_like(m.weight, 1e-12) for m in scoring.maps]
    for v in drift_direction(scoring, ones(scoring), [m.weight.clone() for m in scoring.maps], step):
        assert torch.equal(v, torch.full_like(v, -1e-12))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gpt_oss"])
def test_weights_are_read_from_safetensors_in_one_or_many_files(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    for folder, size in (("one", "1GB"), ("many", "10KB")):
        model.save_pretrained(tmp_path / folder, max_shard_size=size)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    scoring = ScoringModel(model, 3)
    for folder in ("one", "many"):
        found = read_weights(sorted((tmp_path / folder).glob("*.safetensors")), scoring)
        assert found is not None
        for tensor, m in zip(found, scoring.maps, strict=True):
            assert torch.equal(tensor, m.weight)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_are_merged_on_loading_are_not_read_from_files(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    assert read_weights(sorted(tmp_path.glob("*.safetensors")), ScoringModel(model, 1)) is None


def test_experts_kept_the_other_way_round_are_not_read_from_files(tmp_path: Path) -> None:
    model = tiny_model("gpt_oss")
    kept = {n: p.transpose(1, 2).contiguous() if p.ndim == 3 else p.detach() for n, p in model.named_parameters()}
    save_file(kept, tmp_path / "model.safetensors")
    assert read_weights([tmp_path / "model.safetensors"], ScoringModel(model, 1)) is None


def test_numbers_that_need_a_scale_are_not_read_from_files(tmp_path: Path) -> None:
    model = tiny_model("llama")
    scoring = ScoringModel(model, 2)
    own = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for kind in (torch.float16, torch.float8_e4m3fn):
        save_file(own | {m.stored: m.bare.detach().to(kind) for m in scoring.maps[:1]}, tmp_path / "model.safetensors")
        found = read_weights([tmp_path / "model.safetensors"], scoring)
        assert (found is None) == (kind == torch.float8_e4m3fn)


def test_a_reference_of_another_shape_is_refused(tmp_path: Path) -> None:
    tiny_model("llama", intermediate_size=20).save_pretrained(tmp_path)
    scoring = ScoringModel(tiny_model("llama"), 2)
    with pytest.raises(ModelError, match=r"--reference: model\.layers\.2\.mlp\.\w+\.weight is \d+x\d+, the model's is"):
        read_weights(sorted(tmp_path.glob("*.safetensors")), scoring)
    with pytest.raises(ModelError, match="pre-trained model"):
        checked_weights(scoring, [torch.ones(1, 1) for _ in scoring.maps])


def test_a_file_of_another_model_gives_nothing(tmp_path: Path) -> None:
    save_file({"other.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert read_weights([tmp_path / "model.safetensors"], ScoringModel(tiny_model("llama"), 2)) is None
    assert read_weights([tmp_path / "model.gguf"], ScoringModel(tiny_model("llama"), 2)) is None


def test_a_fisher_file_is_read_whole_or_refused(tmp_path: Path) -> None:
    scoring = ScoringModel(tiny_model("llama"), 1)
    path = tmp_path / "fisher.safetensors"
    tensors = {m.parameter: torch.rand(m.weight.shape) for m in scoring.maps}
    save_file(tensors, path)
    found = read_direction(path, scoring, flag="--fisher")
    assert all(torch.equal(t, tensors[m.parameter]) for t, m in zip(found, scoring.maps, strict=True))

    first, *others = tensors
    for broken, message in (
        ({name: tensors[name] for name in others}, f"no tensor {first} .1 of 7 are missing"),
        (tensors | {first: torch.ones(2, 3)}, f"{first} is 2x3, the model's is 16x16"),
        (tensors | {first: tensors[first] * torch.nan}, "NaN or infinity"),
    ):
        save_file(broken, path)
        with pytest.raises(UsageError, match=message):
            read_direction(path, scoring, flag="--fisher")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UsageError, match="not a readable safetensors file"):
        read_direction(path, scoring, flag="--fisher")
    with pytest.raises(UsageError, match="not a readable safetensors file"):
        read_direction(tmp_path / "missing", scoring, flag="--fisher")


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_small_drift_is_not_rounded_to_the_kind_of_a_fisher_file(kind: torch.dtype, tmp_path: Path) -> None:
    scoring = ScoringModel(tiny_model("llama", dtype=torch.float32), 1)
    fisher = {m.parameter: torch.full(m.weight.shape, 0.5, dtype=kind) for m in scoring.maps}
    save_file(fisher, tmp_path / "fisher.safetensors")
    found = read_direction(tmp_path / "fisher.safetensors", scoring, flag="--fisher")
    reference = [m.weight - 2**-20 for m in scoring.maps]
    for v, m, r in zip(drift_direction(scoring, found, reference), scoring.maps, reference, strict=True):
        assert torch.equal(v, (m.weight - r) / 2)
