"""--help of the commands that take settings."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import click
import pytest
from click.testing import CliRunner

from alphatoken_curate.cli.main import cli
from alphatoken_curate.config import GROUPS, MaskConfig, ScoreConfig

WIDTH = 80


def helped(command: str, width: int = WIDTH) -> str:
    return CliRunner().invoke(cli, [command, "--help"], terminal_width=width, catch_exceptions=False).output


def sections(text: str) -> dict[str, list[str]]:
    """The lines of each section, by its head; what stands below them all is left out."""
    parts = re.split(r"^(\w[\w ]*):\n", text, flags=re.MULTILINE)
    return {name: body.split("\n\n")[0].splitlines() for name, body in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.mark.parametrize(("command", "kind"), [("score", ScoreConfig), ("check", ScoreConfig), ("mask", MaskConfig)])
def test_each_setting_stands_in_its_group(command: str, kind: Any) -> None:
    found = sections(helped(command))
    there = {item.metadata["group"] for item in fields(kind)} | {"Running"}
    assert [name for name in found if name in GROUPS] == [group for group in GROUPS if group in there]
    for item in fields(kind):
        if item.name != "data":
            flag = f"  --{item.name.replace('_', '-')} "
            (group,) = [name for name, body in found.items() if any(f"{one} ".startswith(flag) for one in body)]
            assert group == item.metadata["group"], item.name
    assert any(line.startswith("  -h, --help") for line in found["Running"])


@pytest.mark.parametrize("command", ["score", "check", "mask"])
def test_each_option_takes_a_line_or_two(command: str) -> None:
    lines = [line for body in sections(helped(command)).values() for line in body]
    options = re.split(r"^  (?=-)", "\n".join(lines), flags=re.MULTILINE)[1:]
    assert len(options) > 10
    for option in options:
        name, *text = re.split(r"\n| {2,}(?=\S)", option.strip(), maxsplit=1)
        told = " ".join("".join(text).split())
        assert told and name
        lines = [line for line in option.rstrip().splitlines() if line[24:].strip()]
        behind = len(lines) - (0 if re.match(r"\S.*\S {2,}\S", option.splitlines()[0]) else 1)
        assert behind <= 2, option


def test_no_command_is_left_without_its_flags_in_help() -> None:
    for command, kind in (("score", ScoreConfig), ("mask", MaskConfig)):
        text = helped(command)
        for item in fields(kind):
            assert item.name == "data" or f"--{item.name.replace('_', '-')}" in text
    assert isinstance(cli, click.Group)
