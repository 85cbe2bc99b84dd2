"""README.md of a run: a data set card that says what the columns mean and how to load them, made from the manifest."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import orjson
import pyarrow as pa

from alphatoken_curate.runs.atomic import atomic_file
from alphatoken_curate.runs.direction import rehearsed
from alphatoken_curate.runs.manifest import Manifest, Mask, components, layout
from alphatoken_curate.runs.schema import SIGNALS, Layout, lacks, units_of, with_units
from alphatoken_curate.runs.shards import Shard
from alphatoken_curate.wording import chosen_by, end_of_turn

NAME = "README.md"

_TRAIN_ROWS = {
    "sft": "scored rows, ready for a trainer.",
    "preference": "scored pairs; without their prefix the columns of a branch are those of SFT rows.",
}


def write(run: Path, manifest: Manifest) -> None:
    """Commit the card. Raises `CurateError` where the disk refuses."""
    with atomic_file(run / NAME) as sink:
        sink.write(render(manifest).encode())


def is_current(run: Path, manifest: Manifest) -> bool:
    """Whether the card is there and its configs name the newest mask and generation; more text may follow."""
    try:
        text = (run / NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    lines = front_matter(manifest)
    older = [line for line in lines if not line.startswith(_FILES)]  # cards did not say which files they are of
    return any(text.startswith("\n".join(known) + "\n") for known in (lines, older))


def render(manifest: Manifest) -> str:
    """The card's text: Markdown after a YAML front matter that `datasets.load_dataset(run)` reads."""
    return "\n".join([*front_matter(manifest), "", *_body(manifest)]) + "\n"


def front_matter(manifest: Manifest) -> list[str]:
    """Its lines: `train` (the newest mask, the default) and `values` (the newest generation)."""
    lines = ["---", "configs:"]
    if manifest.masks:
        newest = manifest.masks[-1]
        lines += _config("train", f"train/mask={newest.mask:04d}", newest.shards, default=True)
    if manifest.generations:
        scored = manifest.generations[-1]
        folder = f"values/generation={scored.generation}"
        lines += _config("values", folder, scored.shards, default=not manifest.masks)
    return [*lines, "---"]


def _config(name: str, folder: str, shards: Sequence[Shard], *, default: bool) -> list[str]:
    """`datasets` knows its copy of a folder by the folder's name and this text, so bytes are told apart here."""
    mark = ["  default: true"] if default else []
    data = [f"{_FILES}{digest_of(shards)}", "  data_files:", "  - split: train"]
    return [f"- config_name: {name}", *mark, *data, f'    path: "{folder}/part-*.parquet"']


_FILES = "  description: sha256 of its files "


def digest_of(shards: Sequence[Shard]) -> str:
    """One sha256 (hex) for the bytes of several files, by which `datasets` tells them from others at the same paths."""
    return sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()


def _body(manifest: Manifest) -> Iterator[str]:
    yield "# Token values, masks and loss weights"
    yield ""
    yield (
        "Made by alphatoken-curate with the AlphaToken method ([arXiv 2606.01635](https://arxiv.org/abs/2606.01635))."
        f" Every response token of the rows was given a value: {_meaning(manifest)}"
    )
    yield from ("", "## Rows and tokens", "", *_counts(manifest))
    columns = layout(manifest)
    answers = "rows" if columns.kind == "sft" and manifest.settings.get("turns") != "each" else "answers"
    for mask in manifest.masks[-1:]:
        yield from (
            "",
            f"Mask {mask.mask} (the default config, `train`): {_share(mask)};"
            f" {mask.rows_given_back:,} {answers} that had lost every token got their best one back.",
        )
    yield from ("", "## Generations and masks", "", *_generations(manifest))
    yield from ("", "## Loading", "", *_snippets(manifest))
    yield from ("", "## Columns", "", *_about_lists(columns, trained=rehearsed(manifest) is not None))
    yield from ("", f"`train`: {_TRAIN_ROWS[columns.kind]}", "", *_columns(_train(manifest, columns)))
    absent = set(SIGNALS) - set(components(manifest).signals)
    yield from ("", "`values`: every row read; lists of values are empty unless `status` is `scored`.")
    yield from (
        lacks(manifest.schema_version) or "The columns of other estimators are there too, and hold nulls alone.",
        "",
    )
    yield from _columns(columns.values, [prefix + name for prefix in columns.branches for name in absent])
    yield from ("", "## What was run", "", *_run(manifest))


def _meaning(manifest: Manifest) -> str:
    if (training := rehearsed(manifest)) is None:
        return "how much a training step on it helps the target task, and brings the model back toward its reference."
    return (
        "how much a larger loss weight on it helps the target task, and holds the model to what it knew, at the end of"
        f" a rehearsed training: {training}."
    )


def _train(manifest: Manifest, columns: Layout) -> pa.Schema:
    """The columns of the newest mask."""
    if not manifest.masks:
        return columns.train
    by, scale = (str(manifest.masks[-1].settings[name]) for name in ("by", "stability_scale"))
    return with_units(columns.train, units_of(by, scale, columns.unit))


_OMEGA = (
    "it is part of every value",
    "both are of the model as the training begins, and values go through the weights of every step",
)
"""What it has to do with values: of a gradient, and of a rehearsed training."""


