"""`--turns each`: chats whose answers are sequences of their own, from rows to weights, beside rows of one answer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from chats import answer, user
from templates import tokenizer_of
from tiny import tiny_model
from tiny_files import command, perturbed, quiet, write_jsonl

from alphatoken_curate import ScoreConfig, UsageError, compare, mask, refresh, scan, scan_tokens, score, verify
from alphatoken_curate.cli.told import summary
from alphatoken_curate.config import MaskConfig
from alphatoken_curate.exports.export import export
from alphatoken_curate.page.report import render
from alphatoken_curate.page.tokens import read_tokens
from alphatoken_curate.reading.row import read_row
from alphatoken_curate.reading.search import search_rows
from alphatoken_curate.reading.stats import stats
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.schema import SIGNALS, sequence_keys
from alphatoken_curate.trainers import TrainDataset, as_dataset
from alphatoken_curate.trainers.current import CurrentMask, sequence_key

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    # As Qwen3 does: a thought is left out once a user's message follows.
    "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATS = [
    [user("One?"), answer("<think>a</think>First"), user("Two?"), answer("Second"), user("Three?"), answer("Third")],
    [user("Only?"), answer("Once")],
    [user("What?"), answer("This"), user("And?"), answer("<think>b</think>That")],
    [user("Up?"), answer("Down"), user("Left?"), answer("Right")],
    [user("Red?"), answer("Green"), user("Blue?"), answer("Yes")],
]
TARGET = [[user("Why?"), answer("So")], [user("How?"), answer("Thus")]]


def record(messages: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return {"messages": messages, "id": name}


def turns_of(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The chat up to each of its answers."""
    return [messages[: i + 1] for i, message in enumerate(messages) if message["role"] == "assistant"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, made = tmp_path_factory.mktemp("models"), {}
    tokenizer = tokenizer_of(TEMPLATE)
    with quiet():
        for name in ("base", "tuned"):
            model = tiny_model("llama", vocab_size=len(tokenizer))
            (perturbed(model) if name == "tuned" else model).float().save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
            made[name] = str(folder / name)
    return made


@pytest.fixture(scope="module")
def settings(folder: Path, models: dict[str, str]) -> dict[str, Any]:
    return {
        "data": write_jsonl(folder / "chats.jsonl", [record(chat, f"c{i}") for i, chat in enumerate(CHATS)]),
        "target": write_jsonl(folder / "target.jsonl", [record(chat, "t") for chat in TARGET]),
        "model": models["tuned"],
        "reference": models["base"],
        "turns": "each",
        "rows_per_shard": 2,
        "layers": 2,
        "fisher_rows": 3,
    }


@pytest.fixture(scope="module")
def run(folder: Path, settings: dict[str, Any]) -> Path:
    return score(ScoreConfig(**settings), folder / "run").run


@pytest.mark.long
def test_a_sequence_is_what_a_row_of_that_answer_alone_is(folder: Path, settings: dict[str, Any], run: Path) -> None:
    """Beside a data set that holds the chat up to each answer as a row: the same tokens, and signals but for draws."""
    alone = [record(turn, "x") for chat in CHATS for turn in turns_of(chat)]
    apart = settings | {"data": write_jsonl(folder / "apart.jsonl", alone), "turns": "last", "fisher": "empirical"}
    both = settings | {"fisher": "empirical", "fisher_rows": 99}
    one = scan(score(ScoreConfig(**both), folder / "whole").run).collect()
    other = scan(score(ScoreConfig(**apart | {"fisher_rows": 99}), folder / "parts").run).collect()
    assert one["status"].to_list() == ["scored"] * 10
    # Behind the stop of an answer a row alone has its line break; nothing responds there.
    for mine, theirs in zip(one.to_dicts(), other.to_dicts(), strict=True):
        length = len(mine["input_ids"])
        assert mine["input_ids"] == theirs["input_ids"][:length] and not any(theirs["response"][length:])
        assert mine["response"] == theirs["response"][:length] and sum(mine["response"]) > 2
        for name in SIGNALS:
            found, wanted = (np.array(row[name][:length], np.float64) for row in (mine, theirs))
            np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-7, err_msg=name)


def test_rows_have_turns_and_keep_their_place(run: Path) -> None:
    found = scan(run).collect()
    assert list(zip(found["row_id"], found["turn"], found["line"], found["id"], strict=True)) == [
        (i, turn, i + 1, f"c{i}") for i, chat in enumerate(CHATS) for turn in range(len(turns_of(chat)))
    ]
    stored = manifest.read(run)
    assert (stored.counts.read, stored.counts.scored, stored.counts.sequences) == (5, 5, 10)
    assert [one.rows for one in stored.inputs] == [5] and [one.rows for one in stored.generations[0].shards] == [
        4,
        4,
        2,
    ]
    assert verify(run) == []


