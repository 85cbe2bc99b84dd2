from __future__ import annotations

import os
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from alphatoken_curate import ScoreConfig, UsageError
from alphatoken_curate.config import checked
from alphatoken_curate.settings import load_settings


def settings_of(folder: Path, text: str | bytes) -> dict[str, Any]:
    path = folder / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_settings(path)


def test_a_plain_mapping_is_read(tmp_path: Path) -> None:
    text = "# words\nkeep: 0.3\ndata: [a, b]\nreference: null\nseed: 4\nmodel: 'x: y'\n"
    assert settings_of(tmp_path, text) == {
        "keep": 0.3,
        "data": ["a", "b"],
        "reference": None,
        "seed": 4,
        "model": "x: y",
    }


HOSTILE = {
    "call": "keep: !!python/object/apply:os.system ['touch owned']\n",
    "name": "keep: !!python/name:os.system\n",
    "module": "keep: !!python/module:os\n",
    "own tag": "keep: !thing 3\n",
    "alias": "data: &a [x]\nfisher: *a\n",
    "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in pairwise("abcdefghi")),
    "merge": "base: &a {keep: 0.1}\nx:\n  <<: *a\n",
    "twice": "keep: 0.1\nseed: 3\nkeep: 0.9\n",
    "twice deeper": "data: {a: 1, a: 2}\n",
    "list": "- keep\n",
    "word": "keep\n",
    "empty": "",
    "number key": "1: 2\n",
    "two documents": "keep: 0.1\n---\nkeep: 0.2\n",
    "not closed": "data: [a\n",
    "deep": "[" * 5000,
    "control": b"keep: \x00\n",
    "not text": b"keep: \xff\xfe\xfd\n",
    "long": "# " + "x" * (1 << 24) + "\nkeep: 0.1\n",
    "many": "data: [" + "a," * (1 << 20) + "]\n",
    "key of a list": "data: {[a]: 1}\n",
    "odd date": "keep: 2020-99-99\n",
}  # fmt: skip


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_yaml_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"--config .*c\.yaml"):
        settings_of(tmp_path, HOSTILE[case])
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("case", [case for case in HOSTILE if case not in ("long", "many")])
def test_hostile_yaml_is_refused_without_the_loader_in_c(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    test_hostile_yaml_is_refused(case, tmp_path, monkeypatch)


def test_a_config_of_many_files_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [f"/data/{'x' * 90}/part-{n:05}.jsonl" for n in range(20_000)]
    assert settings_of(tmp_path, "data:\n" + "".join(f"- {name}\n" for name in files)) == {"data": files}
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    few = yaml.safe_dump({"data": files[:700]})
    assert settings_of(tmp_path, few) == {"data": files[:700]}


def test_names_that_are_no_text_survive_the_yaml_they_are_written_to(tmp_path: Path) -> None:
    names = [os.fsdecode(b"r\xff.jsonl"), "\U0001f600.jsonl", "\x1b[31m.jsonl", "\ufeff\u2028.jsonl"]
    assert settings_of(tmp_path, yaml.safe_dump({"data": names})) == {"data": names}


def test_a_repeated_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'keep' stands there twice"):
        settings_of(tmp_path, HOSTILE["twice"])


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(UsageError, match="cannot be read"):
            load_settings(path)


@given(st.binary(max_size=200))
def test_any_bytes_are_settings_or_a_usage_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    try:
        found = settings_of(tmp_path_factory.getbasetemp(), content)
    except UsageError:
        return
    assert isinstance(found, dict)


@hypothesis.settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "keep": st.floats(0.001, 1) | st.just("positive"),
            "layers": st.integers(1, 99) | st.just("all"),
            "stability_weight": st.floats(-1e6, 1e6),
            "by": st.text(min_size=1).filter(str.strip),
            "model": st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1),
            "allow_empty_rows": st.booleans(),
        },
    )
)
def test_settings_survive_the_yaml_they_are_written_to(
    tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]
) -> None:
    made = ScoreConfig(data=("d",), **settings)
    stored = {item.name: getattr(made, item.name) for item in fields(ScoreConfig)} | {"data": list(made.data)}
    text = yaml.safe_dump(stored, sort_keys=True)
    assert checked(ScoreConfig, settings_of(tmp_path_factory.getbasetemp(), text), "there") == made
