"""The README and the record beside an export: how to use it, what is in it, what is not and why, where it is from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from alphatoken_curate.exports.form import IN_WORDS, REASONS, Form, Told
from alphatoken_curate.exports.settle import Tally
from alphatoken_curate.reading.trainset import TrainSet
from alphatoken_curate.runs.fingerprint import Json
from alphatoken_curate.runs.folder import EXPORT
from alphatoken_curate.wording import count

RECORD, README, DROPPED = EXPORT, "README.md", "dropped.jsonl"


def readme(form: Form, told: Told, tally: Tally, opened: TrainSet, settings: Mapping[str, Json], sha256: str) -> str:
    """README.md of an export; `sha256` is that of its data, where they are one file."""
    lines = [
        *_head(form, told, sha256),
        *_use(form, told),
        *_what(form, told, tally),
        *_simpo(opened),
        *_rows(tally, settings),
    ]
    return "\n".join([*lines, *_origin(opened), ""])


def _head(form: Form, told: Told, sha256: str) -> Iterator[str]:
    reader = (form.reader_of_pairs if told.kind == "preference" else None) or form.reader
    if form.data.endswith((".parquet", ".jsonl")):
        # So that `load_dataset` of the folder finds the rows and not the record beside them; it knows its copy of them
        # by the folder's name and this text.
        yield from ("---", "configs:", "- config_name: default", f"  description: sha256 {sha256}")
        yield from (f"  data_files: {json.dumps(form.data)}", "---", "")
    yield from (f"# Tokens to train, for {reader}", "")
    yield f"Written by `alphatoken-curate export --for {form.name}` and read back before it appeared."


def _use(form: Form, told: Told) -> Iterator[str]:
    yield from ("", "## Use", "", *form.use(told))
    if form.beware:
        yield from ("", *(f"- {sentence}" for sentence in form.beware))
    versions = checked_against(form, told.kind)
    yield from ("", "The form was checked against: " + "; ".join(f"{n} {how}" for n, how in versions.items()) + ".")


def checked_against(form: Form, kind: str) -> dict[str, str]:
    """Trainers that read rows of this kind, and the version whose form this is."""
    names = form.checked_pairs if kind == "preference" and form.checked_pairs is not None else form.checked
    return {name: form.checked[name] for name in names}


def _what(form: Form, told: Told, tally: Tally) -> Iterator[str]:
    yield from ("", "## What is in it", "", *form.columns(told), "")
    yield IN_WORDS[form.alignment] if form.cuts else "Tokens are not in these files; weights are those of messages."
    mean = tally.weight_sum / tally.trained_tokens
    kind = "not all 0 or 1" if told.soft else "0 or 1"
    yield ""
    yield (
        f"Weights are {kind}: {tally.trained_tokens:,} of {tally.tokens:,} tokens are to train, with a sum of weights"
        f" of {tally.weight_sum:,.6g} and a mean of {mean:.6g}. In the run the mean over all trainable tokens is 1, so"
        " that a loss divided by their count and one divided by the sum of weights agree on average."
    )
    if form.pairs and told.kind == "preference":
        yield _PAIRS
    else:
        yield f"The loss is divided by {form.divides}."
    if tally.answers:
        yield f"Of {count(tally.answers, 'answer')}, {tally.answers_trained:,} are to train."


_PAIRS = (
    "DPO divides by nothing: it sums the log-probabilities of an answer, in the policy and in the reference, and a"
    " masked token must leave both. Masks shorten the sums, so the same beta means a smaller margin."
)


def _simpo(opened: TrainSet) -> Iterator[str]:
    settings = opened.stored.settings
    if (gamma := settings.get("rehearse_simpo")) is None:
        return
    told = f"`beta={settings['beta']}, simpo_gamma={gamma}`"
    yield ""
    yield (
        f"The values are of a training by SimPO ({told}). This one is by DPO unless you write SimPO's loss yourself. "
        + _MEANS[str(settings["rehearse_denominator"])]
    )


_MEANS = {
    "count": "Its means are over all response tokens, also those of weight 0: sum w log p over the tokens of an answer,"
    " and divide by how many respond (`response` in values/). Labels of -100, as in TRL's `CPOTrainer`, would divide by"
    " those that are left.",
    "sum": "Its means are over the tokens that are left: a token of weight 0 leaves the mean over its answer, as labels"
    ' of -100 do in `trl.experimental.cpo.CPOTrainer` (`loss_type="simpo", cpo_alpha=0.0`).',
}
"""By `rehearse_denominator`."""


def _rows(tally: Tally, settings: Mapping[str, Json]) -> Iterator[str]:
    yield from ("", "## Rows", "", f"- {count(tally.rows, 'row')} written, in the order of the run (`row_id`)")
    if tally.cut_rows:
        most = settings["max_length"]
        yield f"- {count(tally.cut_rows, 'row')} cut at the end to {most} tokens, {tally.cut_tokens:,} tokens in all"
    for reason, number in sorted(tally.dropped.items()):
        yield f"- {count(number, 'row')} dropped, `{reason}`: {REASONS[reason]}"
    yield f"- each of those dropped is named in `{DROPPED}`" if tally.dropped else "- none dropped"


def _origin(opened: TrainSet) -> Iterator[str]:
    mask, digests = opened.mask, opened.stored.digests
    yield from ("", "## Where it is from", "")
    yield f"- run `{run_fingerprint(opened)}`"
    yield f"- mask {mask.mask} `{mask.fingerprint}`"
    if digests.get("tokenizer") == _EMPTY:
        yield f"- token ids as they were given, scored by {scored_model(opened)}: train a model of the same tokens"
    else:
        yield (
            f"- tokens of the tokenizer of {scored_model(opened)}: train that model, or one with the same tokenizer"
            f" (`{digests.get('tokenizer')}`, chat template `{digests.get('template')}`)"
        )
    yield from ("", f"`{RECORD}` has the settings of the mask, all counts, and the digest of every file.")


_EMPTY = f"sha256:{hashlib.sha256().hexdigest()}"
"""What a folder without a tokenizer has as its digest."""


def scored_model(opened: TrainSet) -> str:
    """Name of the model that the run was begun with, as Markdown: it is a user's own, and may hold anything."""
    name = json.dumps(opened.stored.generations[0].checkpoint, ensure_ascii=False).strip('"')
    return f"`{name.replace('`', '?')}`"


