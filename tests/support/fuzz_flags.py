"""Flags of each command for `fuzz_runs`: most are right. Expressions of the grammar of --by, and of none."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from corpus import CORPUS
from grammar import PARTS, template_of

from alphatoken_curate.cli.export import TRAINERS
from alphatoken_curate.masks import language
from alphatoken_curate.runs.schema import BY_ESTIMATOR

Flags = list[str]

COLUMNS = (
    "value",
    "nll",
    "entropy",
    "adapt_direct",
    "adapt_causal",
    "stab_direct",
    "stab_causal",
    "row_id",
    "position",
)
COLUMNS += ("token_id", "turn", "surprise", "reference_ratio", "reference_nll", "omega", "margin", "adapt_influence")
HOSTILE = tuple(path.read_text("utf-8") for path in sorted(CORPUS.glob("by/*.txt")))
CONFIGS = tuple(sorted(CORPUS.glob("configs/*.yaml")))
TEMPLATES = tuple(sorted(CORPUS.glob("templates/*.jinja")))
WORDS = (*language.FUNCTIONS, *language.WORDS, *language.HINTS, *language.LEVELS, *language.COMPARE, *COLUMNS)
WORDS += ("(", ")", ",", "1", "0.5", "-", "'x'", "é", "\u202e", "1e300", "random", "OVER (PARTITION BY row_id)")


# --- expressions


def expression(draw: random.Random, deep: int = 3) -> str:
    """A number for each token, as the grammar has it; some are refused for what they are of."""
    if deep == 0 or draw.random() < 0.2:
        return draw.choice((*COLUMNS, "nll", "value", "0.5", "2", "1e-3"))
    one = lambda: expression(draw, deep - 1)  # noqa: E731
    over = draw.choice(("", " OVER ()", " OVER (PARTITION BY row_id)", " OVER (PARTITION BY row_id, turn)"))
    order = f"OVER (PARTITION BY row_id ORDER BY {draw.choice(COLUMNS)}{draw.choice(('', ' DESC'))})"
    makers = (
        lambda: f"{one()} {draw.choice('+-*/%')} {one()}",
        lambda: f"({one()})",
        lambda: f"-{one()}",
        lambda: f"{draw.choice(('ABS', 'SIGN', 'FLOOR', 'CEIL', 'ROUND', 'SQRT', 'EXP', 'LN', 'LOG1P'))}({one()})",
        lambda: f"{draw.choice(('GREATEST', 'LEAST', 'COALESCE'))}({one()}, {one()})",
        lambda: f"{draw.choice(('NULLIF', 'POWER'))}({one()}, {one()})",
        lambda: f"CASE WHEN {condition(draw, deep - 1)} THEN {one()} ELSE {one()} END",
        lambda: f"IF({condition(draw, deep - 1)}, {one()}, {one()})",
        lambda: f"CAST({condition(draw, deep - 1)} AS INT)",
        lambda: f"{draw.choice(('AVG', 'MAX', 'MEDIAN', 'MIN', 'STDDEV', 'SUM', 'VARIANCE'))}({one()}){over}",
        lambda: f"QUANTILE_CONT({one()}, {draw.choice(('0', '0.9', '1', '2'))}){over}",
        lambda: f"COUNT(*){over}",
        lambda: f"{draw.choice(('RANK', 'DENSE_RANK', 'ROW_NUMBER'))}() {order}",
        lambda: f"COALESCE({draw.choice(('LAG', 'LEAD'))}({one()}{draw.choice(('', ', 2'))}) {order}, 0)",
    )
    return draw.choice(makers)()


def condition(draw: random.Random, deep: int) -> str:
    """A condition of the grammar."""
    one, other = expression(draw, deep), expression(draw, max(0, deep - 1))
    found = draw.choice(
        (
            f"{one} {draw.choice(tuple(language.COMPARE))} {other}",
            f"{one} BETWEEN {other} AND 2",
            f"{one} NOT IN ({other}, 1)",
        )
    )
    if deep > 0 and draw.random() < 0.3:
        found = f"{draw.choice(('', 'NOT '))}{found} {draw.choice(('AND', 'OR'))} {condition(draw, deep - 1)}"
    return found


def by(draw: random.Random) -> str:
    """What to select by: mostly a column, else an expression, and few that are hostile or no more than words."""
    kind = draw.random()
    if kind < 0.35:
        return draw.choice((*COLUMNS, "-nll", "-value", "7 - surprise", "nll - reference_nll"))
    if kind < 0.42:
        return "random"
    if kind < 0.85:
        # A column with it, so that the whole is a number for each token more often.
        return draw.choice(("", "nll + 0 * ", "value - ")) + expression(draw, draw.choice((1, 2, 3)))
    if kind < 0.92:
        return draw.choice(HOSTILE)
    if kind < 0.96:
        return draw.choice((" ", "")).join(draw.choice(WORDS) for _ in range(draw.randrange(1, 15)))
    text = list(draw.choice(HOSTILE)[:200] or "x")
    for _ in range(draw.randrange(1, 4)):
        text[draw.randrange(len(text))] = draw.choice((*WORDS, "\x00", "(", ")"))
    return "".join(text).replace("\x00", "\x01")


# --- flags by table


@dataclass(frozen=True)
class Choice:
    """A flag that is given in a `share` of commands, with values that are right, and few times with one that is not."""

    flag: str
    share: float
    right: tuple[str, ...]
    wrong: tuple[str, ...] = ()

    def drawn(self, draw: random.Random) -> Flags:
        if draw.random() >= self.share:
            return []
        values = self.wrong if self.wrong and draw.random() < WRONG else self.right
        return [self.flag, draw.choice(values)] if values else [self.flag]


WRONG = 0.03
"""The share of flags whose value is none."""


def drawn(draw: random.Random, choices: Sequence[Choice]) -> Flags:
    return [word for choice in choices for word in choice.drawn(draw)]


# --- masks

MASK = (
    Choice("--keep", 0.8, ("0.5", "0.1", "0.01", "0.9", "1", "0.333", "positive"), ("0", "1.5", "nan")),
    Choice("--scope", 0.3, ("row", "global", "batch:2", "batch:3", "batch:99"), ("batch:0",)),
    Choice("--weights", 0.4, ("rank", "sigmoid", "relu", "binary"), ("x",)),
    Choice("--allow-empty-rows", 0.3, ()),
    Choice("--stability-weight", 0.2, ("0", "-1", "1e6", "0.5"), ("1e7", "x")),
    Choice("--stability-scale", 0.2, ("rms", "none")),
    Choice("--seed", 0.15, ("0", "1", "7", "9223372036854775807"), ("-1", "9" * 40)),
)


def mask_flags(draw: random.Random, generations: int, *, mild: bool = False) -> Flags:
    """Settings of a mask. `mild`: of those that a scoring may be given, where most would be refused before it began."""
    flags = drawn(draw, MASK)
    if draw.random() < (0.2 if mild else 0.8):
        flags += ["--by", by(draw)]
    if draw.random() < 0.4:
        words = ("none", "none", "special", "end-of-turn", "nll > 0.5", "value", "AVG(nll) > 1")
        flags += ["--always-keep", draw.choice(words if draw.random() < 0.7 else (condition(draw, 1),))]
    if generations > 1 or draw.random() < 0.05:
        numbers = ("latest", "all", "0", "0,1", "1", "9")
        flags += ["--generation", draw.choice(numbers), "--aggregate", draw.choice(("mean", "last"))]
    return flags + (["-c", str(draw.choice(CONFIGS))] if draw.random() < 0.05 and not mild else [])


# --- scoring


@dataclass
class Beside:
    """Files that a scoring may be told of, and the models that there are."""

    models: dict[str, str]
    folder: Path
    target: Path | None = None
    retention: Path | None = None
    prompts: Path | None = None


KWARGS = ('{"enable_thinking": false}', "{}", '{"x": [1, null]}')
ROWS = (
    Choice("--turns", 0.3, ("last", "each", "each", "all"), ("first",)),
    Choice("--max-length", 0.25, ("24", "60", "200", "8"), ("1", "0")),
    Choice("--chat-template-kwargs", 0.1, KWARGS, ('{"messages": 1}', "[1]", "x")),
    Choice("--assistant-specials", 0.1, ("text", "refuse", "template")),
    Choice("--limit", 0.1, ("2", "5", "100", "1")),
    Choice("--map", 0.08, ("question=prompt", "prompt=instruction,completion=output", "x=prompt"), ("x", "a=b,c=b")),
    Choice("--template-date", 0.08, ("2024-02-29",), ("2023-02-29",)),
    Choice("--target-rows", 0.1, ("1", "2", "99"), ("0",)),
    Choice("--bad-rows", 0.8, ("quarantine",)),
    Choice("--seed", 0.15, ("0", "1", "7"), ("-1",)),
)
COMPUTED = (
    Choice("--estimator", 0.5, (*BY_ESTIMATOR, "exact"), ("x",)),
    Choice("--window", 0.2, ("1", "4", "1000"), ("0",)),
    Choice("--dtype", 0.15, ("bfloat16", "float16", "float64", "float32"), ("int8",)),
    Choice("--layers", 1.0, ("1", "2", "3", "all"), ("0", "99")),
    Choice("--rows-per-shard", 0.6, ("2", "3", "1024"), ("0",)),
    Choice("--batch-tokens", 0.4, ("64", "512", "4096", "1"), ("0",)),
)
DIRECTIONS = (
    Choice("--fisher", 0.3, ("sampled", "empirical", "generate"), ("no.safetensors",)),
    Choice("--fisher-rows", 0.2, ("1", "3", "256"), ("0",)),
    Choice("--fisher-new-tokens", 0.2, ("1", "4")),
    Choice("--precondition", 0.25, ("adam", "kfac", "ekfac", "astra")),
    Choice("--precondition-iterations", 0.1, ("1", "2"), ("0",)),
    Choice("--precondition-damping", 0.1, ("0.1", "1e-10", "1e4"), ("0",)),
    Choice("--beta", 0.2, ("0.1", "1e-6", "1e3", "2"), ("0",)),
)


def score_flags(draw: random.Random, beside: Beside, *, real: bool) -> Flags:
    """Settings of `check` and `score`, but for those of the mask."""
    flags = ["--device", "cpu", "--model", beside.models[draw.choice(("base", "tuned"))]]
    flags += ["--reference", beside.models[draw.choice(("base", "tuned"))]] if draw.random() < 0.5 else []
    flags += drawn(draw, ROWS) + drawn(draw, COMPUTED)
    flags += drawn(draw, DIRECTIONS) if real or draw.random() < 0.3 else []
    for flag, path in (("--target", beside.target), ("--retention", beside.retention)):
        flags += [flag, str(path)] if path is not None else []
    flags += ["--fisher-prompts", str(beside.prompts)] if beside.prompts is not None and "generate" in flags else []
    if draw.random() < 0.1:
        flags += ["--drift", "lookahead", "--lookahead-lr", draw.choice(("1e-4", "1000", "1"))]
    flags += ["--parameters", "all"] if "influence" in flags and draw.random() < 0.2 else []
    flags += ["--precondition-stability"] if "--precondition" in flags and draw.random() < 0.3 else []
    flags += ["-c", str(draw.choice(CONFIGS))] if draw.random() < 0.02 else []
    return flags + (["--chat-template", str(_template(draw, beside.folder))] if draw.random() < 0.2 else [])


def _template(draw: random.Random, folder: Path) -> Path:
    """One of the corpus, or of the small grammar of `grammar`."""
    if draw.random() < 0.5:
        return draw.choice(TEMPLATES)
    path = folder / "made.jinja"
    path.write_text(template_of({name: draw.choice(choices) for name, choices in PARTS.items()}))
    return path


# --- what reads a run


def show_flags(draw: random.Random, rows: int) -> Flags:
    """A row that is there, or not; by its number, its id or a text."""
    numbers = (*range(rows), rows, -1)
    flags = draw.choice(
        (
            *[["--row", str(draw.choice(numbers))]] * 5,
            ["--id", draw.choice(("r0", "0", "same", ""))],
            ["--search", draw.choice(("yes", "x", "\x1b", "é", ""))],
        )
    )
    flags += ["--tokens"] if draw.random() < 0.4 else []
    for _ in range(draw.choice((0, 0, 1, 2))):
        flags += ["--by", by(draw) if draw.random() < 0.3 else draw.choice(("loss_weight", "value", "nll", "entropy"))]
    flags += ["--branch", draw.choice(("chosen", "rejected"))] if draw.random() < 0.1 else []
    return flags + (["--turn", draw.choice(("0", "1", "7"))] if draw.random() < 0.1 else [])


def export_flags(draw: random.Random, masks: int) -> Flags:
    """Any trainer and any settings."""
    flags = ["--for", draw.choice(TRAINERS)]
    flags += ["--mask", str(draw.randrange(masks + 1))] if draw.random() < 0.3 else []
    flags += ["--max-length", draw.choice(("2", "8", "24", "2048", "1"))] if draw.random() < 0.3 else []
    flags += ["--strict"] if draw.random() < 0.1 else []
    return flags + (["--binarize"] if draw.random() < 0.6 else [])
