"""`export`: the rows of a mask as files that another trainer reads: derived, checked, with their origin beside them.

The folder appears at its name by one rename, once all of it was written and read back: there is never half of one. What
a killed export leaves is a hidden folder beside it, `.NAME.*.tmp`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from alphatoken_curate.errors import CurateError, UsageError
from alphatoken_curate.exports import hf, llamafactory, messages, shifted, swift, unshifted
from alphatoken_curate.exports.form import Asked, Dropped, Form, Items, Kept, Told, batched
from alphatoken_curate.exports.guide import DROPPED, README, RECORD, readme, record
from alphatoken_curate.exports.settle import Tally, counted, settled
from alphatoken_curate.reading.trainset import TrainSet, open_train
from alphatoken_curate.runs.atomic import Sink, atomic_file, digest
from alphatoken_curate.runs.direction import dpo_beta
from alphatoken_curate.runs.fingerprint import Json
from alphatoken_curate.runs.folder import destination
from alphatoken_curate.wording import nearest

FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (hf.FORM, llamafactory.FORM, swift.FORM, *shifted.FORMS, *unshifted.FORMS, messages.FORM)
}
"""By the name that --for takes."""

ALIASES: Mapping[str, tuple[str, bool, bool]] = {
    "trl": ("hf", False, True),
    "unsloth": ("hf", False, False),
    "axolotl": ("hf", True, False),
    "together": ("hf", True, False),
}
"""Other names that --for takes: the form each stands for, whether that is `strict`, and whether it reads pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSummary:
    """What was written: `data` is the file or folder for the trainer; tokens are of both branches of pairs."""

    path: Path
    data: Path
    trainer: str
    mask: int
    rows: int
    tokens: int
    trained_tokens: int
    weight_sum: float
    soft: bool
    cut_rows: int
    cut_tokens: int
    answers: int
    answers_trained: int
    """Messages that respond, and those of them with weight 1; 0 but for `jsonl-weights`."""
    dropped: Mapping[str, int]
    """Rows left out, by reason (`exports.form.REASONS`)."""


def export(
    run: str | Path,
    *,
    trainer: str,
    output: str | Path,
    mask: int | None = None,
    max_length: int | None = None,
    strict: bool = False,
    binarize: bool = False,
) -> ExportSummary:
    """Write the rows of a mask (default: the newest) for `trainer` into the new folder `output`.

    `trainer`: a key of `FORMS` or of `ALIASES`.

    `max_length`: longer rows are cut at the end, with their weights; those left with nothing to train are dropped and
    named. `strict`: of `hf` only the columns that every reader takes. `binarize`: weights above 0 become 1. The same
    run and settings give the same bytes; memory is a shard at a time. Raises `UsageError` for a trainer that is not
    known or has no form for these rows or weights, and where `output` is there and not empty; `StoredDataError` for a
    damaged run; `CurateError` where the disk refuses or does not give back what was written.
    """
    name, always_strict, pairs = ALIASES.get(trainer, (trainer, False, True))
    form, place, strict = _form(name), destination(Path(output)), strict or always_strict
    opened = open_train(run, mask)
    if opened.layout.kind == "preference" and not (pairs and form.pairs):
        raise _no_pairs(opened.run, trainer)
    _check_asked(form, max_length, strict=strict)
    _check_place(place, opened.run)
    asked = Asked(layout=opened.layout, strict=strict)
    settings: dict[str, Json] = {"max_length": max_length, "strict": strict, "binarize": binarize}

    def items() -> Items:
        rows = settled(opened, form, asked, max_length=max_length, binarize=binarize)
        return rows if form.refine is None else form.refine(rows, opened)

    with _whole_folder(place) as folder:
        tally = _write(folder, form, items(), asked)
        if not tally.rows:
            raise UsageError(f"{opened.run}: no row of mask {opened.mask.mask} can be written: {_why(tally)}.")
        _check(folder, form, items(), asked, tally)
        told = _told(place, opened, tally, strict=strict)
        files = {path: _file(folder, path) for path in folder.rglob("*") if path.is_file()}
        data = str(files[folder / form.data]["sha256"]) if folder / form.data in files else ""
        _write_text(folder / README, readme(form, told, tally, opened, settings, data).encode())
        files[folder / README] = _file(folder, folder / README)
        about = record(form, tally, opened, settings) | {"files": [files[path] for path in sorted(files)]}
        _write_text(folder / RECORD, orjson.dumps(about, option=_JSON))
    return _summary(place, form, opened, tally)


