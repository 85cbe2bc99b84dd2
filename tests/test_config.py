from __future__ import annotations

import datetime
import math
import re
from dataclasses import FrozenInstanceError, fields
from typing import Any

import click
import pytest

from alphatoken_curate import MaskConfig, ScoreConfig, UsageError
from alphatoken_curate.cli import mask as mask_command
from alphatoken_curate.cli import score as score_command
from alphatoken_curate.config import checked, is_from_before, settings_of_mask

METHOD_FLAGS = {
    "model", "reference", "target", "target_rows", "estimator", "layers", "window", "stability_weight",
    "stability_scale", "fisher", "fisher_rows", "keep", "scope", "weights", "by", "max_length", "rows_per_shard",
    "batch_tokens", "dtype", "device", "seed", "turns", "allow_empty_rows", "trust_remote_code", "drift", "retention",
    "precondition", "beta", "generation", "aggregate", "parameters",
}  # fmt: skip

BAD: list[tuple[str, Any]] = [
    *(("keep", value) for value in (0, -0.1, 1.01, "half", "nan", "inf", True, None, [0.5])),
    *(("scope", value) for value in ("rows", "batch", "batch:", "batch:0", "batch:-1", "batch:x", 3, None)),
    *(
        ("weights", value)
        for value in ("soft", "", 1, None, "tilt", "tilt:", "tilt:x", "tilt:0", "tilt:-1", "tilt:nan")
    ),
    *(("weights", value) for value in ("tilt:inf", "tilt:100.01", "tilt:1:2", "Tilt:1", "tilt:\u0661", {"tilt": 1})),
    *(("by", value) for value in ("", 3, None)),
    *(("always_keep", value) for value in ("", True, None)),
    *(("stability_weight", value) for value in ("x", "nan", math.inf, True, None, {})),
    *(("stability_scale", value) for value in ("std", None)),
    *(("allow_empty_rows", value) for value in ("yes", 1, 0, None)),
    *(("seed", value) for value in (-1, 1.5, "x", True, None, 2**63, 10**30, "9" * 5000)),
    *(("model", value) for value in ("", 3, None)),
    *(("reference", value) for value in ("", 3)),
    *(("target", value) for value in ("", ["a"])),
    *(("target_rows", value) for value in (0, -1, "many", None)),
    *(("estimator", value) for value in ("influence+exact", "Exact")),
    *(("layers", value) for value in (0, -1, 1.5, "some", True)),
    *(("parameters", value) for value in ("every",)),
    *(("window", value) for value in (0, None)),
    *(("fisher", value) for value in ("", None)),
    *(("fisher_rows", value) for value in (0, None)),
    *(("fisher_new_tokens", value) for value in (0, None)),
    *(("fisher_prompts", value) for value in ("", 3)),
    *(("drift", value) for value in ("none", 3)),
    *(("lookahead_lr", value) for value in (0, -1, "inf", "fast")),
    *(("lookahead_rows", value) for value in (0, None)),
    *(("retention", value) for value in ("", ["a"])),
    *(("precondition", value) for value in ("shampoo", None)),
    *(("precondition_rows", value) for value in (0, None)),
    *(("precondition_eps", value) for value in (0, -1e-8, None)),
    *(("precondition_damping", value) for value in (0, "x", None)),
    *(("precondition_iterations", value) for value in (0, 1001, 1.5, None)),
    *(("precondition_stability", value) for value in ("yes", None)),
    *(("beta", value) for value in (0, -0.1, True, None)),
    *(("generation", value) for value in ("newest", "", "1,", "-1", "1;2", -1, True, None)),
    *(("aggregate", value) for value in ("sum", None)),
    *(("turns", value) for value in ("first", None)),
    *(("max_length", value) for value in (0, 10**30)),
    *(("rows_per_shard", value) for value in (0, "1e3")),
    *(("batch_tokens", value) for value in (0, "automatic")),
    *(("dtype", value) for value in ("int8", "torch.float32")),
    *(("device", value) for value in ("cuda,", "cuda,cuda:1", "cuda:0,xpu:1", "cuda:0, cuda:1", "cpu,cpu", "", None)),
    *(("trunk_device", value) for value in ("cuda", "meta", "", 1)),
    *(("bad_rows", value) for value in ("drop",)),
    *(("trust_remote_code", value) for value in ("true",)),
    *(("data", value) for value in ((), [], "", [""], [3], 3)),
    ("map", "prompt"),
    ("map", "=prompt"),
    ("map", "q="),
    ("map", "q=prompt,"),
    ("map", {"q,r": "prompt"}),
    ("map", {"q": 1}),
    ("map", 3),
    ("template_date", "2023-02-29"),
    ("template_date", "20240229"),
    ("template_date", "29.02.2024"),
    ("template_date", 20240229),
    ("template_date", datetime.datetime(2024, 2, 29)),
    ("subset", ""),
]


