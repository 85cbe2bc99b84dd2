"""A URL where a folder or file of this machine is meant: refused at once, wherever one may be named."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from tiny_files import command

import alphatoken_curate
from alphatoken_curate import MaskConfig, ScoreConfig, UsageError
from alphatoken_curate.cli import main as main_module
from alphatoken_curate.cli.main import COMMANDS
from alphatoken_curate.cli.paths import Local
from alphatoken_curate.models.checkpoints import Watcher
from alphatoken_curate.models.load import find_model
from alphatoken_curate.settings import load_settings
from alphatoken_curate.trainers import RefreshCallback, as_dataset
from alphatoken_curate.urls import check_local, checked, is_url, names_url, shown

URLS = ("s3://bucket/run", "S3://bucket/run", "s3:/bucket/run", "gs://b/r/", "hf://datasets/a/b", "file:///tmp/x")
URLS += ("http://host/x", "s3://", " s3://b/r", "simplecache::s3://b/r", "s3://b/ä ö/../r", "memory://r")

ROWS = {"data", "target", "retention", "fisher_prompts"}
"""What takes the URL of rows."""

DESTINATIONS = {"publish": {"url"}}
"""What takes a URL by its nature."""

NO_NAMES = {
    "score": {"workers", "ray_address", "part"},
    "check": {"workers"},
    "refresh": {"device", "base", "reference", "workers", "ray_address"},
    "show": {"own_id", "search", "columns"},
    "compare": {"generations"},
}
"""Parameters of text that name no file or folder; the models of refresh are found by `find_model`, below."""


def commands() -> Iterator[tuple[str, click.Command]]:
    for name in COMMANDS:
        found = main_module.cli.get_command(click.Context(main_module.cli), name)
        assert found is not None
        yield name, found


def named() -> Iterator[tuple[str, click.Parameter]]:
    """Every parameter of every command that is text of the user's own and not said to be something else."""
    settings = {item.name: item.metadata["kind"] for kind in (MaskConfig, ScoreConfig) for item in fields(kind)}
    for name, found in commands():
        open_ = ROWS | DESTINATIONS.get(name, set()) | NO_NAMES.get(name, set())
        for one in found.params:
            is_text = isinstance(one.type, click.Path) or one.type is click.STRING
            if is_text and one.name not in open_ and settings.get(str(one.name), "str") in ("str", "file"):
                yield name, one