def _about_lists(columns: Layout, *, trained: bool) -> Iterator[str]:
    if columns.kind == "sft":
        yield "Lists are aligned with `input_ids`: entry i speaks of predicting token i."
        return
    yield (
        "A row is a pair of answers. The columns that begin with `chosen_` are of the preferred answer, those with"
        " `rejected_` of the other; each `input_ids` holds the prompt too, and the lists of a branch are aligned with"
        " its `input_ids`: entry i speaks of predicting token i."
    )
    yield ""
    yield (
        "`margin` is beta times how much more the scored model prefers the chosen answer than the reference does: above"
        " 0 where it has moved the right way. `omega` = beta sigmoid(-margin) is the weight that the loss of DPO"
        f" gives to the pair's gradient; {_OMEGA[trained]}. Training on a chosen token makes it likelier, on a"
        " rejected token less likely, and the values say what that does. Each branch has a mask, weights and a share of"
        " kept tokens of its own."
    )


def _generations(manifest: Manifest) -> Iterator[str]:
    """In a fence, names as JSON: so a checkpoint's name cannot become Markdown, as no line of it starts a fence."""
    yield "A generation is one scoring of all rows, at a checkpoint. A mask is made from one or several of them."
    yield from ("", "```text")
    for one in manifest.generations:
        yield f"generation {one.generation}: checkpoint {orjson.dumps(one.checkpoint).decode()}"
    for mask in manifest.masks:
        several = "mean of generations" if len(mask.generations) > 1 else "generation"
        yield f"mask {mask.mask}: {several} {', '.join(map(str, mask.generations))}; {_share(mask)}"
    yield "```"


def _counts(manifest: Manifest) -> Iterator[str]:
    counts = manifest.counts
    yield "| | |"
    yield "|---|---:|"
    for name in ("read", "scored", "target", "failed", "rejected"):
        yield f"| rows {name} | {getattr(counts, name):,} |"
    if manifest.settings.get("turns") == "each" and counts.sequences is not None:
        yield f"| sequences scored, one for each answer | {counts.sequences:,} |"
    yield f"| tokens | {counts.tokens:,} |"
    yield f"| response tokens | {counts.response_tokens:,} |"
    yield f"| rows truncated | {counts.truncated_rows:,} |"
    yield f"| tokens cut off | {counts.truncated_tokens:,} |"
    for what, rows in manifest.told.items():
        yield f"| rows: {what} | {rows:,} |"


def _share(mask: Mask) -> str:
    share = f" ({mask.kept_tokens / mask.response_tokens:.1%})" if mask.response_tokens else ""
    by = f", by `{chosen_by(mask.settings)}`"
    told = end_of_turn(mask.end_of_turn_tokens, mask.end_of_turn_kept)
    ends = f"; {told}" if told else ""
    return f"{mask.kept_tokens:,} of {mask.response_tokens:,} response tokens train{share}{by}{ends}"


def _snippets(manifest: Manifest) -> Iterator[str]:
    parts = [(f"values/generation={one.generation}", one.shards) for one in manifest.generations[-1:]]
    parts = [(f"train/mask={one.mask:04d}", one.shards) for one in manifest.masks[-1:]] + parts
    train = parts[0][0] if parts else "values/generation=0"
    yield "In this folder, with polars:"
    yield from ("", "```python", "import polars as pl", "")
    yield f'pl.scan_parquet("{train}/*.parquet", hive_partitioning=False).collect()'
    yield from ("```", "", "a row per response token, with its text:", "", "```python")
    yield from ("from alphatoken_curate import scan_tokens", "", 'scan_tokens(".").collect()', "```")
    yield from (
        "",
        "with Hugging Face datasets, which tells its copies of other bytes apart by `description`:",
        "",
        "```python",
    )
    yield from ("from glob import escape", "from pathlib import Path", "from datasets import load_dataset", "")
    yield "here = escape(str(Path.cwd()))  # datasets reads *, ? and [ as patterns"
    for folder, shards in parts:
        files = f'data_files=f"{{here}}/{folder}/*.parquet", description="{digest_of(shards)[:16]}"'
        yield f'load_dataset("parquet", split="train", {files})'
    yield from ("```", "", "with DuckDB:", "", "```sql")
    yield f"SELECT * FROM read_parquet('{train}/*.parquet', hive_partitioning = false);"
    yield "```"


def _columns(schema: pa.Schema, absent: Collection[str] = ()) -> Iterator[str]:
    yield "| column | type | units | meaning |"
    yield "|---|---|---|---|"
    for column in filter(lambda one: one.name not in absent, schema):
        kind = f"list of {column.type.value_type}" if pa.types.is_list(column.type) else str(column.type)
        units, doc = (column.metadata[key].decode().replace("|", "\\|") for key in (b"units", b"doc"))
        yield f"| `{column.name}` | {kind} | {units} | {doc} |"


def _run(manifest: Manifest) -> Iterator[str]:
    """As JSON in a fence: names and paths of users cannot become Markdown there, as no line of it starts a fence."""
    about = {
        "inputs": manifest.inputs,
        "digests": manifest.digests,
        "settings": manifest.settings,
        "versions": manifest.versions,
        "generations": [{"generation": g.generation, "checkpoint": g.checkpoint} for g in manifest.generations],
        "masks": [{"mask": m.mask, "generations": m.generations, "settings": m.settings} for m in manifest.masks],
    }
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS
    yield from ("```json", orjson.dumps(about, option=options).decode(), "```")
