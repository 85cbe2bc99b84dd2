"""What is not there is told before anything heavy is imported, and before a row is read."""

from __future__ import annotations

from typing import Any

import pytest
from loaded import HEAVY, loaded_by
from tiny_files import token_records, write_jsonl

from alphatoken_curate import CurateError, ScoreConfig, UsageError
from alphatoken_curate.scoring.named import check_named, check_shared

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"data": "absent.jsonl"}, "absent.jsonl: no such file"),
    ({"target": "absent.jsonl"}, "absent.jsonl: no such file"),
    ({"retention": "absent.jsonl"}, "absent.jsonl: no such file"),
    ({"fisher": "generate", "fisher_prompts": "absent.jsonl"}, "absent.jsonl: no such file"),
    ({"model": "./absent"}, "./absent: no model here"),
    ({"reference": "/absent/model"}, "/absent/model: no model here"),
    ({"fisher": "absent.safetensors"}, "--fisher absent.safetensors: none of sampled"),
    ({"reuse": "absent"}, "--reuse absent: no run folder"),
    ({"by": "nul"}, "nul"),
    ({"by": "nll +"}, "nll +"),
    ({"by": "reference_ratio"}, "by: reference_nll will not be computed: model and reference are the same"),
    ({"by": "0.5 + nll - reference_nll"}, "by: reference_nll will not be computed"),
    ({"by": "drift_causal"}, "by: drift_causal will not be computed"),
    ({"always_keep": "reference_nll < 1"}, "always_keep: reference_nll will not be computed"),
    ({"by": "-value_error"}, "by: value_error will not be computed"),
    ({"by": "adapt_error", "target_groups": 1}, "by: adapt_error will not be computed"),
    ({"by": "stab_error", "target_groups": 4}, "by: stab_error will not be computed"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", token_records(5))


@pytest.mark.parametrize(("setting", "told"), WRONG, ids=lambda x: str(x)[:40])
def test_what_is_not_there_is_named(data: str, models: dict[str, str], setting: dict[str, Any], told: str) -> None:
    with pytest.raises(CurateError) as caught:
        check_named(ScoreConfig(**{"data": data, "model": models["base"]} | setting))
    assert told in str(caught.value)


def test_what_is_there_passes(data: str, models: dict[str, str]) -> None:
    check_named(ScoreConfig(data=data, model=models["base"], reference=models["tuned"], target=data))
    # A number of pairs is right for pairs, and which rows these are is not known yet; what the Hub has is not asked.
    check_named(ScoreConfig(data=data, model="owner/name", by="margin"))
    check_named(ScoreConfig(data=data, model=models["base"], reference=models["tuned"], by="reference_ratio"))
    check_named(ScoreConfig(data=data, model=models["base"], target_groups=4, by="-value_error"))
    check_named(ScoreConfig(data=data, model=models["base"], target_groups=4, retention=data, by="stab_error"))
    check_named(
        ScoreConfig(data=data, model=models["base"], by="-adapt_error", direction="rehearsal", rehearse_lr=1e-4)
    )


@pytest.mark.one_in(9)
@pytest.mark.parametrize("command", ["check", "score"])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("absent.jsonl",), "absent.jsonl"),
        (("rows.jsonl", "--model", "./absent"), "./absent"),
        (("rows.jsonl", "--target", "absent.jsonl"), "absent.jsonl"),
        (("rows.jsonl", "--device", "potato"), "potato"),
        (("rows.jsonl", "--layers", "none"), "--layers"),
        (("rows.jsonl", "--by", "nul"), "nul"),
    ],
)
def test_the_command_tells_it_before_anything_heavy_is_imported(
    data: str, command: str, arguments: tuple[str, ...], told: str
) -> None:
    named = [data if word == "rows.jsonl" else word for word in arguments]
    ended = loaded_by(command, *named)
    assert ended.code in (2, 3) and told in ended.err
    assert not ended.modules & HEAVY


def test_a_card_that_workers_cannot_share_is_told_before_anything_heavy_is_imported(data: str) -> None:
    ended = loaded_by("score", data, "--workers", "2", "--device", "cuda:1")
    assert ended.code == 2 and "--device cuda:1: workers take cards by themselves" in ended.err
    assert not ended.modules & HEAVY
    for device in ("auto", "cpu", "cuda"):
        check_shared(device)
    with pytest.raises(UsageError, match="--device mps: workers take cards by themselves"):
        check_shared("mps")