@pytest.mark.parametrize(("name", "one"), [pytest.param(n, o, id=f"{n}-{o.name}") for n, o in named()])
def test_every_parameter_that_names_something_refuses_a_url(
    name: str, one: click.Parameter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not isinstance(one.type, click.Path) or isinstance(one.type, Local), "use cli/paths.py"
    arguments = {"score": ["x.jsonl"], "check": ["x.jsonl"], "export": ["--for", "hf"]}.get(name, [])
    arguments = [*arguments, *(["--checkpoint", "c"] if name == "refresh" and one.name not in ("checkpoint",) else [])]
    if name == "refresh" and one.name == "watch":
        arguments = []
    given = [] if name in ("score", "check") or one.name in ("run", "other") else ["run"]
    if isinstance(one, click.Argument):
        given += ["s3://bucket/run"] if one.name == "run" else ["run", "s3://bucket/run"]
    else:
        given += [one.opts[-1], "s3://bucket/run"]
    ended = command(name, *given, *arguments)
    assert ended.code == 2, ended
    assert "s3://bucket/run: a URL" in ended.err and ended.err.count("\n") == 1 and "Traceback" not in ended.err
    assert not list(tmp_path.iterdir()) and ended.out == ""


READERS: dict[str, Callable[[Any], Any]] = {
    "score": lambda url: alphatoken_curate.score(ScoreConfig(data=("x.jsonl",)), url),
    "score_part": lambda url: alphatoken_curate.score_part(ScoreConfig(data=("x.jsonl",)), "prepare", url),
    "scan_tokens": alphatoken_curate.scan_tokens,
    "compare": lambda url: alphatoken_curate.compare(url, generations=(0, 0)),
    "report": alphatoken_curate.report,
    "verify": alphatoken_curate.verify,
    "mask": lambda url: alphatoken_curate.mask(url, MaskConfig()),
    "export": lambda url: alphatoken_curate.export(url, trainer="hf", output="out"),
    "export to": lambda url: alphatoken_curate.export("run", trainer="hf", output=url),
    "refresh": lambda url: alphatoken_curate.refresh(url, "c"),
    "watch": lambda url: next(iter(alphatoken_curate.watch(url, "c"))),
    "as_dataset": as_dataset,
    "RefreshCallback": RefreshCallback,
    "find_model": lambda url: find_model(str(url)),
    "Watcher": lambda url: Watcher(url, None),
    "load_settings": lambda url: load_settings(Path(url)),
}


@pytest.mark.parametrize("url", ["s3://bucket/run", Path("s3://bucket/run")], ids=["text", "Path"])
@pytest.mark.parametrize("name", READERS)
def test_every_function_refuses_a_url(name: str, url: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="s3://bucket/run: a URL"):
        READERS[name](url)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model", "reference", "fisher", "reuse", "chat_template"])
def test_settings_that_name_files_refuse_a_url(name: str) -> None:
    with pytest.raises(UsageError, match="takes no URL"):
        ScoreConfig(data=("x.jsonl",), **{name: "gs://b/x"})


@pytest.mark.parametrize("url", URLS)
def test_urls_are_known_as_such(url: str) -> None:
    assert is_url(url) and is_url(Path(url)), url
    with pytest.raises(UsageError, match="a URL"):
        check_local(url, "Advice.")
    with pytest.raises(UsageError, match="a URL"):
        check_local(Path(url), "Advice.")


OTHERS = (
    "run",
    "/a/b",
    "C:/run",
    "c:\\run",
    "a/s3://b",
    "rows:train",
    "owner/name",
    "",
    "é/x",
    ".",
    "nll + f('http://h/x')",
)


@pytest.mark.parametrize("name", OTHERS)
def test_other_names_are_not(name: str) -> None:
    assert not is_url(name) and not names_url(name)
    check_local(name, "Advice.")


def test_the_folder_that_an_earlier_release_made_of_a_url_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:/bucket/run").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"The folder of that name that is here: /.*/s3:/bucket/run"):
        check_local("s3://bucket/run", "Advice.")


SECRETS = ("s3://key:secret@bucket/run", "s3://b/k.jsonl?X-Amz-Signature=secret", "https://key:secret@host/x?a=secret")


@pytest.mark.parametrize("url", SECRETS)
def test_secrets_of_a_url_are_neither_taken_nor_shown(url: str) -> None:
    for told in (shown(url), shown(Path(url))):
        assert "secret" not in told and "key:" not in told, told
    with pytest.raises(UsageError) as refused:
        checked(url)
    assert "secret" not in str(refused.value) and "environment" in str(refused.value)


NOWHERE = {"s3://": "no bucket", "s3:///x": "no bucket", "s3:// /x": "no bucket", "s3://b/../x": "no paths"}


@pytest.mark.parametrize(("url", "says"), NOWHERE.items())
def test_urls_that_lead_nowhere(url: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        checked(url)


def test_what_a_url_is_made_of() -> None:
    assert checked("S3://Bucket/a b/é.jsonl") == ("s3", "Bucket/a b/é.jsonl")
    assert checked("hf://datasets/o/n@main/x.parquet") == ("hf", "datasets/o/n@main/x.parquet")
    assert checked("s3://b/part-?.jsonl") == ("s3", "b/part-?.jsonl")
    shapes = itertools.product(("s3://b", "s3:/b"), ("", "/", "/x"))
    assert {shown(head + tail) for head, tail in shapes} == {"s3://b", "s3://b/", "s3://b/x"}
