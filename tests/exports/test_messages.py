"""`jsonl-weights`: weights of messages and of rows, matched to the original chats, which must be what they were."""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from small_run import FIELDS, VOCABULARY, closes, facts, published, scored, write_pieces, write_vocabulary
from tiny import tiny_model
from tiny_files import command, contents, quiet, write_jsonl

from alphatoken_curate import UsageError, export, scan_tokens
from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.masks.remask import make_mask
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.manifest import Input
from alphatoken_curate.runs.schema import SFT
from alphatoken_curate.runs.shards import Branch, Footer, ValueRow, shard_name, values_folder, write_values
from alphatoken_curate.tokens.pieces import Piece

ASK, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
ONE, TWO = [ASK, ANSWER], [ASK, ANSWER, ASK, {"role": "assistant", "content": "So it is."}]
KEEP = "CASE WHEN {} THEN 1 ELSE -1 END"


def chat_run(
    folder: Path, records: list[dict[str, Any]], spans: list[list[tuple[int, int]]], keep: str, **told: Any
) -> Path:
    """A run of these records, row i with response tokens in these spans of 12; it keeps those that `keep` picks."""
    folder.mkdir(exist_ok=True)
    data = Path(write_jsonl(folder / "chats.jsonl", records))
    return run_of(folder / "run", data, spans, keep, **told)


def run_of(run: Path, data: Path, spans: list[list[tuple[int, int]]], keep: str, **told: Any) -> Path:
    rows = []
    for i, where in enumerate(spans):
        response = np.zeros(12, np.bool_)
        for start, end in where:
            response[start:end] = True
        ids = np.random.default_rng(i).integers(0, 50, 12).astype(np.int32)
        branch = Branch(input_ids=ids, response=response, end_of_turn=closes(response))
        status = "scored" if where else "target"
        row = ValueRow(row_id=i, source=data.name, line=i + 1, id=None, status=status, branches=(branch,))
        rows.append(scored(row) if where else row)
    content = data.read_bytes()
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    inputs = (Input(source=data.name, digest=digest, bytes=len(content), rows=len(rows)),)
    settings = {"kind": "sft", "estimator": "published", "stability_weight": 1.5, "turns": "all", "max_length": 2048}
    known = replace(facts(len(rows)), inputs=inputs, settings=settings | told)
    for index, start in enumerate(range(0, len(rows), 2)):
        footer = Footer(fields={**FIELDS, "kind": "sft", "generation": 0}, facts=known.as_json())
        write_values(values_folder(run, 0) / shard_name(index), rows[start : start + 2], footer, SFT)
    write_vocabulary(run)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": [str(data)]}))
    manifest.write(run, manifest.rebuild(run))
    make_mask(run, published(keep="positive", by=KEEP.format(keep), allow_empty_rows=True))
    return run


def exported(run: Path, place: Path, **asked: Any) -> tuple[list[Any], list[Any]]:
    export(run, trainer="jsonl-weights", output=place, **asked)
    found = [(place / name).read_text().splitlines() for name in ("messages.jsonl", "samples.jsonl")]
    return [json.loads(line) for line in found[0]], [json.loads(line) for line in found[1]]


def weights(row: dict[str, Any]) -> list[int | None]:
    return [message.get("weight") for message in row["messages"]]


def test_a_message_has_weight_0_where_none_of_its_tokens_is_left(tmp_path: Path) -> None:
    records = [{"messages": TWO}, {"messages": TWO}, {"messages": TWO}]
    spans = [[(2, 5), (8, 12)]] * 3
    # All of the first; of the second only the answer at the end; of the third one token of the first answer.
    keep = "row_id = 0 OR (row_id = 1 AND position >= 8) OR (row_id = 2 AND position = 4)"
    run = chat_run(tmp_path, records, spans, keep)
    by_message, by_row = exported(run, tmp_path / "out")
    assert [weights(row) for row in by_message] == [[None, 1, None, 1], [None, 0, None, 1], [None, 1, None, 0]]
    assert [row["weight"] for row in by_row] == pytest.approx([1, 4 / 7, 1 / 7])
    for row in (*by_message, *by_row):
        assert [{key: m[key] for key in ("role", "content")} for m in row["messages"]] == TWO
    assert all(weights(row) == [None] * 4 for row in by_row)
    assert "Of 6 answers, 4 are to train." in (tmp_path / "out" / "README.md").read_text()
    told = command("export", run, "--for", "jsonl-weights", "-o", tmp_path / "again").out
    assert "answers  6, of which 4 have weight 1" in told


