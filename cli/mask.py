"""alphatoken-curate mask: masks and loss weights again, from stored values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from alphatoken_curate.config import MaskConfig
from alphatoken_curate.rows.files import legible, visible
from alphatoken_curate.wording import chosen_by, pasted

from .grouped import Grouped
from .lines import tell_version
from .options import config_options, read_config
from .paths import RUN
from .told import first_row, older, summary

_EPILOG = """\b
--by takes a column of values/ (see `show --help`), row_id, position, token_id,
omega and margin of pairs, and
  surprise         nll / (entropy + 0.1): cost over what any token would cost
  reference_ratio  probability under the reference over the model's, at most 1
  random           a draw for each token, by --seed
or an expression of all but random, in a small part of SQL (sample_data/README.md):
--by "nll - reference_nll", --by "7 - surprise".
"""


@click.command(cls=Grouped, epilog=_EPILOG)
@click.argument("run", type=RUN)
@config_options(MaskConfig)
@click.pass_context
def command(ctx: click.Context, /, run: Path, **_: Any) -> None:
    """Make a mask again from the values stored in RUN: other shares, scopes, weights, columns or generations.

    Loads no model. Each choice of settings makes a new, numbered folder below RUN/train; none is ever replaced.
    """
    config = read_config(ctx, MaskConfig)

    from alphatoken_curate.masks.mask import mask

    from .terminal import listener as listening

    tell_version(run)
    with listening() as listener:
        made = mask(run, config, listener)
    verb = "Wrote" if made.created else "Already there:"
    click.echo(legible(f"{verb} mask {made.mask} in {made.path}/"))
    click.echo(f"  by      {visible(chosen_by(made.settings), 300)}")
    for line in summary(made):
        click.echo(line)
    if made.end_of_turn_tokens is None and config.always_keep == "end-of-turn":
        click.echo("          which tokens end an answer is not stored in this run: none is always kept")
    if not made.newest:
        for line in older(run, made.mask):
            click.echo(line)
    else:
        here = f"alphatoken-curate {{}} {legible(pasted(run))}"
        click.echo(f"Next: {here.format('show')} --row {first_row(run)}   or   {here.format('export')} --for trl")
