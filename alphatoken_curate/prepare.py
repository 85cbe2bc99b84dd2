"""From what a user named to what a run will do: rows, tokens, target rows, digests. No model is loaded here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alphatoken_curate.chat import Tokenizer
from alphatoken_curate.config import FISHER_MODES, ScoreConfig
from alphatoken_curate.draws import keyed_uniform
from alphatoken_curate.errors import InputError, UsageError
from alphatoken_curate.fingerprint import Json
from alphatoken_curate.models import (
    ModelSource,
    digest_files,
    find_model,
    load_tokenizer,
    model_config,
    model_digest,
    tokenizer_digest,
)
from alphatoken_curate.rows import BadRow, InputFile, read_rows, refuse
from alphatoken_curate.schema import SCHEMA_VERSION
from alphatoken_curate.tokens import TokenRow, tokenise

_TARGET_DRAW = -1
_FISHER_DRAW = -2
"""Positions under which the draws of whole rows are keyed; no token has a negative one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """All that is known before a model is loaded."""

    config: ScoreConfig
    source: ModelSource
    tokenizer: Tokenizer | None
    files: list[InputFile]
    rows_read: int
    rows: list[TokenRow]
    """Rows to score, by row_id."""
    held_out: list[TokenRow]
    """Rows of DATA set aside as target; empty where --target was given."""
    target: list[TokenRow]
    """Target rows, wherever they come from."""
    target_files: list[InputFile]
    bad: list[BadRow]
    """Bad rows of DATA, by row_id."""


def prepare(config: ScoreConfig) -> Prepared:
    """Read, check and tokenise everything. InputError names all bad rows at once, unless they are quarantined."""
    source = find_model(config.model)
    tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
    vocabulary = _vocabulary(source, tokenizer)

    def read(names: Sequence[str]) -> tuple[list[TokenRow], list[BadRow], list[InputFile]]:
        found = read_rows(names)
        good, unusable = tokenise(
            found.rows, tokenizer, max_length=config.max_length, turns=config.turns, vocab_size=vocabulary
        )
        return good, sorted([*found.bad, *unusable], key=lambda bad: bad.row_id), found.files

    rows, bad, files = read(config.data)
    rows_read = len(rows) + len(bad)
    target, target_bad, target_files = read([config.target]) if config.target is not None else ([], [], [])
    if target_bad or (bad and config.bad_rows == "refuse"):
        raise refuse([*(bad if config.bad_rows == "refuse" else []), *target_bad], can_quarantine=not target_bad)
    if not rows:
        raise InputError(f"{', '.join(config.data)}: none of its {len(bad)} rows can be scored. Run check to see why.")
    held_out: list[TokenRow] = []
    if config.target is None:
        held_out = hold_out(rows, config.target_rows, config.seed)
        taken = {row.row_id for row in held_out}
        rows = [row for row in rows if row.row_id not in taken]
        target = held_out
    return Prepared(
        config=config,
        source=source,
        tokenizer=tokenizer,
        files=files,
        rows_read=rows_read,
        rows=rows,
        held_out=held_out,
        target=target,
        target_files=target_files,
        bad=bad,
    )


def hold_out(rows: Sequence[TokenRow], most: int, seed: int) -> list[TokenRow]:
    """The target rows of a run without --target: min(most, a tenth of the rows), at least one, drawn by the seed."""
    if len(rows) < 2:
        raise InputError(
            "Only one row can be scored, and one must be held out as target. Give the task's rows with --target."
        )
    return _drawn(rows, max(1, min(most, len(rows) // 10)), seed, _TARGET_DRAW)


def fisher_rows(rows: Sequence[TokenRow], most: int, seed: int) -> list[TokenRow]:
    """The rows the Fisher is estimated from, drawn by the seed."""
    return _drawn(rows, most, seed, _FISHER_DRAW)


def _drawn(rows: Sequence[TokenRow], count: int, seed: int, position: int) -> list[TokenRow]:
    draws = keyed_uniform(seed, [row.row_id for row in rows], position)
    return [rows[i] for i in sorted(np.argsort(draws, kind="stable")[:count])]


def fingerprint_fields(prepared: Prepared, reference: ModelSource, dtype: str) -> dict[str, Json]:
    """Everything that changes values/, under the names users know it by."""
    config = prepared.config
    template = getattr(prepared.tokenizer, "chat_template", None)
    fisher: Json = config.fisher
    if config.fisher not in FISHER_MODES:
        fisher = digest_files([_file(config.fisher)])
    fields: dict[str, Json] = {
        "schema_version": SCHEMA_VERSION,
        "data": [[file.source, file.digest] for file in prepared.files],
        "model": model_digest(prepared.source),
        "tokenizer": tokenizer_digest(prepared.source),
        "template": f"sha256:{hashlib.sha256(str(template).encode()).hexdigest()}" if template else None,
        "tokens": _tokens_digest([*prepared.rows, *prepared.target]),
        "target": [file.digest for file in prepared.target_files] or None,
        "target_rows": None if config.target else config.target_rows,
        "estimator": config.estimator,
        "layers": config.layers,
        "window": config.window if config.estimator == "published" else None,
        "stability_weight": config.stability_weight,
        "fisher": fisher,
        "fisher_rows": config.fisher_rows if config.fisher in FISHER_MODES else None,
        "turns": config.turns,
        "max_length": config.max_length,
        "rows_per_shard": config.rows_per_shard,
        "dtype": dtype,
        "seed": config.seed,
    }
    fields["reference"] = fields["model"] if reference == prepared.source else model_digest(reference)
    return fields


def _tokens_digest(rows: Sequence[TokenRow]) -> str:
    """Digest of the tokens themselves: a template that writes today's date changes them, and nothing else does."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row.input_ids).to_bytes(8, "little") + row.input_ids.tobytes() + row.response.tobytes())
    return f"sha256:{digest.hexdigest()}"


def _vocabulary(source: ModelSource, tokenizer: Tokenizer | None) -> int | None:
    """Number of tokens the model knows; None where only loading the model would tell."""
    if source.gguf:
        return None if tokenizer is None else len(tokenizer)
    config = model_config(source)
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return size if isinstance(size, int) else None


def _file(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise UsageError(f"--fisher {name}: neither `sampled` nor `empirical` nor a file. Name a safetensors file.")
    return path