def test_a_message_of_which_special_tokens_alone_are_left_has_weight_0(tmp_path: Path) -> None:
    """They are always kept, as what ends an answer is: weight 1 would train all of the answer that was dropped.

    What an expression keeps says something, its end too.
    """
    run = chat_run(tmp_path, [{"messages": TWO}], [[(2, 5), (8, 12)]], "position >= 0")
    special = set(scan_tokens(run).collect().filter(position=3)["token_id"])
    write_pieces(run, [Piece(content=f"<{i}>".encode(), special=i in special) for i in range(VOCABULARY)])
    for always, wanted in (("special", 0), ("position = 3", 1), ("position = 4", 1), ("end-of-turn", 0)):
        by = KEEP.format("position >= 8")
        made = make_mask(run, published(keep="positive", by=by, always_keep=always))
        by_message, _ = exported(run, tmp_path / f"out{made.mask}")
        assert [weights(row) for row in by_message] == [[None, wanted, None, 1]]


def test_rows_without_a_token_are_dropped_and_others_stay_in_step(tmp_path: Path) -> None:
    """Held-out rows and lost ones lie between those that are written."""
    records = [{"messages": [{"role": "user", "content": f"{i}"}, ANSWER]} for i in range(7)]
    spans = [[(3, 6)] if i not in (1, 4) else [] for i in range(7)]
    run = chat_run(tmp_path, records, spans, "row_id != 2")
    by_message, by_row = exported(run, tmp_path / "out")
    assert [row["messages"][0]["content"] for row in by_message] == ["0", "3", "5", "6"]
    assert [row["messages"][0]["content"] for row in by_row] == ["0", "3", "5", "6"]
    assert json.loads((tmp_path / "out" / "dropped.jsonl").read_text()) == {
        "row_id": 2,
        "turn": 0,
        "reason": "nothing_trains",
    }


