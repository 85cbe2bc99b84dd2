"""--help in groups, as the config classes have them."""

from __future__ import annotations

from typing import Any

import click

from alphatoken_curate.config import GROUPS

_OWN = GROUPS[-1]
"""The group of a command's own options."""

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""Settings of every command."""

_COLUMN = 24
"""Names of options that are longer stand on a line of their own."""


class Setting(click.Option):
    """An option made from a field of a config class; `group` is the field's."""

    def __init__(self, *args: Any, group: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.group = group


class Grouped(click.Command):
    """A command whose --help shows its options group by group, also where it is called without its parent."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **{"context_settings": HELP, **attributes})

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each group that has options."""
        options = [one for one in self.get_params(ctx) if isinstance(one, click.Option)]
        for group in GROUPS:
            own = (one.get_help_record(ctx) for one in options if getattr(one, "group", _OWN) == group)
            records = [record for record in own if record is not None]
            if records:
                with formatter.section(group):
                    formatter.write_dl(records, col_max=_COLUMN)
