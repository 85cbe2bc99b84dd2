"""From what a user named to what a run will do: rows, tokens, target rows, digests. No model is loaded here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from alphatoken_curate.config import FISHER_MODES, ScoreConfig
from alphatoken_curate.errors import InputError, UsageError
from alphatoken_curate.models.load import (
    ModelSource,
    find_model,
    generation_stops,
    load_tokenizer,
    model_config,
    model_digest,
    tokenizer_digest,
)
from alphatoken_curate.rows.read import BadRow, InputFile, RowStream, kind_of, refuse
from alphatoken_curate.runs.atomic import digest
from alphatoken_curate.runs.fingerprint import Json
from alphatoken_curate.runs.schema import SCHEMA_VERSION
from alphatoken_curate.tokens.chat import Tokenizer
from alphatoken_curate.tokens.draws import keyed_uniform
from alphatoken_curate.tokens.plan import sequences
from alphatoken_curate.tokens.tokenise import AnyRow, TokenRow, chosen, tokenise, tokenise_prompts

R = TypeVar("R", TokenRow, AnyRow)

TARGET_DRAW, FISHER_DRAW, LOOKAHEAD_DRAW, PRECONDITION_DRAW = -1, -2, -3, -4
"""Positions under which the draws of whole rows are keyed; no token has a negative one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SideRows:
    """Rows of a file beside DATA: target, retention or prompts. Empty where no file was named."""

    rows: list[TokenRow] = field(default_factory=list)
    files: list[InputFile] = field(default_factory=list)

    @property
    def digests(self) -> list[str] | None:
        """What their files are known by in a fingerprint."""
        return [file.digest for file in self.files] or None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """All that is known before a model is loaded."""

    config: ScoreConfig
    source: ModelSource
    tokenizer: Tokenizer | None
    kind: str
    files: list[InputFile]
    rows_read: int
    rows: list[AnyRow]
    """Rows to score, by row_id."""
    held_out: list[AnyRow]
    """Rows of DATA set aside as target; empty where --target was given."""
    target: SideRows
    retention: SideRows
    prompts: SideRows
    bad: list[BadRow]
    """Bad rows of DATA, by row_id."""

    @property
    def target_rows(self) -> list[TokenRow]:
        """Target rows, wherever they come from; of preference rows the chosen branch, as plain SFT."""
        return [chosen(row) for row in self.held_out] or self.target.rows


def prepare(config: ScoreConfig) -> Prepared:
    """Read, check and tokenise everything. InputError names all bad rows at once, unless they are quarantined."""
    source = find_model(config.model)
    reader = _Reader(config, source)
    found = RowStream(config.data)
    rows, unusable = reader.tokens(found)
    bad = sorted([*found.bad, *unusable], key=lambda bad: bad.row_id)
    sides = {"target": config.target, "retention": config.retention, "prompts": config.fisher_prompts}
    side = {name: reader.side(name, path) for name, path in sides.items()}
    wanting = bad if config.bad_rows == "refuse" else []
    if wanting or reader.bad:
        raise refuse([*wanting, *reader.bad], can_quarantine=not reader.bad)
    if not rows:
        raise InputError(f"{', '.join(config.data)}: none of its {len(bad)} rows can be scored. Run check to see why.")
    kind = kind_of(found.samples)
    held_out: list[AnyRow] = []
    if config.target is None:
        held_out = hold_out(rows, config.target_rows, config.seed)
        taken = {row.row_id for row in held_out}
        rows = [row for row in rows if row.row_id not in taken]
    return Prepared(
        config=config,
        source=source,
        tokenizer=reader.tokenizer,
        kind=kind,
        files=found.files,
        rows_read=found.read,
        rows=rows,
        held_out=held_out,
        bad=bad,
        **side,
    )


class _Reader:
    """Reads rows as the model of a run tokenises them; `bad`: rows of files beside DATA that cannot be used."""

    def __init__(self, config: ScoreConfig, source: ModelSource) -> None:
        self.tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
        self.bad: list[BadRow] = []
        self._config = config
        self._vocabulary = _vocabulary(source, self.tokenizer)

    def tokens(self, found: RowStream) -> tuple[list[AnyRow], list[BadRow]]:
        """Tokens of rows that were read, and those that have none to score."""
        config = self._config
        return tokenise(
            found, self.tokenizer, max_length=config.max_length, turns=config.turns, vocab_size=self._vocabulary
        )

    def side(self, name: str, path: str | None) -> SideRows:
        """Rows of a file beside DATA; of preference rows the chosen branch."""
        if path is None:
            return SideRows()
        if name == "prompts":
            found = RowStream([path], also=("prompt",))
            rows, unusable = tokenise_prompts(
                found, self.tokenizer, max_length=self._config.max_length, vocab_size=self._vocabulary
            )
        else:
            found = RowStream([path], also=("text",) if name == "retention" else ())
            both, unusable = self.tokens(found)
            rows = [chosen(row) for row in both]
        self.bad += sorted([*found.bad, *unusable], key=lambda bad: bad.row_id)
        return SideRows(rows=rows, files=found.files)


