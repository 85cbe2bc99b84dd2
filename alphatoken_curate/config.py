"""What a run is told: frozen dataclasses whose field metadata is the one source of help, YAML keys and fingerprint."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal


def _option(
    default: Any, help_text: str, *, choices: tuple[str, ...] = (), changes_values: bool = False, kind: str = "str"
) -> Any:
    """A field with its help. `changes_values`: part of the fingerprint of values/ as it stands (not by digest)."""
    metadata = {"help": help_text, "choices": choices, "changes_values": changes_values, "kind": kind}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskConfig:
    """How stored values become masks and loss weights (DESIGN 1.3, 1.6). None of it needs a model."""

    keep: float | Literal["positive"] = _option(
        0.5,
        "Share of response tokens to keep, 0 < share <= 1, or `positive`: those whose value is above 0.",
        kind="keep",
    )
    scope: str = _option(
        "global",
        "Where the share is counted: `global`, `row`, or `batch:N` (consecutive batches of N rows).",
        kind="scope",
    )
    weights: str = _option("binary", "Loss weights of kept tokens.", choices=("binary", "rank", "sigmoid", "relu"))
    by: str = _option(
        "value",
        "What to select by: `value`, `random`, a stored column, or a polars SQL expression of them,"
        ' such as "nll - reference_nll". The highest are kept.',
    )
    stability_weight: float = _option(
        1.5,
        "Weight of stability against adaptation in the value (lambda of Eq. 12).",
        changes_values=True,
        kind="float",
    )
    stability_scale: str = _option(
        "none",
        "`rms` divides each objective by its RMS over the generation before they are added.",
        choices=("none", "rms"),
    )
    allow_empty_rows: bool = _option(
        False, "Leave rows that lost every token empty; else each gets its best one back.", kind="bool"
    )
    seed: int = _option(
        0, "Seed of every random draw; draws are keyed by (seed, row, position).", changes_values=True, kind="int"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig(MaskConfig):
    """Everything `score` is told."""

    data: tuple[str, ...] = _option(
        (), "Rows to score: files, folders, globs or a Hugging Face dataset name.", kind="data"
    )
    model: str = _option("smollm2-135m", "Model to score with: folder, GGUF file, Hub id or `smollm2-135m`.")
    reference: str | None = _option(None, "Pre-trained reference, named as --model is. Default: the same as --model.")
    target: str | None = _option(None, "Rows of the task to learn. Default: rows held out of DATA.")
    target_rows: int = _option(
        32,
        "Rows to hold out as target where --target is not given; at most a tenth of the rows.",
        changes_values=True,
        kind="int",
    )
    estimator: str = _option(
        "published", "How paths are estimated.", choices=("published", "exact"), changes_values=True
    )
    layers: int | Literal["all"] = _option(
        3, "Last K decoder blocks whose linear maps score, or `all`.", changes_values=True, kind="layers"
    )
    window: int = _option(32, "Reach of the published causal path, in tokens.", changes_values=True, kind="int")
    fisher: str = _option(
        "sampled", "Fisher diagonal of the reference: `sampled`, `empirical`, or a safetensors FILE saved earlier."
    )
    fisher_rows: int = _option(256, "Rows the Fisher is estimated from.", changes_values=True, kind="int")
    turns: str = _option("all", "Assistant turns that respond.", choices=("all", "last"), changes_values=True)
    max_length: int = _option(
        2048, "Rows are cut to this many tokens; what is cut is counted and told.", changes_values=True, kind="int"
    )
    rows_per_shard: int = _option(1024, "Rows read per output shard.", changes_values=True, kind="int")
    batch_tokens: int | Literal["auto"] = _option(
        "auto", "Padded tokens per batch; halved when memory runs out.", kind="auto_int"
    )
    dtype: str = _option(
        "auto",
        "`auto`: bfloat16 on a GPU, float32 on a CPU.",
        choices=("auto", "float32", "bfloat16", "float16", "float64"),
    )
    device: str = _option("auto", "`auto`: cuda where there is a card, else cpu.")
    bad_rows: str = _option(
        "refuse", "`quarantine` sets bad rows aside in rejects.jsonl and goes on.", choices=("refuse", "quarantine")
    )
    trust_remote_code: bool = _option(False, "Run code that comes with a model. Recorded in the run.", kind="bool")


def defaults(kind: type) -> dict[str, Any]:
    """Name -> default of every field of a config class."""
    return {f.name: f.default for f in fields(kind) if f.default is not MISSING}