def test_tools_system_and_other_shapes_become_messages(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    called = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
    records = [
        {"messages": [ASK, called], "tools": tools},
        {"instruction": "Add", "input": "1 1", "output": "2"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        {"prompt": TWO[:2], "completion": TWO[2:]},
    ]
    by_message, by_row = exported(chat_run(tmp_path, records, [[(3, 6)]] * 4, "row_id >= 0"), tmp_path / "out")
    assert by_message[0] == {"messages": [ASK, {**called, "weight": 1}], "tools": tools}
    assert by_row[0] == {"messages": [ASK, called], "tools": tools, "weight": 1}
    assert by_message[1]["messages"][0]["content"] == "Add\n\n1 1"
    assert [message["role"] for message in by_message[2]["messages"]] == ["system", "user", "assistant"]
    # The answer before the completion was not to respond.
    assert weights(by_message[3]) == [None, 0, None, 1]


def test_only_the_last_turn_responds_where_the_run_says_so(tmp_path: Path) -> None:
    run = chat_run(tmp_path, [{"messages": TWO}] * 2, [[(8, 12)]] * 2, "row_id >= 0", turns="last")
    by_message, by_row = exported(run, tmp_path / "out")
    assert [weights(row) for row in by_message] == [[None, 0, None, 1]] * 2
    assert [weights(row) for row in by_row] == [[None, 0, None, None]] * 2, "nor by the weight of the row"


def test_answers_and_runs_of_tokens_that_do_not_match_are_refused(tmp_path: Path) -> None:
    run = chat_run(tmp_path, [{"messages": TWO}], [[(2, 12)]], "row_id >= 0")
    with pytest.raises(UsageError, match=r"chats\.jsonl:1: 2 answers and 1 run of response"):
        exported(run, tmp_path / "out")
    more = chat_run(tmp_path / "more", [{"messages": ONE}], [[(2, 4), (6, 8)]], "row_id >= 0")
    with pytest.raises(UsageError, match="1 answer and 2 runs"):
        exported(more, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_cut_when_they_were_scored_are_dropped(tmp_path: Path) -> None:
    records, spans = [{"messages": TWO}, {"messages": ONE}], [[(2, 12)], [(2, 12)]]
    run = chat_run(tmp_path, records, spans, "row_id >= 0", max_length=12)
    assert len(exported(run, tmp_path / "out")[0]) == 1
    assert "cut_when_scored" in (tmp_path / "out" / "dropped.jsonl").read_text()


def test_longer_rows_are_dropped_since_text_is_not_cut(tmp_path: Path) -> None:
    run = chat_run(tmp_path, [{"messages": ONE}], [[(2, 12)]], "row_id >= 0")
    assert len(exported(run, tmp_path / "fits", max_length=12)[0]) == 1
    with pytest.raises(UsageError, match="too_long 1"):
        exported(run, tmp_path / "out", max_length=11)


def test_rows_that_are_no_chats_are_refused(tmp_path: Path) -> None:
    tokens = chat_run(tmp_path / "a", [{"input_ids": [1, 2], "labels": [-100, 2]}], [[(2, 12)]], "row_id >= 0")
    with pytest.raises(UsageError, match=r"chats\.jsonl:1: pre-tokenised"):
        exported(tokens, tmp_path / "out")
    text = chat_run(tmp_path / "b", [{"prompt": "Once", "completion": " upon"}], [[(2, 12)]], "row_id >= 0")
    with pytest.raises(UsageError, match="raw text"):
        exported(text, tmp_path / "out")


# ------------------------------------------------------------------------------------------------- the original rows


def test_rows_that_have_changed_or_gone_are_refused(tmp_path: Path) -> None:
    run = chat_run(tmp_path, [{"messages": ONE}] * 3, [[(2, 12)]] * 3, "row_id >= 0")
    data, whole = tmp_path / "chats.jsonl", (tmp_path / "chats.jsonl").read_bytes()
    before = contents(run)
    data.write_bytes(whole.replace(b"Because", b"Becau5e", 1))
    with pytest.raises(UsageError, match=r"chats\.jsonl: changed since it was scored"):
        exported(run, tmp_path / "out")
    data.unlink()
    with pytest.raises(UsageError, match=r"cannot be found: .*Restore it"):
        exported(run, tmp_path / "out")
    (tmp_path / "other.jsonl").write_bytes(whole)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": [str(tmp_path / "other.jsonl")]}))
    with pytest.raises(UsageError, match=r"the run was made of chats\.jsonl"):
        exported(run, tmp_path / "out")
    (run / "config.yaml").write_text("keep: 0.5\n")
    with pytest.raises(UsageError, match="names no data"):
        exported(run, tmp_path / "out")
    data.write_bytes(whole)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": [str(data)]}))
    assert len(exported(run, tmp_path / "out")[0]) == 3 and contents(run) == before


def test_rows_that_change_while_they_are_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alphatoken_curate.exports import originals

    run = chat_run(tmp_path, [{"messages": ONE}] * 2, [[(2, 12)]] * 2, "row_id >= 0")
    found = originals.digest
    data = tmp_path / "chats.jsonl"

    def later(path: Path) -> tuple[int, str]:
        result = found(path)
        data.write_bytes(data.read_bytes().replace(b"Because", b"Becau5e"))
        return result

    monkeypatch.setattr(originals, "digest", later)
    with pytest.raises(UsageError, match="its digest is sha256"):
        exported(run, tmp_path / "out")


@pytest.mark.parametrize("lines", [1, 3])
def test_values_of_other_rows_are_seen(tmp_path: Path, lines: int) -> None:
    """More or fewer rows in the file than in values/, by the same digest: a manifest that was changed."""
    run = chat_run(tmp_path, [{"messages": ONE}] * lines, [[(2, 12)]] * 2, "row_id >= 0")
    with pytest.raises(UsageError, match=r"fewer rows|rows are others"):
        exported(run, tmp_path / "out")


def test_bad_rows_take_up_a_place(tmp_path: Path) -> None:
    records: list[Any] = ["not json", {"messages": ONE}, {"other": 1}, {"messages": TWO}]
    spans: list[list[tuple[int, int]]] = [[], [(2, 5)], [], [(2, 5), (7, 9)]]
    by_message, _ = exported(chat_run(tmp_path, records, spans, "row_id >= 0"), tmp_path / "out")
    assert [len(row["messages"]) for row in by_message] == [2, 4]
    broken = chat_run(tmp_path / "b", [{"other": 1}], [[(2, 5)]], "row_id >= 0")
    with pytest.raises(UsageError, match=":1: "):
        exported(broken, tmp_path / "no")


def test_values_that_are_shorter_than_the_mask_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alphatoken_curate.exports import messages

    run = chat_run(tmp_path, [{"messages": ONE}] * 2, [[(2, 12)]] * 2, "row_id >= 0")
    found = messages.originals
    monkeypatch.setattr(messages, "originals", lambda opened: (one for one in found(opened) if one.row_id != 1))
    with pytest.raises(StoredDataError, match=r"row 1 of train/ is not in values/"):
        exported(run, tmp_path / "out")


def test_compressed_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"messages": ONE}).encode() + b"\n"))
    by_message, _ = exported(run_of(tmp_path / "run", path, [[(2, 5)]], "row_id >= 0"), tmp_path / "out")
    assert len(by_message) == 1


