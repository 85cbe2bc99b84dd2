from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from chats import answer, responses, user
from kinds import thinking
from templates import tokenizer_of
from tiny import VOCABULARY, make_row, tiny_model
from tiny_files import command, contents, token_records, write_jsonl
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from alphatoken_curate import InputError, ScoreConfig, UsageError
from alphatoken_curate.models.load import find_model, load_tokenizer
from alphatoken_curate.scoring.prepare import FISHER_DRAW, drawn, fingerprint_fields, hold_out, prepare
from alphatoken_curate.tokens.plan import sequences

ROWS = [make_row(i, [5, 6, 7], [(1, 3)]) for i in range(200)]


@pytest.fixture
def settings(models: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    return {"data": write_jsonl(tmp_path / "rows.jsonl", token_records(30)), "model": models["base"]}


def ids(rows: Any) -> list[int]:
    return [row.row_id for row in rows]


@pytest.mark.parametrize(
    ("rows", "most", "held"),
    [(2, 32, 1), (9, 32, 1), (19, 32, 1), (20, 32, 2), (200, 32, 20), (200, 7, 7), (200, 1, 1)],
)
def test_the_number_of_rows_held_out(rows: int, most: int, held: int) -> None:
    assert len(hold_out(ROWS[:rows], most, 0)) == held


def test_held_out_rows_are_drawn_by_the_seed_and_kept_in_order() -> None:
    first, second = ids(hold_out(ROWS, 20, 0)), ids(hold_out(ROWS, 20, 1))
    assert first == sorted(first) and first != second
    assert ids(hold_out(ROWS[::-1], 20, 0))[::-1] == first  # by row_id, whatever the order
    assert np.mean([np.mean(ids(hold_out(ROWS, 20, seed))) for seed in range(60)]) == pytest.approx(99.5, abs=6)
    assert set(ids(hold_out(ROWS, 7, 0))) <= set(first)


def test_fisher_rows_are_other_draws_than_the_target() -> None:
    chosen = ids(drawn(ROWS, 20, 0, FISHER_DRAW))
    assert len(chosen) == 20 and chosen == sorted(chosen) and chosen != ids(hold_out(ROWS, 20, 0))
    assert ids(drawn(ROWS, 999, 0, FISHER_DRAW)) == list(range(200))


def test_one_row_cannot_be_both() -> None:
    with pytest.raises(InputError, match="--target"):
        hold_out(ROWS[:1], 32, 0)


def test_rows_and_target_are_apart(settings: dict[str, Any]) -> None:
    prepared = prepare(ScoreConfig(**settings))
    assert prepared.rows_read == 30 and len(prepared.held_out) == 3 and prepared.target_rows == prepared.held_out
    assert sorted(ids(prepared.rows) + ids(prepared.held_out)) == list(range(30))
    assert ids(prepared.rows) == sorted(ids(prepared.rows))
    assert prepared.tokenizer is None and prepared.target.files == []


def test_a_given_target_leaves_all_rows_to_be_scored(settings: dict[str, Any], tmp_path: Path) -> None:
    target = write_jsonl(tmp_path / "task.jsonl", token_records(5, seed=1))
    prepared = prepare(ScoreConfig(**settings | {"target": target}))
    assert len(prepared.rows) == 30 and prepared.held_out == [] and len(prepared.target_rows) == 5
    assert [file.source for file in prepared.target.files] == ["task.jsonl"]


def test_quarantine_sets_bad_rows_aside_but_never_target_rows(settings: dict[str, Any], tmp_path: Path) -> None:
    records: list[Any] = token_records(30)
    records[4], records[9] = "{", {"input_ids": [1, 61], "labels": [-100, 61]}
    changes = {"data": write_jsonl(tmp_path / "odd.jsonl", records), "bad_rows": "quarantine"}
    prepared = prepare(ScoreConfig(**settings | changes))
    assert [(bad.row_id, bad.reason) for bad in prepared.bad] == [(4, "invalid_json"), (9, "token_out_of_vocabulary")]
    assert prepared.rows_read == 30 and len(prepared.held_out) == 2
    assert not {4, 9} & {*ids(prepared.rows), *ids(prepared.held_out)}
    with pytest.raises(InputError, match=r"2 rows(.|\n)*odd\.jsonl:5(.|\n)*odd\.jsonl:10"):
        prepare(ScoreConfig(**settings | changes | {"bad_rows": "refuse"}))
    target = write_jsonl(tmp_path / "task.jsonl", ["{", *token_records(2)])
    with pytest.raises(InputError, match=r"1 row(.|\n)*task\.jsonl:1"):
        prepare(ScoreConfig(**settings | changes | {"target": target}))


def test_a_fisher_that_is_neither_mode_nor_file(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--fisher generated: none of sampled, generate, empirical nor a file"):
        prepare(ScoreConfig(**settings | {"fisher": "generated"}))


def fields_of(settings: dict[str, Any], reference: str | None = None, dtype: str = "float32") -> dict[str, Any]:
    prepared = prepare(ScoreConfig(**settings))
    return fingerprint_fields(prepared, find_model(reference) if reference else prepared.source, dtype)


def test_the_fingerprint_holds_what_changes_results_and_nothing_else(
    settings: dict[str, Any], models: dict[str, str], tmp_path: Path
) -> None:
    plain = fields_of(settings)
    (tmp_path / "other" / "artifacts").mkdir(parents=True)
    assert set(plain) == {
        *("schema_version", "data", "model", "reference", "tokenizer", "template", "tokens", "target", "target_rows"),
        *(
            "estimator",
            "layers",
            "parameters",
            "window",
            "stability_weight",
            "fisher",
            "fisher_rows",
            "fisher_stops",
            "turns",
            "max_length",
        ),
        *("rows_per_shard", "dtype", "seed", "kind", "beta", "target_tokens", "fisher_prompts", "fisher_new_tokens"),
        *("prompt_tokens", "drift", "lookahead_lr", "lookahead_rows", "retention", "retention_tokens", "precondition"),
        *("precondition_rows", "precondition_eps", "precondition_damping", "precondition_stability"),
    }
    json.dumps(plain)
    for changes in (
        *({"batch_tokens": 7}, {"device": "cpu"}, {"keep": 0.1}, {"scope": "row"}, {"weights": "rank"}, {"by": "nll"}),
        *(
            {"stability_scale": "rms"},
            {"allow_empty_rows": True},
            {"bad_rows": "quarantine"},
            {"reuse": str(tmp_path / "other")},
        ),
        *({"generation": "all"}, {"aggregate": "last"}, {"beta": 0.3}, {"fisher_new_tokens": 3}),
        *({"lookahead_rows": 3}, {"precondition_rows": 3}, {"precondition_eps": 0.1}, {"precondition_damping": 0.2}),
        *({"trust_remote_code": True}, {"dtype": "float64"}),  # the dtype that was resolved is what counts
    ):
        assert fields_of(settings | changes) == plain, changes
    (tmp_path / "moved").mkdir()
    moved = shutil.copy(settings["data"], tmp_path / "moved" / "rows.jsonl")
    model = shutil.copytree(models["base"], tmp_path / "copy")
    assert fields_of({"data": str(moved), "model": str(model)}) == plain
    assert fields_of(settings, models["tuned"]) == plain | {
        "reference": fields_of(settings, models["tuned"])["reference"]
    }
    assert fields_of(settings, dtype="bfloat16") == plain | {"dtype": "bfloat16"}
    # A setting that came later is not there at its default, so that runs of before stay finished.
    assert fields_of(settings | {"limit": 100})["limit"] == 100 and "limit" not in plain


def test_settings_that_do_not_matter_are_no_part_of_it(settings: dict[str, Any], tmp_path: Path) -> None:
    for name in ("exact", "influence", "exact+influence"):
        other = settings | {"estimator": name}
        assert fields_of(other | {"window": 3}) == fields_of(other)
        assert fields_of(other)["window"] is None
    target = write_jsonl(tmp_path / "task.jsonl", token_records(2))
    assert fields_of(settings | {"target": target, "target_rows": 3}) == fields_of(settings | {"target": target})
    fisher = write_jsonl(tmp_path / "fisher", ["x"])
    assert fields_of(settings | {"fisher": fisher, "fisher_rows": 3}) == fields_of(settings | {"fisher": fisher})
    before = fields_of(settings | {"fisher": fisher})
    Path(fisher).write_text("y")
    after = fields_of(settings | {"fisher": fisher})
    assert {name for name in before if before[name] != after[name]} == {"fisher"}


@pytest.mark.parametrize("config", [{"vocab_size": 61}, {"text_config": {"vocab_size": 61}}, {"text_config": None}])
def test_the_vocabulary_bounds_tokens_where_the_config_names_it(
    config: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(settings["model"], tmp_path / "model"))
    (model / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    records = [*token_records(3), {"input_ids": [1, 61], "labels": [-100, 61]}]
    data = write_jsonl(tmp_path / "d.jsonl", records)
    found = prepare(ScoreConfig(data=data, model=str(model), bad_rows="quarantine")).bad
    assert [bad.row_id for bad in found] == ([] if config == {"text_config": None} else [3])


def test_which_parameters_score_is_part_of_the_fingerprint(settings: dict[str, Any]) -> None:
    plain, every = (fields_of(settings | {"estimator": "influence", "parameters": x}) for x in ("linear", "all"))
    assert {name for name in plain if plain[name] != every[name]} == {"parameters"}


def test_rows_of_tokens_end_where_the_model_stops(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    model.generation_config.eos_token_id = [7, 9]
    model.save_pretrained(tmp_path / "model")
    rows = [{"input_ids": [3, 4, last], "labels": [-100, 4, last]} for last in (7, 9, 5, 2)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = ScoreConfig(data=(data,), model=str(tmp_path / "model"), target=data)

    def ends() -> list[bool]:
        return [bool(row.end_of_turn[2]) for row in sequences(prepare(config).rows)]

    before = fingerprint_fields(prepare(config), find_model(config.model), "float32")
    assert ends() == [True, True, False, False]
    place = tmp_path / "model" / "generation_config.json"
    told = json.loads(place.read_text())
    place.write_text(json.dumps(told | {"eos_token_id": 5}))
    assert ends() == [False, False, True, False]
    after = fingerprint_fields(prepare(config), find_model(config.model), "float32")
    assert {name for name in before if before[name] != after[name]} == {"tokens"}, "not those of the target"
    place.unlink()
    settings = tmp_path / "model" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": 2}))
    assert ends() == [False, False, False, True]


ROLES = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""No turn is closed."""


def test_a_token_that_opens_the_next_turn_ends_an_answer_where_the_model_stops_at_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("<|user|><|assistant|>")
    tokenizer.chat_template = ROLES
    model = tiny_model("llama", dtype=torch.float32, vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"messages": [user("a"), thinking("b", "hm"), user("c"), answer("d")]},
        {"messages": [user("e"), answer("f")]},
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = ScoreConfig(data=(data,), model=str(tmp_path / "model"), target=data)
    prepared = prepare(config)
    assert [responses(tokenizer, row) for row in prepared.rows] == [["b<|user|>", "d"], ["f"]]
    ends = [row.input_ids[row.end_of_turn] for row in sequences(prepared.rows)]
    assert [tokenizer.decode(one) for one in ends] == ["<|user|>", ""]
    # DATA and --target are the same rows.
    wanted = {
        "the chat template leaves out of answers reasoning_content": 2,
        "the chat template leaves out of answers thinking": 2,
    }
    wanted |= {"the chat template writes no token to stop at behind an answer": 4}
    assert prepared.told == wanted
    said = command("score", data, "--target", data, "--model", tmp_path / "model", "-o", tmp_path / "run")
    assert "! 2 rows: the chat template leaves out of answers reasoning_content." in said.err
    assert (
        "not as given                4   rows: the chat template writes no token to stop"
        in command("check", data, "--target", data, "--model", tmp_path / "model").out
    )


SWITCHED = ROLES.replace("m.content }}", "m.content + ('!' if loud else '') + '<|end|>' }}")


@pytest.fixture
def chatty(tmp_path: Path) -> dict[str, Any]:
    """A model with a chat template, a file with another, and rows of which the second has settings of its own."""
    tokenizer = tokenizer_of("<|user|><|assistant|><|end|>")
    tokenizer.chat_template = ROLES
    tiny_model("llama", dtype=torch.float32, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "loud.jinja").write_text(SWITCHED)
    rows = [{"messages": [user(one), answer("yes")]} for one in "abc"]
    rows[1]["chat_template_kwargs"] = {"loud": False}
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    return {"data": data, "target": data, "model": str(tmp_path / "model")}


def test_a_chat_template_and_what_it_is_told_are_settings(chatty: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(find_model(chatty["model"]))
    loud = {"chat_template": str(tmp_path / "loud.jinja"), "chat_template_kwargs": '{"loud": true}'}
    for more, wanted in (
        ({}, ["yes", "yes", "yes"]),
        (loud, ["yes!<|end|>", "yes<|end|>", "yes!<|end|>"]),
        ({"chat_template": loud["chat_template"]}, ["yes<|end|>"] * 3),
    ):
        prepared = prepare(ScoreConfig(**chatty, **more))
        assert [responses(tokenizer, row) for row in prepared.rows] == [[one] for one in wanted]
    with pytest.raises(UsageError, match="names tokenize"):
        prepare(ScoreConfig(**chatty, chat_template_kwargs='{"tokenize": true}'))
    with pytest.raises(UsageError, match="takes a JSON object"):
        ScoreConfig(**chatty, chat_template_kwargs="loud")
    with pytest.raises(UsageError, match="no such file"):
        prepare(ScoreConfig(**chatty, chat_template=str(tmp_path / "none.jinja")))
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"messages": [user("a"), answer("b")], "chat_template_kwargs": 3}])
    with pytest.raises(InputError, match="chat_template_kwargs is an integer; it must be an object"):
        prepare(ScoreConfig(**(chatty | {"data": bad})))


def test_a_run_is_known_by_its_chat_template(chatty: dict[str, Any], tmp_path: Path) -> None:
    asked = ["--model", chatty["model"], "--target", chatty["target"], "-o", tmp_path / "run"]
    told = ["--chat-template", tmp_path / "loud.jinja", "--chat-template-kwargs", '{"loud": true}']
    assert command("score", chatty["data"], *asked, *told).code == 0
    assert "is finished" in command("score", chatty["data"], *asked, *told).out
    for other, named in ((told[:2], "chat_template_kwargs"), (told[2:], "chat_template"), ([], "chat_template")):
        ended = command("score", chatty["data"], *asked, *other)
        assert ended.code == 4 and named in ended.err, ended.err
    again = command("score", "--config", tmp_path / "run" / "config.yaml", "-o", tmp_path / "again")
    assert again.code == 0
    assert contents(tmp_path / "run" / "values") == contents(tmp_path / "again" / "values")
    (tmp_path / "loud.jinja").write_text(SWITCHED + "{# other #}")
    assert command("score", chatty["data"], *asked, *told).code == 4


def test_a_tokenizer_with_tokens_that_the_model_does_not_know_is_told_in_one_line(
    models: dict[str, str], tmp_path: Path
) -> None:
    """Special tokens were added and the embeddings not resized, or the model that was resized lies elsewhere."""
    model = Path(shutil.copytree(models["base"], tmp_path / "model"))
    words = {f"w{i}": i for i in range(VOCABULARY)}
    made = Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    tokenizer.save_pretrained(model)
    new = {"input_ids": [3, VOCABULARY], "labels": [-100, VOCABULARY]}
    data = write_jsonl(tmp_path / "rows.jsonl", ["{", {"prompt": "w1", "completion": " w2"}, *[new] * 5])
    wanted = r"model: its tokenizer has 62 tokens and its embeddings 61, and rows\.jsonl:3 has .* first row of 5\. Save"
    with pytest.raises(InputError, match=wanted) as caught:
        prepare(ScoreConfig(data=data, model=str(model)))
    assert "invalid_json" not in str(caught.value) and "\n" not in str(caught.value)
    known = write_jsonl(tmp_path / "known.jsonl", [{"prompt": "w1", "completion": " w2"}] * 3)
    assert len(prepare(ScoreConfig(data=known, model=str(model))).rows) == 2  # tokens that no row uses do no harm
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [{"input_ids": [3, 99], "labels": [-100, 99]}])
    with pytest.raises(InputError, match="its embeddings 61"):
        prepare(ScoreConfig(data=known, target=wrong, model=str(model)))
