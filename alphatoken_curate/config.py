"""What a run is told: frozen dataclasses whose field metadata is the one source of help, YAML keys and fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from alphatoken_curate.errors import UsageError
from alphatoken_curate.settings import read_setting
from alphatoken_curate.together import check_together, defaults_beside
from alphatoken_curate.wording import nearest

T = TypeVar("T", bound="MaskConfig")

ESTIMATORS = ("published", "exact", "influence", "exact+influence")
"""Ways to estimate what a token's own loss and the losses it takes part in do."""

FISHER_MODES = ("sampled", "generate", "empirical")
"""Ways to estimate the Fisher; anything else is a file."""

DIRECTIONS = ("gradient", "rehearsal")
"""What values are along: one gradient of the task, or each step of the training to come."""

GROUPS = ("Rows", "Model", "What is computed", "Rehearsal", "Mask", "Running")
"""The groups of settings, in the order of --help."""

_ROWS, _MODEL, _COMPUTED, _REHEARSAL, _MASK, _RUNNING = GROUPS


def _option(
    default: Any,
    help_text: str,
    group: str,
    *,
    choices: tuple[str, ...] = (),
    kind: str = "str",
    bounds: tuple[float, float] | None = None,
) -> Any:
    metadata = {"help": help_text, "group": group, "choices": choices, "kind": kind, "bounds": bounds}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskConfig:
    """How stored values become masks and loss weights (paper Eq. 12-13). None of it needs a model."""

    keep: float | Literal["positive"] = _option(
        1.0,
        "Share of response tokens to keep, or `positive`: where --by is above 0.",
        _MASK,
        kind="keep",
    )
    by: str = _option(
        "value",
        "Number to select by: a column, `surprise`, `reference_ratio` or SQL.",
        _MASK,
    )
    scope: str = _option(
        "global",
        "Share of all tokens, of each `row`, or of each `batch:N` of rows.",
        _MASK,
        kind="scope",
    )
    weights: str = _option(
        "binary", "Loss weights of kept tokens; `tilt`: 1 + C v / sd of --by.", _MASK, kind="weights"
    )
    stability_weight: float | None = _option(
        None, "Weight of stability in the value. Default: the run's.", _MASK, kind="float", bounds=(-1e6, 1e6)
    )
    stability_scale: str = _option(
        "none", "`rms` divides each objective by its RMS first.", _MASK, choices=("none", "rms")
    )
    allow_empty_rows: bool = _option(
        False, "Leave rows empty that lost every token; else each keeps its best.", _MASK, kind="bool"
    )
    always_keep: str = _option(
        "end-of-turn",
        "What stays in a mask that drops: these, `special` tokens, SQL, or `none`.",
        _MASK,
    )
    generation: str = _option(
        "latest",
        "Scorings to use: `latest`, `all`, or numbers such as 0,2.",
        _MASK,
        kind="generation",
    )
    aggregate: str = _option(
        "mean",
        "Of several generations: `mean` of the signals, or the `last`.",
        _MASK,
        choices=("mean", "last"),
    )
    seed: int = _option(0, "Seed of every random draw.", _RUNNING, kind="int")

    def __post_init__(self) -> None:
        """Check every setting, wherever it came from; raises UsageError."""
        for item in fields(self):
            object.__setattr__(self, item.name, read_setting(item, getattr(self, item.name)))


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig(MaskConfig):
    """Everything `score` is told."""

    stability_weight: float = _option(
        1.5, "Weight of stability against adaptation in the value.", _MASK, kind="float", bounds=(-1e6, 1e6)
    )
    data: tuple[str, ...] = _option(
        (),
        "Rows to score: files, folders, globs, URLs (s3, gs, hf) or a Hugging Face dataset name.",
        _ROWS,
        kind="data",
    )
    map: str | None = _option(
        None,
        "What columns are read as, of every file that has them: question=prompt,answer=response.",
        _ROWS,
        kind="pairs",
    )
    subset: str | None = _option(None, "Configuration (subset) of a Hub dataset of DATA.", _ROWS)
    split: str | None = _option(None, "Split of a dataset of DATA, of the Hub or save_to_disk. Default: train.", _ROWS)
    limit: int | None = _option(None, "Read the first N rows alone, for a trial.", _ROWS, kind="count")
    target: str | None = _option(None, "Rows of the task to learn. Default: rows held out of DATA.", _ROWS, kind="rows")
    target_rows: int = _option(
        32,
        "Most rows to hold out as target without --target; at most a tenth of DATA, or 1.",
        _ROWS,
        kind="count",
    )
    turns: str = _option(
        "all",
        "Assistant turns that respond; `each`: one by one, as at inference.",
        _ROWS,
        choices=("all", "last", "each"),
    )
    chat_template: str | None = _option(
        None, "Jinja FILE in place of the tokenizer's chat template.", _ROWS, kind="file"
    )
    chat_template_kwargs: str | None = _option(
        None,
        "What the chat template is told besides: '{\"enable_thinking\": false}'.",
        _ROWS,
        kind="object",
    )
    template_date: str | None = _option(
        None,
        "Today, to templates that write it. Default: the day the run began.",
        _ROWS,
        kind="date",
    )
    assistant_specials: str = _option(
        "template",
        "What special tokens are that an answer spells.",
        _ROWS,
        choices=("template", "text", "refuse"),
    )
    max_length: int = _option(2048, "Longest row in tokens; the rest is cut, counted and told.", _ROWS, kind="count")
    bad_rows: str = _option(
        "refuse",
        "`quarantine`: set bad rows aside in rejects.jsonl and go on.",
        _ROWS,
        choices=("refuse", "quarantine"),
    )
    model: str = _option("smollm2-135m", "Folder, adapter, GGUF file, Hub id or `smollm2-135m`.", _MODEL)
    reference: str | None = _option(None, "Model that --model was tuned from. Default: the same as --model.", _MODEL)
    dtype: str = _option(
        "auto",
        "`auto`: bfloat16 on a GPU, float32 on a CPU.",
        _MODEL,
        choices=("auto", "float32", "bfloat16", "float16", "float64"),
    )
    device: str = _option(
        "auto", "`auto`: cuda where there is a card, else cpu. Several: cuda:0,cuda:1.", _MODEL, kind="device"
    )
    trunk_device: str | None = _option(
        None,
        "Where blocks below the last K stay until each runs. Default: the device.",
        _MODEL,
        choices=("cpu", "disk"),
    )
    trust_remote_code: bool = _option(
        False, "Run code that comes with a model. Recorded in the run.", _MODEL, kind="bool"
    )
    direction: str = _option(
        "gradient",
        "Value by the task's `gradient`, or by the training to come, rehearsed.",
        _COMPUTED,
        choices=DIRECTIONS,
    )
    estimator: str = _option(
        None,
        "Paths (`published`, `exact`) or `influence`. Default: published; by rehearsal influence.",
        _COMPUTED,
        choices=ESTIMATORS,
    )
    layers: int | Literal["all"] = _option(
        None,
        "Last K decoder blocks that score, or `all`. Default: 3; by rehearsal all.",
        _COMPUTED,
        kind="all_count",
    )
    parameters: str = _option(
        None,
        "`linear` maps, or `all` (influence). Default: linear; by rehearsal all.",
        _COMPUTED,
        choices=("linear", "all"),
    )
    target_groups: int | None = _option(
        None,
        "Groups of target rows, to tell errors by. Default: none; by rehearsal 8 of 16 rows.",
        _COMPUTED,
        kind="count",
        bounds=(1, 256),
    )
    window: int = _option(32, "Reach of the published causal path, in tokens.", _COMPUTED, kind="count")
    fisher: str = _option(
        "sampled",
        "Fisher of the reference: `sampled`, `generate`, `empirical` or a FILE.",
        _COMPUTED,
    )
    fisher_rows: int = _option(256, "Rows the Fisher is estimated from.", _COMPUTED, kind="count")
    fisher_prompts: str | None = _option(
        None, "Prompts of --fisher generate, rows of any shape. Default: those of DATA.", _COMPUTED, kind="rows"
    )
    fisher_new_tokens: int = _option(128, "Tokens to generate after each prompt.", _COMPUTED, kind="count")
    drift: str | None = _option(
        None,
        "From the reference to the `weights`, or to a `lookahead` step. Default: weights.",
        _COMPUTED,
        choices=("weights", "lookahead"),
    )
    lookahead_lr: float | None = _option(
        None,
        "Learning rate of the lookahead step; stability scales with it.",
        _COMPUTED,
        kind="positive",
        bounds=(1e-12, 1e3),
    )
    lookahead_rows: int = _option(256, "Rows the lookahead step is made from.", _COMPUTED, kind="count")
    retention: str | None = _option(
        None,
        "Rows not to forget: their gradient takes the drift's place in stability.",
        _COMPUTED,
        kind="rows",
    )
    precondition: str = _option(
        "none",
        "Scale adaptation by curvature: `adam`, or inverse `kfac`, `ekfac`, `astra`.",
        _COMPUTED,
        choices=("none", "adam", "kfac", "ekfac", "astra"),
    )
    precondition_rows: int = _option(256, "Rows the curvature is estimated from.", _COMPUTED, kind="count")
    precondition_eps: float = _option(
        1e-8, "Added to the root of second moments (adam).", _COMPUTED, kind="positive", bounds=(1e-20, 1e3)
    )
    precondition_damping: float = _option(
        0.1,
        "Added to the curvature, in mean eigenvalues (kfac, ekfac, astra).",
        _COMPUTED,
        kind="positive",
        bounds=(1e-10, 1e4),
    )
    precondition_iterations: int = _option(
        8, "Iterations from ekfac on (astra), each a pass over those rows.", _COMPUTED, kind="count", bounds=(1, 1000)
    )
    precondition_stability: bool = _option(False, "Scale the stability direction too.", _COMPUTED, kind="bool")
    rehearse_lr: float | None = _option(
        None,
        "Largest learning rate of the training that is rehearsed. Required.",
        _REHEARSAL,
        kind="positive",
        bounds=(1e-12, 1e3),
    )
    rehearse_epochs: int = _option(1, "Times that it takes all rows.", _REHEARSAL, kind="count")
    rehearse_rows_per_step: int = _option(8, "Rows, or pairs, of a step.", _REHEARSAL, kind="count")
    rehearse_optimizer: str = _option(
        "adamw", "What steps: torch's AdamW or SGD.", _REHEARSAL, choices=("adamw", "sgd")
    )
    rehearse_betas: str = _option("0.9,0.999", "Decay of both moments (adamw).", _REHEARSAL, kind="betas")
    rehearse_eps: float = _option(
        1e-8, "Added to the root of second moments (adamw).", _REHEARSAL, kind="positive", bounds=(1e-20, 1e3)
    )
    rehearse_root: float | None = _option(
        None,
        "Added under that root (adamw): smooths first steps. Default: 1e-12; of a LoRA 1e-14.",
        _REHEARSAL,
        kind="float",
        bounds=(0, 1e3),
    )
    rehearse_weight_decay: float = _option(0.0, "Weight decay of matrices.", _REHEARSAL, kind="float", bounds=(0, 1e3))
    rehearse_momentum: float = _option(0.0, "Momentum (sgd).", _REHEARSAL, kind="float", bounds=(0, 0.99999))
    rehearse_schedule: str = _option(
        "constant", "The rate after the warm-up.", _REHEARSAL, choices=("constant", "linear", "cosine")
    )
    rehearse_warmup: int = _option(0, "Steps in which the rate rises from 0.", _REHEARSAL, kind="int")
    rehearse_clip: float | None = _option(
        None, "Largest norm of a step's gradient.", _REHEARSAL, kind="positive", bounds=(1e-12, 1e12)
    )
    rehearse_denominator: str = _option(
        "count",
        "A loss over tokens (SimPO: of a branch): by their count, or the sum of weights.",
        _REHEARSAL,
        choices=("count", "sum"),
    )
    rehearse_simpo: float | None = _option(
        None, "Train pairs by SimPO to this margin (gamma), not by DPO.", _REHEARSAL, kind="float", bounds=(0, 1e3)
    )
    rehearse_seeds: int = _option(
        1, "Orders of rows that values are means over.", _REHEARSAL, kind="count", bounds=(1, 1000)
    )
    rehearse_lora: int | None = _option(
        None, "Train a LoRA of this rank, and no weight.", _REHEARSAL, kind="count", bounds=(1, 4096)
    )
    rehearse_lora_alpha: float | None = _option(
        None, "Its alpha. Default: 2 ranks, or the adapter's.", _REHEARSAL, kind="positive", bounds=(1e-6, 1e6)
    )
    rehearse_window: int | None = _option(
        None, "Steps that see no further than where the last of them ends. Default: all.", _REHEARSAL, kind="count"
    )
    beta: float = _option(
        0.1, "Strength of the preference loss (beta of Eq. 14).", _COMPUTED, kind="positive", bounds=(1e-6, 1e3)
    )
    batch_tokens: int | Literal["auto"] = _option(
        "auto", "Padded tokens per batch; `auto` by a short trial.", _RUNNING, kind="auto_count"
    )
    threads: int | None = _option(
        None,
        "Threads of each process on a CPU, which decide rounding. Default: as torch finds.",
        _RUNNING,
        kind="count",
        bounds=(1, 4096),
    )
    rows_per_shard: int = _option(1024, "Rows read per output shard.", _RUNNING, kind="count")
    reuse: str | None = _option(
        None, "Run to take over from what it computed of the same inputs and settings.", _RUNNING
    )

    def __post_init__(self) -> None:
        """Check every setting and which of them go together; raises UsageError."""
        # Not super(): the class that slots=True makes is another one than the name stands for here.
        MaskConfig.__post_init__(self)
        for name, default in defaults_beside(self).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        check_together(self)

    @property
    def rehearses(self) -> bool:
        """Whether values are of the training to come."""
        return self.direction == "rehearsal"

    @property
    def rehearses_lora(self) -> bool:
        """Whether that training is of a LoRA, beside a model none of whose weights trains."""
        return self.rehearses and self.rehearse_lora is not None

    @property
    def root(self) -> float:
        """What is added under the root of second moments: first gradients of a LoRA are smaller, by its B of 0."""
        if self.rehearse_root is not None:
            return self.rehearse_root
        return 1e-14 if self.rehearses_lora else 1e-12

    @property
    def in_full(self) -> bool:
        """Whether the model runs in float32 at least: what a weight adds to a tangent, or a step, is lost in less."""
        return self.parameters == "all" or self.rehearses