def test_values_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    when = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    path = tmp_path / "chats.parquet"
    pq.write_table(pa.table({"messages": [[ASK, {**ANSWER, "at": when}]]}), path)
    run = run_of(tmp_path / "run", path, [[(2, 5)]], "row_id >= 0")
    with pytest.raises(UsageError, match="what JSON has no form for"):
        exported(run, tmp_path / "out")


# ------------------------------------------------------------------------------------------------------ a real run


@pytest.fixture
def model(smollm2_tokenizer: Any, tmp_path: Path) -> Path:
    with quiet():
        tiny_model("llama", vocab_size=len(smollm2_tokenizer)).save_pretrained(tmp_path / "model")
    smollm2_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.long
def test_what_a_user_marked_off_stays_off_and_reads_back_as_it_was_written(model: Path, tmp_path: Path) -> None:
    off, on = {**ANSWER, "weight": 0}, {"role": "assistant", "content": "So it is.", "train": True}
    records = [
        {"messages": [ASK, off, ASK, on]},
        {"messages": [ASK, on, ASK, {**ANSWER, "loss": False}]},
        {"messages": [ASK, {"role": "assistant", "content": "One answer, of some words."}]},
        {"prompt": [ASK, ANSWER], "completion": [ASK, off, ASK, on]},
    ]
    target = write_jsonl(tmp_path / "target.jsonl", [{"messages": TWO}])
    flags = ("--target", target, "--model", model, "--layers", 1)
    data = write_jsonl(tmp_path / "rows.jsonl", records)
    assert command("score", data, *flags, "-o", tmp_path / "one").code == 0
    by_message, by_row = exported(tmp_path / "one", tmp_path / "out")
    assert [weights(row) for row in by_message] == [
        [None, 0, None, 1],
        [None, 1, None, 0],
        [None, 1],
        [None, 0, None, 0, None, 1],
    ]
    assert [weights(row) for row in by_row] == [
        [None, 0, None, None],
        [None, None, None, 0],
        [None, None],
        [None, 0, None, 0, None, None],
    ]
    # Every answer trains that was to respond, and none else: as it was read, it is read again.
    assert command("score", tmp_path / "out" / "messages.jsonl", *flags, "-o", tmp_path / "two").code == 0
    tables = [
        scan_tokens(tmp_path / name).select("row_id", "position", "text", "value").collect() for name in ("one", "two")
    ]
    assert tables[0].equals(tables[1]) and len(tables[0])
    again, _ = exported(tmp_path / "two", tmp_path / "again")
    assert again == by_message
    # The other file does not say it all, so it is no DATA.
    refused = command("check", tmp_path / "out" / "samples.jsonl", *flags)
    assert (
        refused.code == 3
        and "an export of a run of rows.jsonl (mask 0, for jsonl-weights), whose weights" in refused.err
    )