def run_fingerprint(opened: TrainSet) -> str:
    """That of the newest generation the mask was made of."""
    known = {one.generation: one.fingerprint for one in opened.stored.generations}
    return known[opened.mask.generations[-1]]


def record(form: Form, tally: Tally, opened: TrainSet, settings: Mapping[str, Json]) -> dict[str, Any]:
    """export.json, without `files`."""
    mask = opened.mask
    known = {one.generation: one for one in opened.stored.generations}
    return {
        "trainer": form.name,
        "kind": opened.layout.kind,
        "alignment": form.alignment,
        "checked_against": checked_against(form, opened.layout.kind),
        "settings": dict(settings),
        "run": {
            "fingerprint": run_fingerprint(opened),
            "model": opened.stored.generations[0].checkpoint,
            "generations": [
                {"generation": n, "checkpoint": known[n].checkpoint, "fingerprint": known[n].fingerprint}
                for n in mask.generations
            ],
            "digests": dict(opened.stored.digests),
            "inputs": [{"source": one.source, "digest": one.digest} for one in opened.stored.inputs],
        },
        "mask": {"mask": mask.mask, "fingerprint": mask.fingerprint, "settings": dict(mask.settings)},
        "rows": {
            "read": sum(shard.rows for shard in mask.shards),
            "written": tally.rows,
            "cut": tally.cut_rows,
            "dropped": dict(sorted(tally.dropped.items())),
        },
        "tokens": {
            "written": tally.tokens,
            "trained": tally.trained_tokens,
            "cut": tally.cut_tokens,
            "longest": tally.longest,
        },
        "weights": {"sum": tally.weight_sum, "soft": tally.soft},
        "answers": {"all": tally.answers, "trained": tally.answers_trained} if tally.answers else None,
    }
