from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.runs import sealed
from alphatoken_curate.runs.atomic import atomic_file, digest
from alphatoken_curate.runs.fingerprint import canonical

TOLD = {"fields": {"seed": 1}, "facts": {}, "fingerprint": "x", "counts": {"rows": 3}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "x.parquet")


def written(path: Path, rows: int = 3, told: dict[str, object] | None = None) -> Path:
    schema = pa.schema([pa.field("n", pa.int64(), nullable=False, metadata={"units": "row"})])
    with atomic_file(path) as sink:
        sealed.write(sink, pa.table({"n": list(range(rows))}, schema=schema), told or TOLD)  # type: ignore[arg-type]
    return path


def about(path: Path) -> dict[str, object]:
    return sealed.opened(path, lambda file: sealed.about(path, file.metadata))


def changed(path: Path, key: str, value: object) -> None:
    """The same file with another entry in its footer."""
    table, stored = pq.read_table(path), dict(pq.read_metadata(path).metadata)
    stored[f"alphatoken_curate.{key}".encode()] = canonical(value)  # type: ignore[arg-type]
    stored.pop(b"ARROW:schema")
    pq.write_table(table.replace_schema_metadata(stored), path)


def test_the_footer_says_what_was_told_and_what_was_written(path: Path) -> None:
    found = about(path)
    assert {name: found[name] for name in TOLD} == TOLD
    assert (found["schema_version"], found["units"]) == (sealed.SCHEMA_VERSION, {"n": "row"})
    body = found["body"]
    assert isinstance(body, dict) and sealed.check_body(path, body) == digest(path)
    assert 0 < body["bytes"] < path.stat().st_size


def test_the_same_table_gives_the_same_bytes(path: Path) -> None:
    assert written(path.with_name("y")).read_bytes() == path.read_bytes()
    assert written(path.with_name("z"), told={**TOLD, "facts": {"note": "y"}}).read_bytes() != path.read_bytes()


@pytest.mark.parametrize(
    ("key", "value"), [("fields", {"seed": 2}), ("counts", {"rows": 4}), ("more", 1), ("seal", "")]
)
def test_a_changed_footer_breaks_the_seal(path: Path, key: str, value: object) -> None:
    changed(path, key, value)
    with pytest.raises(StoredDataError, match=r"x\.parquet: damaged \(its footer is not as it was written\)"):
        about(path)


def test_other_numbers_of_rows_are_seen(path: Path) -> None:
    written(path, rows=2)
    with pytest.raises(StoredDataError, match="its number of rows"):
        about(path)


def test_a_body_of_another_table_is_seen(path: Path) -> None:
    other = about(written(path.with_name("y.parquet"), rows=2, told={**TOLD, "counts": {"rows": 2}}))["body"]
    with pytest.raises(StoredDataError, match="its pages are not"):
        sealed.check_body(path, other)  # type: ignore[arg-type]


def test_files_of_others_and_none_at_all(path: Path) -> None:
    pq.write_table(pa.table({"n": [1]}), path)
    with pytest.raises(StoredDataError, match="not written by alphatoken-curate"):
        about(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(StoredDataError, match="damaged"):
        about(path)
    path.unlink()
    with pytest.raises(StoredDataError, match="missing"):
        about(path)


def test_other_schema_versions_are_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr(sealed, "SCHEMA_VERSION", 99)
        written(path)
    with pytest.raises(StoredDataError, match=r"schema version 99; this release reads 1, 2"):
        about(path)