OF_REHEARSAL = tuple(item.name for item in fields(ScoreConfig) if item.name.startswith("rehearse_"))
"""The settings of a rehearsal."""

OF_OPTIMISER = {"adamw": ("rehearse_betas", "rehearse_eps", "rehearse_root"), "sgd": ("rehearse_momentum",)}
"""Those among them that one optimiser alone reads."""


def settings_of_mask(stored: Mapping[str, Any]) -> MaskConfig:
    """The settings that a run keeps of a mask. Those from before --always-keep kept nothing always."""
    known = {item.name: stored[item.name] for item in fields(MaskConfig) if item.name in stored}
    return MaskConfig(**{"always_keep": "none", **known})


def is_from_before(settings: Mapping[str, Any]) -> bool:
    """Whether settings are of a time before --always-keep: all others of a mask are there, as in a run's config.yaml.

    A file by hand need not name what it leaves at its default.
    """
    return {item.name for item in fields(MaskConfig)} - settings.keys() == {"always_keep"}


def checked(kind: type[T], settings: Mapping[str, Any], where: str) -> T:
    """A config from settings by name. Raises UsageError for a name it does not know (`where` it stood) or a value."""
    known = {f.name: f for f in fields(kind)}
    for name in settings:
        if name not in known:
            hint = nearest(name, known) or f" Known: {', '.join(known)}."
            raise UsageError(f"{where}: no setting {name!r}.{hint}")
    return kind(**settings)