def score_config(**settings: Any) -> ScoreConfig:
    return ScoreConfig(**{"data": "rows.jsonl"} | settings)


def test_every_setting_says_what_it_is() -> None:
    for item in fields(ScoreConfig):
        text = item.metadata["help"]
        assert re.match(r"[A-Z`]", text) and re.search(r"\w.*\.$", text) and len(text) > 14, item.name
        assert item.metadata["kind"], item.name
        if item.metadata["choices"]:
            assert item.default in (None, *item.metadata["choices"]), item.name


def test_flags_yaml_keys_and_python_fields_are_the_same() -> None:
    for kind, command in ((ScoreConfig, score_command), (MaskConfig, mask_command)):
        names = {item.name for item in fields(kind)} - {"data"}
        options = {p.name: p for p in command.command.params if isinstance(p, click.Option)}
        assert set(options) - {"config", "output", "workers", "engine", "ray_address", "part"} == names
        for name in names:
            assert options[name].opts == ["--" + name.replace("_", "-")]
            metadata = next(item for item in fields(kind) if item.name == name).metadata
            assert options[name].help == metadata["help"]
    assert {item.name for item in fields(ScoreConfig)} >= METHOD_FLAGS


def test_the_defaults() -> None:
    made = score_config()
    assert (made.estimator, made.layers, made.window, made.stability_weight) == ("published", 3, 32, 1.5)
    assert made.parameters == "linear"
    assert (made.keep, made.scope, made.weights, made.by, made.stability_scale) == (
        1.0,
        "global",
        "binary",
        "value",
        "none",
    )
    assert (made.target_rows, made.fisher, made.fisher_rows, made.bad_rows) == (32, "sampled", 256, "refuse")
    assert made.trust_remote_code is False and made.allow_empty_rows is False
    assert score_config(**REHEARSAL).root == 1e-12
    assert score_config(**REHEARSAL, rehearse_lora=8).root == 1e-14
    assert score_config(**REHEARSAL, rehearse_lora=8, rehearse_root=0.0).root == 0
    assert MaskConfig() == MaskConfig(**{item.name: item.default for item in fields(MaskConfig)})


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda x: str(x)[:20])
def test_a_bad_value_is_refused_in_python_by_the_name_of_its_flag(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match="--" + name.replace("_", "-")) as caught:
        score_config(**{name: value})
    assert "it takes" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("keep", "0.25", 0.25),
        ("keep", 1, 1.0),
        ("keep", "positive", "positive"),
        ("scope", "batch:8", "batch:8"),
        ("weights", "tilt:.250", "tilt:0.25"),
        ("weights", "tilt:1.0", "tilt:1"),
        ("weights", "tilt:100", "tilt:100"),
        ("weights", "tilt:1e-7", "tilt:1e-07"),
        ("layers", "all", "all"),
        ("layers", "2", 2),
        ("batch_tokens", "auto", "auto"),
        ("batch_tokens", "512", 512),
        ("stability_weight", "0", 0.0),
        ("stability_weight", -1, -1.0),
        ("seed", "7", 7),
        ("seed", 2**63 - 1, 2**63 - 1),
        ("data", "a.jsonl", ("a.jsonl",)),
        ("data", ["a", "b"], ("a", "b")),
        ("reference", None, None),
        ("map", "q=prompt, a=completion", "a=completion,q=prompt"),
        ("map", {"q": "prompt", "a": "completion"}, "a=completion,q=prompt"),
        ("template_date", "2024-02-29", "2024-02-29"),
        ("template_date", datetime.date(2024, 2, 29), "2024-02-29"),
        ("split", "test", "test"),
    ],
)
def test_values_are_read_as_a_command_line_gives_them(name: str, value: Any, read: Any) -> None:
    found = getattr(score_config(**{name: value}), name)
    assert found == read and type(found) is type(read)