def hold_out(rows: Sequence[AnyRow], most: int, seed: int) -> list[AnyRow]:
    """The target rows of a run without --target: min(most, a tenth of the rows), at least one, drawn by the seed."""
    if len(rows) < 2:
        raise InputError(
            "Only one row can be scored, and one must be held out as target. Give the task's rows with --target."
        )
    return drawn(rows, max(1, min(most, len(rows) // 10)), seed, TARGET_DRAW)


def drawn(rows: Sequence[R], count: int, seed: int, position: int) -> list[R]:
    """At most `count` of the rows, drawn by (seed, row_id, position), in their order."""
    draws = keyed_uniform(seed, [row.row_id for row in rows], position)
    return [rows[i] for i in sorted(np.argsort(draws, kind="stable")[:count])]


def fingerprint_fields(prepared: Prepared, reference: ModelSource, dtype: str) -> dict[str, Json]:
    """Everything that changes values/, under the names users know it by; None where it plays no part."""
    config = prepared.config
    template = getattr(prepared.tokenizer, "chat_template", None)
    fields: dict[str, Json] = {
        "schema_version": SCHEMA_VERSION,
        "kind": prepared.kind,
        "data": [[file.source, file.digest] for file in prepared.files],
        "model": model_digest(prepared.source),
        "tokenizer": tokenizer_digest(prepared.source),
        "template": f"sha256:{hashlib.sha256(str(template).encode()).hexdigest()}" if template else None,
        "tokens": _tokens_digest(sequences([*prepared.rows, *prepared.held_out])),
        "target": prepared.target.digests,
        "target_rows": None if config.target else config.target_rows,
        "target_tokens": _tokens_digest(prepared.target.rows),
        "estimator": config.estimator,
        "layers": config.layers,
        "parameters": config.parameters,
        "window": config.window if config.estimator == "published" else None,
        "stability_weight": config.stability_weight,
        "beta": config.beta if prepared.kind == "preference" else None,
        "turns": config.turns,
        "max_length": config.max_length,
        "rows_per_shard": config.rows_per_shard,
        "dtype": dtype,
        "seed": config.seed,
    }
    fields["reference"] = fields["model"] if reference == prepared.source else model_digest(reference)
    return fields | _stability_fields(prepared, reference) | _precondition_fields(config)


def _stability_fields(prepared: Prepared, reference: ModelSource) -> dict[str, Json]:
    config = prepared.config
    estimated, generates = config.fisher in FISHER_MODES, config.fisher == "generate"
    lookahead = config.drift == "lookahead"
    return {
        "fisher": config.fisher if estimated else f"sha256:{digest(_file(config.fisher))[1]}",
        "fisher_rows": config.fisher_rows if estimated else None,
        "fisher_prompts": prepared.prompts.digests,
        "fisher_new_tokens": config.fisher_new_tokens if generates else None,
        "fisher_stops": generation_stops(reference) if generates else None,
        "prompt_tokens": _tokens_digest(prepared.prompts.rows),
        "drift": config.drift or ("weights" if config.retention is None else None),
        "lookahead_lr": config.lookahead_lr,
        "lookahead_rows": config.lookahead_rows if lookahead else None,
        "retention": prepared.retention.digests,
        "retention_tokens": _tokens_digest(prepared.retention.rows),
    }


def _precondition_fields(config: ScoreConfig) -> dict[str, Json]:
    kind = config.precondition
    return {
        "precondition": kind,
        "precondition_rows": config.precondition_rows if kind != "none" else None,
        "precondition_eps": config.precondition_eps if kind == "adam" else None,
        "precondition_damping": config.precondition_damping if kind in ("kfac", "ekfac") else None,
        "precondition_stability": config.precondition_stability,
    }


def _tokens_digest(rows: Sequence[TokenRow]) -> str | None:
    """Digest of the tokens themselves: a template that writes today's date changes them, and nothing else does."""
    found = hashlib.sha256()
    for row in rows:
        found.update(len(row.input_ids).to_bytes(8, "little") + row.input_ids.tobytes() + row.response.tobytes())
    return f"sha256:{found.hexdigest()}" if rows else None


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
        raise UsageError(f"--fisher {name}: none of {', '.join(FISHER_MODES)} nor a file. Name a safetensors file.")
    return path
