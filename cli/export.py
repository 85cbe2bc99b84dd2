"""alphatoken-curate export: a run as files that another trainer reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from alphatoken_curate.wording import count, nearest

from .lines import tell_version
from .paths import OUT, RUN
from .told import a_pattern

TRAINERS = (
    "trl",
    "unsloth",
    "axolotl",
    "together",
    "hf",
    "llamafactory",
    "ms-swift",
    "levanter",
    "tinker",
    "megatron",
    "verl",
    "skyrl",
    "jsonl-weights",
)

_HELP = """Write the rows of the run folder RUN, with their mask and weights, as files that another trainer reads.

\b
trl, unsloth   files that transformers reads too, by their own name: hf
axolotl        the same with --strict, as together
llamafactory   LLaMA-Factory, from tokenized_path
ms-swift       ms-swift, JSON lines
levanter, tinker, megatron, verl, skyrl
jsonl-weights  OpenAI, Mistral, Fireworks: weights of messages and of rows

The folder gets a README with the config lines to use, and export.json with origin, counts and digests. Preference
pairs: hf, llamafactory, ms-swift and tinker.
"""


class _Trainer(click.Choice[str]):
    """One of `TRAINERS`; of another name that is near is told."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """What click says, and the name that was meant."""
        return super().get_invalid_choice_message(value, ctx) + nearest(str(value), TRAINERS)


@click.command(name="export", help=_HELP)
@click.argument("run", type=RUN)
@click.option("--for", "trainer", type=_Trainer(TRAINERS), required=True, help="Who is to read the files.")
@click.option(
    "-o", "--output", type=OUT, metavar="DIR", help="A new folder for them. Default: RUN's name with TRAINER's: a.trl."
)
@click.option("--mask", type=int, metavar="N", help="The mask to export. Default: the newest.")
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    metavar="N",
    help="Cut longer rows at the end, weights too (jsonl-weights drops them).",
)
@click.option("--strict", is_flag=True, help="Of hf: input_ids, attention_mask and labels alone (Axolotl, Together).")
@click.option("--binarize", is_flag=True, help="Make every weight above 0 a 1, for trainers that destroy other ones.")
def command(run: Path, trainer: str, output: Path | None, **asked: Any) -> None:
    """Export, and say what was written."""
    from alphatoken_curate.exports.export import export

    tell_version(run)
    place = output or Path(f"{run.resolve().name.removesuffix('.alphatoken')}.{trainer}")
    done = export(run, trainer=trainer, output=place, **asked)
    own = "" if done.trainer == trainer else f" ({done.trainer})"
    click.echo(f"Wrote {done.path}/ for {trainer}{own}, of mask {done.mask}")
    for line in _summary(done):
        click.echo(line)


def _summary(done: Any) -> Iterator[str]:
    yield f"  rows     {done.rows:,}"
    yield (
        f"  tokens   {done.tokens:,}, of which {done.trained_tokens:,} train; sum of weights {done.weight_sum:,.6g}"
        f"{'' if done.soft else ' (all 0 or 1)'}"
    )
    if done.soft:
        yield "  weights  not all 0 or 1: README.md says which of its trainers weigh by them"
    if done.answers:
        yield f"  answers  {done.answers:,}, of which {done.answers_trained:,} have weight 1"
    if done.cut_rows:
        yield f"  cut      {count(done.cut_rows, 'row')}, {count(done.cut_tokens, 'token')}"
    told = ", ".join(f"{reason} {number:,}" for reason, number in done.dropped.items())
    rows = count(sum(done.dropped.values()), "row")
    yield f"  dropped  {rows}{f': {told}; see {done.path}/dropped.jsonl' if told else ''}"
    yield from (f"  data     {done.data}", *a_pattern(done.path), f"Next: the config lines in {done.path}/README.md")