@pytest.mark.long
def test_the_rows_of_columns_of_ones_own(model: Path, tmp_path: Path) -> None:
    """The source is read again by the names and of the split that the run was read by."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    parts = {
        name: datasets.Dataset.from_list([{"q": f"{name} {i}?", "a": f"It is {i}."} for i in range(4)])
        for name in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    flags = ("--split", "test", "--map", "q=prompt,a=response", "--model", model, "--layers", 1)
    saved = str(tmp_path / "saved")
    done = command("score", saved, *flags, "--target", f"{saved}:train", "-o", tmp_path / "run")
    assert done.code == 0, done.err
    assert "8 rows: q is read as prompt (--map)." in done.err
    by_message, _ = exported(tmp_path / "run", tmp_path / "out")
    assert [row["messages"][0]["content"] for row in by_message] == [f"test {i}?" for i in range(4)]
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (stored["map"], stored["split"]) == ("a=response,q=prompt", "test")
    assert stored["target"] == f"{saved}:train"
    replayed = command("score", "--config", tmp_path / "run" / "config.yaml", "-o", tmp_path / "other")
    assert replayed.code == 0 and contents(tmp_path / "other") == contents(tmp_path / "run")


def test_a_chat_that_was_scored(smollm2_tokenizer: Any, tmp_path: Path) -> None:
    """Each message's tokens, by the text between two of them, against what is kept of them."""
    model = tiny_model("llama", vocab_size=len(smollm2_tokenizer))
    with quiet():
        model.save_pretrained(tmp_path / "model")
    smollm2_tokenizer.save_pretrained(tmp_path / "model")
    turns = [
        [("a", "I see."), ("b", "No."), ("c", "Then it is so.")],
        [("d", "Yes, indeed.")],
        [("e", "x"), ("f", "y")],
    ]
    records = [
        {
            "messages": [
                {"role": r, "content": c} for pair in row for r, c in zip(("user", "assistant"), pair, strict=True)
            ]
        }
        for row in turns
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", records)
    target = write_jsonl(tmp_path / "target.jsonl", records[1:2])
    done = command(
        "score", data, "--target", target, "--model", tmp_path / "model", "-o", tmp_path / "run", "--keep", 0.3,
        "--weights", "rank",
    )  # fmt: skip
    assert done.code == 0, done.err
    by_message, by_row = exported(tmp_path / "run", tmp_path / "out")
    tokens = scan_tokens(tmp_path / "run").collect()
    assert len(by_message) == len(by_row) == 3
    for row_id, (row, sample) in enumerate(zip(by_message, by_row, strict=True)):
        mine = tokens.filter(row_id=row_id)
        assert sample["weight"] == pytest.approx(mine["loss_weight"].mean())
        # An answer ends with the end of its turn: that parts the tokens into messages.
        ends = np.flatnonzero(mine["text"].to_numpy() == "<|im_end|>")
        kept = mine["kept"].to_numpy().copy()
        assert kept[ends].all(), "they are always kept"
        kept[ends] = False
        parts = np.split(kept, ends[:-1] + 1)
        assert [int(part.any()) for part in parts] == [w for w in weights(row) if w is not None]
    assert {w for row in by_message for w in weights(row)} == {None, 0, 1}
