"""alphatoken-curate mask: masks and loss weights again, from stored values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from alphatoken_curate.config import MaskConfig

from .options import config_options, read_config


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@config_options(MaskConfig)
@click.pass_context
def command(ctx: click.Context, /, run: Path, **_: Any) -> None:
    """Make a mask again from the values stored in RUN: other shares, scopes, weights or columns. Loads no model.

    Each choice of settings makes a new, numbered folder below RUN/train; none is ever replaced.
    """
    config = read_config(ctx, MaskConfig)

    from alphatoken_curate.score import mask

    made = mask(run, config)
    verb = "Wrote" if made.created else "Already there:"
    share = made.kept_tokens / max(1, made.response_tokens)
    click.echo(f"{verb} mask {made.mask} in {made.path}/")
    click.echo(f"  tokens  {made.kept_tokens:,} of {made.response_tokens:,} response tokens kept ({share:.1%})")
    if made.rows_given_back:
        click.echo(f"          {made.rows_given_back} rows that would have lost every token got their best one back")
    if not made.newest:
        click.echo("  Readers take the newest mask by default; name this one by its number.")
