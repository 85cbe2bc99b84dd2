"""Whether a run is finished already: told from files and settings alone, without torch, a tokenizer or the rows.

The fingerprint fields that follow from settings and files are compared with the run's; the date that a template writes
is that of the run, where none is given. Those of tokens follow from them for equal versions of the libraries that made
them. Where anything is in doubt the answer is no, and the scoring itself finds out, and
says, what there is to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.errors import CurateError
from alphatoken_curate.masks.mask import mask_and_card
from alphatoken_curate.models.load import ModelSource, find_model, model_config
from alphatoken_curate.progress import Progress, Silent
from alphatoken_curate.rows.files import DataFile, find_files
from alphatoken_curate.runs import manifest, shards
from alphatoken_curate.runs.atomic import digest, one_writer
from alphatoken_curate.runs.fingerprint import Json, differing
from alphatoken_curate.runs.manifest import File, Manifest
from alphatoken_curate.scoring.folder import ScoreSummary, counts_of, is_as_named, of_its_own
from alphatoken_curate.scoring.identity import (
    OF_TOKENS,
    Named,
    dated,
    fields_of,
    has_stability,
    tokens_are_digested,
    versions,
)

_SMALL_BYTES = 1 << 20


def finished(config: ScoreConfig, run: Path, progress: Progress | None = None) -> ScoreSummary | None:
    """The summary of a run that was scored with these settings and inputs, its mask made anew where that is another.

    None where it was not, or where that takes more to find out. `auto` stands for the dtype and device of the run.
    """
    if not (run / manifest.NAME).is_file():
        return None
    try:
        fields = _same_fields(config, run, manifest.read(run))
    except (CurateError, OSError):
        return None  # the scoring meets it too, and says so
    if fields is None:
        return None
    with one_writer(run, (progress or Silent()).warn):
        mask, now = mask_and_card(run, of_its_own(run, config), stale=False)
    return ScoreSummary(
        run=run,
        manifest=now,
        counts=counts_of(run, now, 0),
        mask=mask,
        shards_scored=0,
        has_stability=has_stability(fields),
    )


def _same_fields(config: ScoreConfig, run: Path, stored: Manifest) -> Mapping[str, Json] | None:
    """The fingerprint fields of the run's first generation, where these settings and inputs have the same."""
    if not stored.generations or not stored.counts.scored or (stored.counts.rejected and config.bad_rows == "refuse"):
        return None
    footer = shards.read_footer(run / stored.generations[0].shards[0].path)
    if not _is_whole(run, stored, footer.fields):
        return None
    made = footer.facts["versions"]
    if not isinstance(made, Mapping) or versions(str(made["device"])) != made:
        return None
    model = find_model(config.model)
    if _is_in_doubt(config, model):
        return None
    if (named := _named(config, model, footer.fields, stored.counts.read)) is None:
        return None
    dtype = str(footer.fields["dtype"]) if config.dtype == "auto" else config.dtype
    now = fields_of(dated(config, footer.fields), named, kind=str(footer.fields["kind"]), dtype=dtype)
    return footer.fields if set(differing(footer.fields, now)) <= set(OF_TOKENS) else None


def _is_in_doubt(config: ScoreConfig, model: ModelSource) -> bool:
    """Whether the scoring may refuse what is named, or make other tokens of it, though no digest differs."""
    needs_code = not config.trust_remote_code and not model.gguf and bool(model_config(model).get("auto_map"))
    return needs_code or config.device not in ("auto", "cpu") or not tokens_are_digested(model)


def _is_whole(run: Path, stored: Manifest, fields: Mapping[str, Json]) -> bool:
    """Whether what the manifest names is as it was written.

    Of the first scoring's shards the footers are looked at, and all bytes of those that were touched since then.
    """
    if not all(_is_as_written(run, file) for file in stored.files):
        return False
    first = stored.generations[0]
    paths = shards.listed(shards.values_folder(run, first.generation))
    if first.generation or [*paths] != [*range(len(first.shards))]:
        return False
    for index, path in paths.items():
        shards.check_fields(path, shards.read_footer(path), fields)
        if not is_as_named(run, path, first.shards[index]):
            return False
    return True


def _is_as_written(run: Path, file: File) -> bool:
    """Of large files their size is looked at, as the scoring does of artefacts that it needs no more."""
    small = file.bytes <= _SMALL_BYTES
    return manifest.file_of(run, file.path) == file if small else (run / file.path).stat().st_size == file.bytes


def _named(config: ScoreConfig, model: ModelSource, fields: Mapping[str, Json], read: int) -> Named | None:
    """Files and models as they are now; None where rows are not on this machine: only reading tells of them."""
    found = find_files(config.data, config.subset, config.split)
    known = fields["data"]
    if not all(file.is_local for file in found) or not isinstance(known, list):
        return None
    if config.limit == read:
        found = found[: len(known)]  # the limit was reached in the last of these
    sides = [_digests(name) for name in (config.target, config.retention, config.fisher_prompts)]
    return Named(
        data=[[file.source, _digest(file)] for file in found],
        model=model,
        reference=model if config.reference in (None, config.model) else find_model(str(config.reference)),
        target=sides[0],
        retention=sides[1],
        prompts=sides[2],
    )


def _digests(name: str | None) -> list[str] | None:
    return None if name is None else [_digest(file) for file in find_files([name])]


def _digest(file: DataFile) -> str:
    """As a reading of the rows gives it (`InputFile`); of others than local files nothing is known."""
    return f"sha256:{digest(Path(file.path))[1]}" if file.is_local else ""