def test_nothing_of_a_thought_is_lost_in_the_turn_that_has_it(run: Path, models: dict[str, str]) -> None:
    tokens = scan_tokens(run).collect()
    said = {key: "".join(part["text"]) for key, part in tokens.group_by("row_id", "turn", maintain_order=True)}
    assert said[0, 0] == "<think>a</think>First<|im_end|>" and said[0, 2] == "Third<|im_end|>"
    data, target = (str(run.parent / name) for name in ("chats.jsonl", "target.jsonl"))
    config = ScoreConfig(data=data, target=target, model=models["base"], layers=2)  # type: ignore[arg-type]
    told = score(config, run.parent / "all").manifest.told
    assert told == {"the chat template leaves out of answers content up to </think>": 1}
    assert manifest.read(run).told == {}


def test_every_reader_tells_the_turns_apart(run: Path) -> None:
    tokens = scan_tokens(run).collect()
    assert tokens.columns[:2] == ["row_id", "turn"]
    # scan_tokens joins weights by row and turn
    train = {(row["row_id"], row["turn"]): row for row in scan(run, "train").collect().to_dicts()}
    for key, part in tokens.group_by("row_id", "turn", maintain_order=True):
        weights = [train[key]["loss_weight"][at] for at in part["position"]]
        assert part["loss_weight"].to_list() == weights
        view = read_row(run, row=key[0], turn=key[1])
        (branch,) = view.branches
        assert (view.turn, view.turns) == (key[1], tuple(range(len(turns_of(CHATS[key[0]])))))
        assert branch.signals["value"][branch.response].tolist() == part["value"].to_list()
    assert read_row(run, row=2).turn == 0
    with pytest.raises(UsageError, match=r"row 1 has no turn 1; it has 0"):
        read_row(run, row=1, turn=1)
    hits = list(search_rows(run, "Two?"))
    assert [(hit.row_id, hit.turn) for hit in hits] == [(0, 1)]
    page = read_tokens(run)
    assert (
        page.rows.keys[page.row].tolist()
        == sequence_keys(tokens["row_id"].to_numpy(), tokens["turn"].to_numpy()).tolist()
    )
    assert page.weight is not None and page.weight.tolist() == tokens["loss_weight"].to_list()
    found = stats(run)
    assert found.rows["read"] == found.rows["scored"] == 5 and found.sequences == 10
    assert "5 rows read: 5 scored in 10 sequences, one for each answer" in render(run)


def test_the_commands_tell_of_sequences(run: Path, settings: dict[str, Any]) -> None:
    shown = command("show", run, "--row", 0, "--turn", 2).out
    assert "row 0 · turn 2 of 0, 1, 2 · scored" in shown
    assert "turn 1" in command("show", run, "--search", "Two?").out
    assert "5 read: 5 scored, 0 target, 0 failed, 0 rejected in 10 sequences" in command("stats", run).out
    checked = command(
        "check", settings["data"], "--target", settings["target"], "--model", settings["model"], "--turns", "each"
    )
    assert "5 to score in 10 sequences, one for each answer" in checked.out
    card = (run / "README.md").read_text()
    assert "| rows scored | 5 |" in card and "| sequences scored, one for each answer | 10 |" in card


