from __future__ import annotations

import inspect
import warnings
from dataclasses import fields
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from templates import family_tokenizer
from tiny import tiny_model
from tiny_files import perturbed, token_records

from alphatoken_curate import InputError, ModelError, ScoreConfig, UsageError, score_tokens
from alphatoken_curate.progress import Silent
from alphatoken_curate.runs.schema import COMPONENTS, PREFERENCE, SFT, SIGNALS, components

TARGET = token_records(3, seed=5)


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def tuned() -> Any:
    return perturbed(tiny_model("llama", dtype=torch.float32))


def flat(frame: pl.DataFrame, name: str) -> np.ndarray[Any, Any]:
    return np.concatenate([np.array(row, dtype=np.float64) for row in frame[name].to_list()])


class Heard(Silent):
    """Keeps what it is warned of."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


def test_a_row_per_row_with_the_columns_of_values(base: Any) -> None:
    records = token_records(6)
    found = score_tokens(base, records, target=TARGET)
    assert found.columns == SFT.values.names
    assert found["status"].to_list() == ["scored"] * 6 and found["row_id"].to_list() == list(range(6))
    assert found["input_ids"].to_list() == [record["input_ids"] for record in records]
    for name in SIGNALS:
        there = [[x is not None for x in row] for row in found[name].to_list()]
        assert there == (
            found["response"].to_list() if name in components("published").always else [[False] * len(r) for r in there]
        )


def test_losses_are_those_of_the_model(base: Any) -> None:
    records = token_records(6)
    found = score_tokens(base, records, target=TARGET)
    for record, nll, entropy in zip(records, found["nll"].to_list(), found["entropy"].to_list(), strict=True):
        ids = torch.tensor([record["input_ids"]])
        with torch.no_grad():
            log_p = base(input_ids=ids).logits[0].log_softmax(-1)
        for t, label in enumerate(record["labels"]):
            if label != -100:
                assert nll[t] == pytest.approx(-log_p[t - 1, label].item(), rel=1e-4)
                assert entropy[t] == pytest.approx(-(log_p[t - 1].exp() * log_p[t - 1]).sum().item(), rel=1e-4)


def test_without_a_reference_stability_is_zero(base: Any, tuned: Any) -> None:
    alone = score_tokens(base, token_records(4), target=TARGET)
    same = score_tokens(base, token_records(4), target=TARGET, reference=tiny_model("llama", dtype=torch.float32))
    other = score_tokens(tuned, token_records(4), target=TARGET, reference=base)
    for name in ("stab_direct", "stab_causal"):
        assert np.nanmax(np.abs(flat(alone, name))) == np.nanmax(np.abs(flat(same, name))) == 0
        assert np.nanmax(np.abs(flat(other, name))) > 0
    np.testing.assert_allclose(flat(same, "reference_nll"), flat(same, "nll"), rtol=1e-6)
    value = flat(other, "adapt_direct") + flat(other, "adapt_causal")
    value += 1.5 * (flat(other, "stab_direct") + flat(other, "stab_causal"))
    np.testing.assert_allclose(flat(other, "value"), value, rtol=1e-4, atol=1e-6 * np.nanmax(np.abs(value)))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("estimator", ["published", "exact"])
def test_batches_and_order_do_not_matter(estimator: Any, base: Any, tuned: Any) -> None:
    records = token_records(9)
    options = {"target": TARGET, "reference": base, "estimator": estimator, "layers": 2}
    whole = score_tokens(tuned, records, **options)
    single = score_tokens(tuned, records, batch_tokens=1, **options)
    turned = score_tokens(tuned, records[::-1], fisher="empirical", **options)
    straight = score_tokens(tuned, records, fisher="empirical", **options)
    for name in ("nll", *COMPONENTS, "value"):
        scale = np.nanmax(np.abs(flat(whole, name)))
        np.testing.assert_allclose(flat(single, name), flat(whole, name), atol=1e-5 * scale)
        backwards = turned.reverse()
        np.testing.assert_allclose(flat(backwards, name), flat(straight, name), atol=1e-5 * scale)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_in_training_is_scored_without_dropout_and_given_back(kind: str) -> None:
    changes = {} if kind == "llama" else {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    model = tiny_model(kind, dtype=torch.float32, **changes)
    quiet = score_tokens(model, token_records(3), target=TARGET)
    model.train()
    model.lm_head.requires_grad_(False)
    modes = {name: m.training for name, m in model.named_modules()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    found = score_tokens(model, token_records(3), target=TARGET)
    assert found.equals(quiet)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_rows_that_are_not_finite_fail(base: Any) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[47] = torch.nan
    records = token_records(4)
    records[2]["input_ids"][0] = 47
    found = score_tokens(model, records, target=TARGET)
    whole = score_tokens(base, records, target=TARGET)
    assert found["status"].to_list() == ["scored", "scored", "failed", "scored"]
    assert found["value"].list.len()[2] == 0
    assert [found["value"][i].to_list() for i in (0, 1, 3)] == [whole["value"][i].to_list() for i in (0, 1, 3)]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("parameters", ["linear", "all"])
@pytest.mark.parametrize("layers", [2, "all"])
def test_a_model_whose_training_asked_embeddings_for_a_gradient(layers: Any, parameters: Any) -> None:
    """By a hook, as TRL leaves it on each that it has trained with checkpoints of gradients, its default."""
    settings = {"target": TARGET, "layers": layers, "parameters": parameters}
    model = tiny_model("llama", dtype=torch.float32)
    for estimator in ("influence",) if parameters == "all" else ("published", "exact+influence"):
        wanted = score_tokens(model, token_records(3), estimator=estimator, **settings)
        model.enable_input_require_grads()
        assert score_tokens(model, token_records(3), estimator=estimator, **settings).equals(wanted)
        assert model.get_input_embeddings()(torch.tensor([1])).requires_grad
        model.disable_input_require_grads()


def test_an_adapter_has_to_be_merged(base: Any) -> None:
    """Its matrices would be linear maps of their own, and values others than those that `score` gives its folder."""
    peft = pytest.importorskip("peft")
    model = tiny_model("llama", dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        adapted = peft.get_peft_model(model, config)
    for given in ({"model": adapted}, {"model": adapted.get_base_model()}, {"model": base, "reference": adapted}):
        with pytest.raises(ModelError, match=r"q_proj is of peft.* copy\.deepcopy\(model\)\.merge_and_unload\(\)"):
            score_tokens(rows=token_records(2), target=TARGET, **given)
    score_tokens(adapted.merge_and_unload(), token_records(2), target=TARGET)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"fisher": "Sampled"}, "fisher: found 'Sampled'; score_tokens takes sampled or empirical"),
        ({"fisher": "generate"}, "fisher: found 'generate'"),
        ({"stability_weight": float("nan")}, "stability.weight"),
        ({"seed": -1}, "seed"),
        ({"batch_tokens": 0}, "batch.tokens"),
        ({"max_length": 0}, "max.length"),
        ({"window": 0}, "window"),
    ],
)
def test_settings_are_refused_as_by_score(setting: Any, says: str, base: Any) -> None:
    with pytest.raises(UsageError, match=says):
        score_tokens(base, token_records(2), target=TARGET, **setting)


def test_rows_that_are_cut_are_told(base: Any) -> None:
    heard, records = Heard(), token_records(2)
    lengths = [len(record["input_ids"]) for record in records]
    found = score_tokens(base, records, target=TARGET, max_length=max(lengths) - 1, progress=heard)
    assert found["input_ids"].list.len().to_list() == [min(n, max(lengths) - 1) for n in lengths]
    cut = [n for n in lengths if n == max(lengths)]
    assert heard.said[0].startswith(f"rows: {len(cut)} row") and f"{len(cut)} tokens in all" in heard.said[0]


def test_bad_rows_are_all_named(base: Any) -> None:
    records: list[Any] = token_records(4)
    records[1] = {"text": "words"}
    records[3] = {"input_ids": [1, 61], "labels": [-100, 61]}
    with pytest.raises(
        InputError,
        match=r"2 rows(.|\n)*rows:2: unknown_shape(.|\n)*rows:4: token_out_of_vocabulary(.|\n)*, or leave them out",
    ):
        score_tokens(base, records, target=TARGET)
    with pytest.raises(InputError, match="target: no rows"):
        score_tokens(base, token_records(2), target=[])
    with pytest.raises(InputError, match="rows:1: no_tokenizer"):
        score_tokens(base, [{"prompt": "a", "completion": "b"}], target=TARGET)


def test_a_reference_of_another_shape_is_refused(base: Any) -> None:
    with pytest.raises(ModelError, match="--reference"):
        small = tiny_model("llama", dtype=torch.float32, intermediate_size=20)
        score_tokens(base, token_records(2), target=TARGET, reference=small)


def test_its_settings_are_named_as_those_of_score() -> None:
    own = {"model", "rows", "target", "tokenizer", "reference", "progress"}
    config = {item.name: getattr(ScoreConfig(data=("rows",)), item.name) for item in fields(ScoreConfig)}
    for name, parameter in inspect.signature(score_tokens).parameters.items():
        if name not in own:
            assert name in config
            if name != "batch_tokens":
                assert parameter.default == config[name], name


def test_preference_rows_have_both_branches(base: Any, tuned: Any) -> None:
    draw = np.random.default_rng(5)
    prompt, answers = draw.integers(3, 40, 9).tolist(), draw.integers(3, 40, (2, 4)).tolist()
    record = {}
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        record |= {f"{name}_input_ids": prompt + answer, f"{name}_labels": [-100] * 9 + answer}
    found = score_tokens(tuned, [record], target=[record], reference=base, beta=0.5)
    assert found.columns == PREFERENCE.values.names
    alone = score_tokens(
        tuned, [{"input_ids": prompt + a, "labels": [-100] * 9 + a} for a in answers], target=TARGET, reference=base
    )
    gain = [sum(flat(alone[i : i + 1], "reference_nll")[9:] - flat(alone[i : i + 1], "nll")[9:]) for i in (0, 1)]
    assert found["margin"].item() == pytest.approx(0.5 * (gain[0] - gain[1]), rel=1e-4)
    assert found["omega"].item() == pytest.approx(0.5 / (1 + np.exp(found["margin"].item())), rel=1e-6)
    np.testing.assert_allclose(flat(found, "rejected_nll"), flat(alone[1:], "nll"), rtol=1e-5)


def test_chats_are_read_as_by_score() -> None:
    """Answers end with the stops of the model's generation config, and what is not as given is told."""
    tokenizer = family_tokenizer("glm4moe")
    tokenizer.eos_token = "</s>"
    model = tiny_model("llama", dtype=torch.float32, vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")]
    turns = [("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    heard = Heard()
    found = score_tokens(model, rows, target=rows, tokenizer=tokenizer, progress=heard)
    ids, ends = (np.array(found[name][0].to_list()) for name in ("input_ids", "end_of_turn"))
    assert tokenizer.convert_ids_to_tokens(ids[ends]) == ["<|user|>"]
    assert {line.partition(":")[0] for line in heard.said} == {"rows", "target"}

    closed = [{"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]}]
    model.generation_config.eos_token_id = 4
    assert score_tokens(model, closed, target=closed)["end_of_turn"][0].to_list() == [False, False, False, True]
