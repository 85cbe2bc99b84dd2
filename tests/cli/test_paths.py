"""Folders and files that options name."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import small_run
from tiny_files import command, token_records, write_jsonl


def test_a_tilde_is_the_home_folder_in_every_setting(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell writes out only one that begins a word: not that of --option=~/x, and none of a YAML file."""
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(away)
    (home / "model").symlink_to(models["base"])
    for name, seed in (("d", 1), ("t", 2), ("r", 3)):
        write_jsonl(home / f"{name}.jsonl", token_records(4, seed=seed))
    places = "model: ~/model\nreference: ~/model\ndata: ~/d.jsonl\ntarget: ~/t.jsonl\nretention: ~/r.jsonl\n"
    (home / "c.yaml").write_text(places)
    for more in ((), ("--reuse=~/one",)):
        ended = command("score", "--config=~/c.yaml", "--layers=1", f"--output=~/{'two' if more else 'one'}", *more)
        assert ended.code == 0, ended.err
    assert f"target: {home}/t.jsonl" in (home / "one" / "config.yaml").read_text()
    small_run(home / "run")
    for arguments in (
        ("stats", "~/run", "--svg=~/x.svg"),
        ("report", "~/run", "--output=~/x.html"),
        ("export", "~/run", "--for=trl", "--output=~/x"),
        ("refresh", "~/one", "--checkpoint=~/model", "--base=~/model"),
    ):
        ended = command(*arguments)
        assert ended.code == 0, ended.err
    assert {path.name for path in home.iterdir()} >= {"one", "two", "x", "x.svg", "x.html"} and not list(away.iterdir())


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "flag", ["--model", "--reference", "--target", "--retention", "--fisher", "--chat-template", "--reuse", "--config"]
)
def test_a_tilde_of_nobody_is_a_name_like_others(flag: str, models: dict[str, str], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", token_records(4))
    model = () if flag == "--model" else ("--model", models["base"])
    ended = command("score", data, *model, f"{flag}=~no-such-user/x", "-o", tmp_path / "run")
    assert ended.code in (2, 3) and "~no-such-user/x" in ended.err and not (tmp_path / "run").exists()
    ended = command("refresh", small_run(tmp_path / "small"), "--checkpoint=~no-such-user/x")
    assert ended.code in (2, 4) and "Traceback" not in ended.err