def test_masks_are_made_by_turn(run: Path) -> None:
    made = mask(run, MaskConfig(keep=0.5, scope="row"))
    train = scan(run, "train", mask=made.mask).collect()
    values = scan(run).collect()
    for kept, row in zip(train["loss_mask"], values["value"], strict=True):
        known = [x for x in row if x is not None]
        assert sum(kept) == -(-len(known) // 2)
    drawn = scan(run, "train", mask=mask(run, MaskConfig(keep=0.5, by="random", scope="row")).mask).collect()
    texts = {tuple(row) for row in drawn["value"].list.drop_nulls().to_list()}
    assert len(texts) == 10, "turns of a chat must not be drawn alike"
    later = mask(run, MaskConfig(keep="positive", by="turn"))
    by_turn = scan_tokens(run, mask=later.mask).collect()
    assert by_turn.filter(pl.col("turn") > 0)["kept"].all()


def test_counts_say_what_they_count(run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """Ten answers of five rows: each of them may lose every token, or be left out."""
    rare = MaskConfig(keep=0.01, always_keep="none")
    made = mask(run, rare)
    assert made.of_turns and made.rows_given_back > 5
    lines = [line.strip() for line in summary(made)]
    assert f"{made.rows_given_back} answers that would have lost every token got the best one back" in lines
    lines = [line.strip() for line in summary(replace(made, rows_left_out=1))]
    assert "1 answer is left out: scored in only some of them" in lines
    lines = [line.strip() for line in summary(replace(made, of_turns=False, rows_left_out=2))]
    assert "2 rows are left out: scored in only some of them" in lines
    assert f"{made.rows_given_back:,} answers that had lost every token" in (run / "README.md").read_text()
    found = compare(run, run)
    assert (found.rows, found.rows_apart) == (5, 0)
    changed = [record(chat, f"c{i}") for i, chat in enumerate(CHATS)]
    changed[0] = json.loads(json.dumps(changed[0]).replace("Second", "Sekond"))
    data = write_jsonl(tmp_path / "chats.jsonl", changed)
    other = score(ScoreConfig(**{**settings, "data": data}), tmp_path / "other").run
    found = compare(run, other)
    assert (found.rows, found.rows_apart) == (5, 1)  # the other answers of that chat are in both


def test_trainers_find_each_turn(run: Path) -> None:
    rows = as_dataset(run, 0)
    assert rows.column_names[:2] == ["row_id", "turn"]
    items = list(TrainDataset(run, 0, shuffle=False))
    assert [(one["row_id"], one["turn"]) for one in items] == list(zip(rows["row_id"], rows["turn"], strict=True))
    made = mask(run, MaskConfig(keep=0.3))
    current = CurrentMask(run)
    current.use(made.mask)
    wanted = scan(run, "train", mask=made.mask).collect()
    for row, want in zip(rows, wanted.to_dicts(), strict=True):
        assert current([row])[0]["loss_weight"] == want["loss_weight"]
    packed = {
        "input_ids": [*rows[1]["input_ids"], *rows[2]["input_ids"]],
        "seq_lengths": [len(rows[1]["input_ids"]), len(rows[2]["input_ids"])],
        "row_ids": [sequence_key(row) for row in (rows[1], rows[2]) for _ in row["input_ids"]],
    }
    assert (
        current([packed])[0]["loss_weight"] == wanted["loss_weight"][1].to_list() + wanted["loss_weight"][2].to_list()
    )


def test_exports_hold_every_turn(run: Path, tmp_path: Path) -> None:
    assert export(run, trainer="hf", output=tmp_path / "hf", mask=0).rows == 10
    assert export(run, trainer="jsonl-weights", output=tmp_path / "weights", mask=0).rows == 10
    lines = [json.loads(line) for line in (tmp_path / "weights" / "messages.jsonl").read_text().splitlines()]
    for line, turn in zip(lines, (turn for chat in CHATS for turn in turns_of(chat)), strict=True):
        assert [{k: v for k, v in message.items() if k != "weight"} for message in line["messages"]] == turn
        weights = [message["weight"] for message in line["messages"] if message["role"] == "assistant"]
        assert weights == [0] * (len(weights) - 1) + [1]


def test_chats_are_held_out_whole(settings: dict[str, Any], tmp_path: Path) -> None:
    found = scan(score(ScoreConfig(**settings | {"target": None}), tmp_path / "run").run).collect()
    held = found.filter(status="target")
    assert held["row_id"].n_unique() == 1
    assert held.height == len(turns_of(CHATS[held["row_id"][0]]))
    assert manifest.read(tmp_path / "run").counts.target == 1


def test_a_checkpoint_scores_the_same_turns(run: Path, models: dict[str, str], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    refresh(copied, models["base"])
    first, second = (scan(copied, generation=n).collect() for n in (0, 1))
    for name in ("row_id", "turn", "input_ids", "response"):
        assert first[name].equals(second[name])
    assert verify(copied) == []
    found = compare(copied)
    assert found.rows == 5 and {(one.row_id, one.turn) for one in found.changed} <= {
        (i, turn) for i, chat in enumerate(CHATS) for turn in range(len(turns_of(chat)))
    }


def test_turns_that_begin_behind_the_cut_are_left_out_and_told(settings: dict[str, Any], tmp_path: Path) -> None:
    done = score(ScoreConfig(**settings | {"max_length": 70}), tmp_path / "run")
    found = scan(done.run).collect()
    assert found.filter(row_id=0)["turn"].to_list() == [0, 1]
    assert done.manifest.told == {"answers begin where rows are cut, and are left out": 1}
    assert done.manifest.counts.read == 5 and verify(done.run) == []


def test_pairs_of_several_answers_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    pair = {"prompt": [user("One?")], "chosen": [answer("a"), user("b"), answer("c")], "rejected": [answer("d")]}
    one = {"prompt": [user("One?")], "chosen": [answer("a")], "rejected": [answer("d")]}
    data = write_jsonl(tmp_path / "pairs.jsonl", [one, one | {"chosen": [answer("e")]}])
    assert score(ScoreConfig(**settings | {"data": data}), tmp_path / "run").manifest.counts.scored == 2
    data = write_jsonl(tmp_path / "many.jsonl", [one, pair])
    with pytest.raises(Exception, match=r"several_turns: chosen: it holds several answers.*--turns all"):
        score(ScoreConfig(**settings | {"data": data}), tmp_path / "other")
