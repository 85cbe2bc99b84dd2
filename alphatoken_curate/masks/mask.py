"""`mask`: masks and loss weights again, from stored values, and the card that names the newest."""

from __future__ import annotations

from pathlib import Path

from alphatoken_curate.config import MaskConfig
from alphatoken_curate.errors import UsageError
from alphatoken_curate.masks.remask import MaskSummary, make_mask
from alphatoken_curate.progress import Progress, Silent
from alphatoken_curate.runs import card, manifest
from alphatoken_curate.runs.atomic import one_writer
from alphatoken_curate.runs.folder import check_is_run
from alphatoken_curate.runs.manifest import Manifest


def mask(run: Path | str, config: MaskConfig, progress: Progress | None = None) -> MaskSummary:
    """Make masks and loss weights again from stored values: no model, seconds. See `MaskConfig` for the choices."""
    folder = Path(run)
    check_is_run(folder)
    listener = progress or Silent()
    with one_writer(folder, listener.warn):
        mend(folder, listener)
        return mask_and_card(folder, config, stale=False)[0]


def mask_and_card(run: Path, config: MaskConfig, *, stale: bool) -> tuple[MaskSummary, Manifest]:
    """Make the mask, then the card where it is `stale` or names another mask. Callers hold the run.

    The card is made, too, where the values give no such mask: they stay. Raises as `make_mask`.
    """
    try:
        made = make_mask(run, config)
    except UsageError as error:
        _write_card(run, stale=stale)
        told = " The values are scored and stay: give the mask other settings, by `alphatoken-curate mask`."
        raise (UsageError(f"{str(error).rstrip('.')}.{told}") if stale else error) from error
    return made, _write_card(run, stale=stale)


def _write_card(run: Path, *, stale: bool) -> Manifest:
    stored = manifest.read(run)
    if stale or not card.is_current(run, stored):
        card.write(run, stored)
    return stored


def mend(run: Path, progress: Progress) -> None:
    """Make a damaged manifest anew from the shards, and say so. Callers hold the run."""
    if told := manifest.mend(run):
        progress.warn(told)