def _told(place: Path, opened: TrainSet, tally: Tally, *, strict: bool) -> Told:
    settings, kind = opened.stored.settings, opened.layout.kind
    return Told(
        place=str(place),
        kind=kind,
        strict=strict,
        soft=tally.soft,
        longest=tally.longest,
        beta=dpo_beta(settings),
        by_sum=kind == "sft" and settings.get("rehearse_denominator") == "sum",
    )


_JSON = orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE


def _form(trainer: str) -> Form:
    if trainer not in FORMS:
        names = (*FORMS, *ALIASES)
        raise UsageError(f"trainer: found {trainer!r}.{nearest(trainer, names)} Give one of {', '.join(names)}")
    return FORMS[trainer]


def _no_pairs(run: Path, trainer: str) -> UsageError:
    able = ", ".join(name for name, form in FORMS.items() if form.pairs)
    return UsageError(
        f"{run}: holds preference pairs, and {trainer} has no form for pairs with token masks."
        f" Export them --for {able}, or score SFT rows."
    )


def _check_asked(form: Form, max_length: int | None, *, strict: bool) -> None:
    if strict and form is not hf.FORM:
        raise UsageError(f"--strict is for --for hf; {form.name} has one form alone. Leave it out.")
    if max_length is not None and max_length < 2:
        raise UsageError(f"--max-length {max_length}: give at least 2; one token alone is predicted by nothing.")


def _check_place(place: Path, run: Path) -> None:
    if run.resolve() in (place.resolve(), *place.resolve().parents):
        raise UsageError(f"{place}: lies in the run folder, which holds nothing but the run. Name another folder.")
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise UsageError(f"{place}: is there and is no folder. Name another place.")
    if place.is_dir() and any(place.iterdir()):
        raise UsageError(f"{place}: is there and not empty; nothing is overwritten. Name a new folder, or remove it.")


def _write(folder: Path, form: Form, items: Items, asked: Asked) -> Tally:
    """The trainer's files, and the list of the rows left out where there are some."""
    tally = Tally()
    with atomic_file(folder / DROPPED) as sink:
        form.write(folder, batched(counted(items, tally, lambda row: _tell(sink, row))), asked)
    if not tally.dropped:
        (folder / DROPPED).unlink()
    return tally


def _tell(sink: Sink, row: Dropped) -> None:
    sink.write(orjson.dumps(asdict(row), option=orjson.OPT_APPEND_NEWLINE))


def _check(folder: Path, form: Form, items: Items, asked: Asked, written: Tally) -> None:
    """Read back what was written, beside the run read once more."""
    again = Tally()
    rows: Iterator[Kept] = counted(items, again)
    form.check(folder, rows, asked)
    if again != written:
        raise CurateError(f"{folder}: the run gave other rows when it was read again; run `verify`")


def _why(tally: Tally) -> str:
    found = ", ".join(f"{reason} {count}" for reason, count in sorted(tally.dropped.items()))
    return f"all are dropped ({found})" if found else "it has none"


def _write_text(path: Path, content: bytes) -> None:
    with atomic_file(path) as sink:
        sink.write(content)


def _file(folder: Path, path: Path) -> dict[str, Json]:
    size, sha256 = digest(path)
    return {"path": path.relative_to(folder).as_posix(), "bytes": size, "sha256": sha256}


def _summary(place: Path, form: Form, opened: TrainSet, tally: Tally) -> ExportSummary:
    return ExportSummary(
        path=place,
        data=place / form.data if form.data != llamafactory.SPLIT else place,
        trainer=form.name,
        mask=opened.mask.mask,
        rows=tally.rows,
        tokens=tally.tokens,
        trained_tokens=tally.trained_tokens,
        weight_sum=tally.weight_sum,
        soft=tally.soft,
        cut_rows=tally.cut_rows,
        cut_tokens=tally.cut_tokens,
        answers=tally.answers,
        answers_trained=tally.answers_trained,
        dropped=dict(sorted(tally.dropped.items())),
    )


@contextlib.contextmanager
def _whole_folder(place: Path) -> Iterator[Path]:
    """A folder beside `place` that takes its name when the block ends, and is gone where an exception ends it."""
    temporary = place.absolute().with_name(f".{place.absolute().name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        try:
            if place.is_dir():
                place.rmdir()
            os.rename(temporary, place)
        except OSError as error:
            raise CurateError(f"{place}: cannot be made ({error.strerror}); name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
