"""Flags made from the config classes: one source of names, defaults, choices and help for flags and YAML keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from alphatoken_curate.config import MaskConfig, ScoreConfig, checked, is_from_before
from alphatoken_curate.settings import load_settings

from .grouped import Setting
from .paths import FILE

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=MaskConfig)

_METAVARS = {
    "keep": "SHARE|positive",
    "scope": "global|row|batch:N",
    "weights": "binary|rank|sigmoid|relu|tilt:C",
    "all_count": "K|all",
    "auto_count": "N|auto",
    "count": "N",
    "int": "N",
    "float": "X",
    "positive": "X",
    "generation": "latest|all|N,M",
    "device": "auto|cpu|cuda[:N,...]",
    "file": "FILE",
    "object": "JSON",
    "pairs": "COLUMN=NAME,...",
    "date": "YYYY-MM-DD",
    "betas": "B1,B2",
}


def config_options(kind: type[MaskConfig], only: tuple[str, ...] = ()) -> Callable[[F], F]:
    """A flag for every setting of a config class (or `only` some), and -c for a YAML file of them."""

    def add(function: F) -> F:
        for item in reversed(fields(kind)):
            if item.name != "data" and (not only or item.name in only):
                function = _flag(item)(function)
        return click.option("-c", "--config", type=FILE, help="YAML file of settings; flags win.")(function)

    return add


def read_config(ctx: click.Context, kind: type[C], data: tuple[str, ...] = ()) -> C:
    """The config of a command: defaults, then the YAML file, then the flags that were given."""
    path = ctx.params.get("config")
    names = {item.name for item in fields(kind)}
    settings = {} if path is None else load_settings(path)
    if is_from_before(settings):
        settings["always_keep"] = "none"
        if not _is_given(ctx, "always_keep"):
            click.echo(f"--config {path}: it is from before --always-keep, and read as --always-keep none.", err=True)
    given = {name: ctx.params[name] for name in names & ctx.params.keys() - {"data"} if _is_given(ctx, name)}
    settings |= given | ({"data": data} if data else {})
    if issubclass(kind, ScoreConfig) and not settings.get("data"):
        raise click.UsageError("Missing argument 'DATA...'. Name files, folders, globs or a dataset.", ctx)
    return checked(kind, settings, f"--config {path}")


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is not ParameterSource.DEFAULT


def _flag(item: Field[Any]) -> Callable[[F], F]:
    name = "--" + item.name.replace("_", "-")
    kind, choices = item.metadata["kind"], item.metadata["choices"]
    group = item.metadata["group"]
    if kind == "bool":
        return click.option(name, cls=Setting, group=group, is_flag=True, default=False, help=item.metadata["help"])
    return click.option(
        name,
        cls=Setting,
        group=group,
        type=click.Choice(choices) if choices else str,
        default=None if item.default is None else str(item.default),
        metavar=None if choices else _METAVARS.get(kind, "NAME"),
        show_default=item.default is not None,
        help=item.metadata["help"],
    )