def test_weights_that_cannot_be_used_are_told_what_there_is() -> None:
    with pytest.raises(
        UsageError, match=r"it takes binary, rank, sigmoid, relu, or tilt:C with C above 0 and up to 100"
    ):
        MaskConfig(weights="tilt:200")


@pytest.mark.parametrize(("given", "meant"), [(50, "0.5"), ("50%", "0.5"), ("2.5", "0.025"), (100, "1")])
def test_a_share_in_percent_is_told_what_was_meant(given: Any, meant: str) -> None:
    with pytest.raises(UsageError, match=rf"a share above 0 and up to 1, or positive\. Did you mean {meant}\?"):
        MaskConfig(keep=given)
    for other in (101, "half", -1, None):
        with pytest.raises(UsageError) as caught:
            MaskConfig(keep=other)  # type: ignore[arg-type]
        assert "Did you mean" not in str(caught.value)


def test_masks_and_run_configs_from_before_always_keep_nothing() -> None:
    old = {item.name: getattr(MaskConfig(keep=0.4), item.name) for item in fields(MaskConfig)}
    del old["always_keep"]
    assert settings_of_mask(old) == MaskConfig(keep=0.4, always_keep="none")
    assert settings_of_mask({**old, "always_keep": "special"}).always_keep == "special"
    assert settings_of_mask({"keep": 0.2, "left": "over"}) == MaskConfig(keep=0.2, always_keep="none")
    whole = {item.name: item.default for item in fields(ScoreConfig)}
    assert not is_from_before(whole), "a run's own config of today names it"
    del whole["always_keep"]
    assert is_from_before(whole) and is_from_before(old)
    for name in old:
        assert not is_from_before({key: value for key, value in whole.items() if key != name}), "by hand"
    assert not is_from_before({}) and not is_from_before({"keep": 0.5, "by": "value"})


def test_configs_are_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        score_config().seed = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        MaskConfig(0.5)  # type: ignore[misc]
    with pytest.raises(UsageError, match="--data"):
        ScoreConfig()


