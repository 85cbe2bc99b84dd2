"""Read a dataset of the Hugging Face Hub as a stream of raw rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from alphatoken_curate.errors import InputError
from alphatoken_curate.models.releases import network_errors
from alphatoken_curate.rows.containers import Meter, RawRow, as_json, without_nulls
from alphatoken_curate.rows.files import DataFile, visible

_HUB_SECONDS = 5.0


@contextmanager
def _hub_or_cache(name: str) -> Iterator[None]:
    """Ask the Hub once whether it answers; where it does not, only what was downloaded before is looked at.

    Left to itself, `datasets` asks again and again for half a minute, and says so on our own output.
    """
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    offline = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(name, timeout=_HUB_SECONDS)
    except HfHubHTTPError:
        pass  # it answers, and will say what is wrong
    except network_errors():
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = offline


def hub_rows(file: DataFile, meter: Meter) -> Iterator[RawRow]:
    """Rows of a Hugging Face dataset; the digest is of the rows as JSON lines with sorted keys."""
    try:
        import datasets
    except ImportError as error:
        message = f"{file.path}: no such file; reading it from the Hub needs `pip install datasets`."
        raise InputError(message) from error
    name, _, split = file.path.partition(":")
    split = split or file.split or "train"
    options = {} if file.subset is None else {"name": file.subset}
    try:
        with _hub_or_cache(name):
            table = datasets.load_dataset(name, split=split, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        which = f"split {split!r}" if file.subset is None else f"subset {file.subset!r}, split {split!r}"
        advice = " Name one with --subset." if file.subset is None and "config" in str(error).lower() else ""
        raise InputError(
            f"{file.path}: no such file or folder, and the Hugging Face dataset {name!r} ({which})"
            f" cannot be read: {visible(str(error), 600)}{advice}"
        ) from error
    for number, row in enumerate(table):
        record = without_nulls(row)
        meter.take(as_json(record).encode(errors="surrogatepass") + b"\n")
        yield RawRow(number + 1, record, record)
