"""Every input in tests/corpus, which once failed, has the outcome that stands beside it in `expected.yaml`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from corpus import CORPUS, PAGE, Expected, corpus_tokenizer, expected, named, save_corpus_models, table
from light import light_scorer
from small_run import small_run
from tiny_files import Ended, command, contents

from alphatoken_curate.rows.files import legible
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.schema import LAYOUTS

EXPECTED = expected()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_corpus_models(tmp_path_factory.mktemp("models"), ("base",))["base"]


def test_every_file_is_listed_and_every_listed_file_is_there() -> None:
    there = {path.relative_to(CORPUS).as_posix() for path in CORPUS.rglob("*") if path.is_file()}
    assert there - {"README.md", "expected.yaml"} == set(EXPECTED)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 400_000


def test_the_page_tells_what_each_file_is(same_text: Callable[[Path, str], None]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    head, found, _ = text.partition("<!-- test: corpus -->\n")
    assert found
    same_text(PAGE, head + found + table())


def check_ended(ended: Ended, one: Expected) -> None:
    told = ended.out + ended.err
    assert ended.code == one.exit, told
    assert one.says in told
    assert told == legible(told) and "Traceback" not in told


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", named("rows"))
def test_rows(name: str, model: str, tmp_path: Path) -> None:
    one = EXPECTED[name]
    about = (one.path, *one.flags, "--model", model, "--device", "cpu")
    with light_scorer():
        check_ended(command("check", *about), one)
        ended = command("score", *about, "-o", tmp_path / "run")
    assert ended.code == one.exit, ended.err
    if one.exit:
        assert one.says in ended.err and not (tmp_path / "run" / "values").exists()
        return
    assert command("verify", tmp_path / "run").code == 0
    assert manifest.read(tmp_path / "run").counts.read == one.rows or not one.rows
    if one.answers is not None:
        assert sorted(answers_in(tmp_path / "run")) == sorted(one.answers)


def answers_in(run: Path) -> Iterator[tuple[str, ...]]:
    """The texts that respond, of each sequence and each branch; of rows of tokens these."""
    tokenizer = corpus_tokenizer()
    for path in sorted(run.glob("values/generation=0/*.parquet")):
        table_ = pq.read_table(path)
        kind = next(kind for kind in LAYOUTS.values() if kind.values.names == table_.schema.names)
        for row, prefix in itertools.product(table_.to_pylist(), kind.branches):
            parts = zip(row[prefix + "input_ids"], row[prefix + "response"], strict=True)
            runs = [[i for i, _ in part] for on, part in itertools.groupby(parts, key=lambda pair: pair[1]) if on]
            yield tuple(tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in runs)


CHATS = (
    '{"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "First"}]}\n'
    '{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "One?"},'
    ' {"role": "assistant", "content": "First"}]}\n'
)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", named("templates"))
def test_templates(name: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(CHATS * 2)
    about = (tmp_path / "chats.jsonl", "--target", tmp_path / "chats.jsonl", "--model", model)
    check_ended(command("check", *about, "--chat-template", EXPECTED[name].path), EXPECTED[name])


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", [*named("by"), *named("configs")])
def test_expressions_and_configs(name: str, tmp_path: Path) -> None:
    one, run = EXPECTED[name], small_run(tmp_path / "run")
    before = contents(run)
    read = ("--by", one.path.read_text("utf-8")) if name.startswith("by/") else ("-c", one.path)
    check_ended(command("mask", run, "--keep", "0.4", *read) if read[0] != "-c" else command("mask", run, *read), one)
    assert command("verify", run).code == 0
    if one.exit:
        assert contents(run) == before