@pytest.mark.parametrize(
    ("name", "hint"),
    [("layer", "Did you mean layers"), ("stability-weight", "Did you mean stability_weight"), ("qqq", "Known: keep")],
)
def test_an_unknown_setting_gets_a_suggestion(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=rf"here: no setting '{name}'\. {hint}"):
        checked(ScoreConfig, {name: 1}, "here")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"drift": "lookahead"}, "--lookahead-lr"),
        ({"lookahead_lr": 1e-4}, "--drift lookahead"),
        ({"fisher_prompts": "p.jsonl"}, "--fisher generate"),
        ({"precondition_stability": True}, "--precondition adam"),
        *(
            ({"parameters": "all", "estimator": name}, rf"--parameters all with --estimator {re.escape(name)}: ")
            for name in ("published", "exact", "exact+influence")
        ),
        ({"parameters": "all", "estimator": "influence", "precondition": "kfac"}, "--precondition kfac with --param"),
        (
            {"trunk_device": "cpu", "layers": "all"},
            "--trunk-device cpu with --layers all: no block is left",
        ),
        (
            {"trunk_device": "disk", "parameters": "all", "estimator": "influence"},
            "--trunk-device disk with --parameters all: gradients .* --parameters linear, or several cards",
        ),
        ({"trunk_device": "disk", "direction": "rehearsal", "rehearse_lr": 1e-4}, "disk with --layers all"),
        ({"device": "cuda:0,cuda:1", "direction": "rehearsal", "rehearse_lr": 1e-4}, "is rehearsed on one device"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        score_config(**settings)


def test_generations_are_numbers_in_order_each_once() -> None:
    assert MaskConfig(generation="3, 1,3").generation == "1,3"
    assert MaskConfig(generation=2).generation == "2"  # type: ignore[arg-type]


def test_all_parameters_are_for_influence() -> None:
    assert score_config(estimator="influence", parameters="all").parameters == "all"
    assert score_config(estimator="influence", precondition="ekfac").parameters == "linear"


REHEARSAL = {"direction": "rehearsal", "rehearse_lr": 1e-4}


def test_what_is_valued_and_trains_follows_from_the_direction() -> None:
    """What was given stands; paths are those of linear maps."""

    def made(**settings: Any) -> tuple[Any, ...]:
        found = score_config(**settings)
        return found.estimator, found.layers, found.parameters

    assert made() == ("published", 3, "linear")
    assert made(**REHEARSAL) == ("influence", "all", "all")
    assert made(**REHEARSAL, estimator="exact") == ("exact", "all", "linear")
    assert made(**REHEARSAL, rehearse_lora=8) == ("influence", "all", "linear")
    assert made(**REHEARSAL, layers=3, parameters="linear") == ("influence", 3, "linear")
    assert made(estimator="influence") == ("influence", 3, "linear")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"direction": "rehearsal"}, "--direction rehearsal and --rehearse-lr X go together"),
        ({"rehearse_lr": 0.1}, "--direction rehearsal and --rehearse-lr X go together"),
        ({"rehearse_lora": 4}, "--rehearse-lora goes with --direction rehearsal and --rehearse-lr X"),
        ({"rehearse_simpo": 0.0}, "--rehearse-simpo goes with --direction rehearsal and --rehearse-lr X"),
        ({**REHEARSAL, "rehearse_simpo": -0.1}, "it takes a number from 0 to 1000"),
        ({"rehearse_window": 4}, "--rehearse-window goes with --direction rehearsal and --rehearse-lr X"),
        ({**REHEARSAL, "estimator": "published"}, "--estimator published with --direction rehearsal: its gradient is"),
        ({**REHEARSAL, "estimator": "exact", "parameters": "all"}, "direct and causal paths are those of linear maps"),
        ({**REHEARSAL, "precondition": "ekfac", "parameters": "linear"}, "--precondition ekfac with --direction"),
        ({**REHEARSAL, "precondition": "adam"}, "--precondition adam with --parameters all"),
        ({**REHEARSAL, "drift": "lookahead", "lookahead_lr": 1}, "--drift lookahead with --direction rehearsal"),
        ({**REHEARSAL, "dtype": "float16"}, "--dtype float16 with --direction rehearsal"),
        ({**REHEARSAL, "rehearse_betas": "0.9"}, "it takes two numbers from 0 to below 1"),
        ({**REHEARSAL, "rehearse_betas": "0.9,1"}, "it takes two numbers from 0 to below 1"),
        ({**REHEARSAL, "rehearse_root": -1.0}, "it takes a number from 0 to 1000"),
        (
            {**REHEARSAL, "rehearse_lora": 4, "parameters": "all"},
            "--parameters all with --rehearse-lora 4: a LoRA stands",
        ),
        (
            {**REHEARSAL, "rehearse_lora": 4, "layers": 2, "trunk_device": "disk", "dtype": "bfloat16"},
            "Give --trunk-device cpu",
        ),
        ({**REHEARSAL, "rehearse_lora": 0}, "it takes a whole number from 1"),
        ({"target_groups": 0}, "it takes a whole number from 1"),
        ({"target_groups": 1000}, "it takes a number from 1 to 256"),
    ],
)
def test_what_does_not_go_with_a_rehearsal_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as refused:
        score_config(**settings)
    assert told in str(refused.value)


def test_betas_are_two_numbers_however_they_are_written() -> None:
    for given in ("0.9,0.99", " 0.9 , 0.99", [0.9, 0.99], (0.9, "0.99")):
        assert score_config(**REHEARSAL, rehearse_betas=given).rehearse_betas == "0.9,0.99"
