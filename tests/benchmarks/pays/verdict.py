"""What the runs of the referee say: gains over all tokens, with intervals that hold for all arms at once.

    python tests/benchmarks/pays/verdict.py

A gain is the mean over seeds of what an arm's loss is less than that of all tokens, per held token: of those at the
rate of least loss on V for that noise, over the seeds that have each of the rates. Of its interval one part is of the
seeds, by Student's t, and one of the held rows, by the normal distribution; they add as squares. Levels are those of
Bonferroni for all arms of a noise that have an interval, which so hold together. A bootstrap over seeds would not: few
seeds have few draws, the same ones for all arms (PROTOCOL.md, amended).
Shapes: K arms, S seeds, R held rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean
from typing import Any

import lines
import numpy as np
from numpy.typing import NDArray
from referee import CHOOSE, PLAIN, RATES, STAGES, TEST
from writing import markdown

from alphatoken_curate.signals.student import quantile

Floats = NDArray[np.float64]

SURE = 0.95

MEASURES = {
    "nll": ("nll", "tokens"),
    "at its best temperature": ("tempered", "tokens"),
    "answer digits": ("digits_right", "digits"),
}
"""Of each what is summed over held rows, and by what it is divided."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gains:
    """(K,) each: by how much arms are less than all tokens, and half the width of their intervals."""

    gain: Floats
    half: Floats | None


def gains(arms: Floats, plain: Floats, sizes: Floats, together: int) -> Gains:
    """Of sums by arm, seed and held row (K, S, R), those of all tokens (S, R), and what rows count (R,).

    Intervals hold for `together` arms at once, of which these are some; less than two seeds have none.
    """
    less = plain - arms
    seeds, rows = plain.shape
    each = less.sum(axis=2) / sizes.sum()
    gain = each.mean(axis=1)
    if seeds < 2:
        return Gains(gain=gain, half=None)
    level = 1 - (1 - SURE) / (2 * together)
    of_seeds = each.std(axis=1, ddof=1) / math.sqrt(seeds)
    off = less.mean(axis=1) - gain[:, None] * sizes  # of a ratio of sums over rows
    of_rows = np.sqrt((off**2).sum(axis=1) * rows / (rows - 1)) / sizes.sum()
    half = np.hypot(quantile(level, seeds - 1) * of_seeds, NormalDist().inv_cdf(level) * of_rows)
    return Gains(gain=gain, half=half)


At = tuple[str, float]
"""An arm and its rate."""

BySeed = dict[int, Mapping[str, Any]]


def by_arm(found: Sequence[Mapping[str, Any]]) -> dict[At, BySeed]:
    """Results of each arm at each rate by seed."""
    arms: dict[At, BySeed] = defaultdict(dict)
    for line in found:
        config = line["config"]
        arms[config["arm"], config["about"]["learning_rate"]][config["seed"]] = line["found"]
    return arms


def least_on_v(arms: Mapping[At, BySeed], arm: str, rates: Sequence[float]) -> tuple[float, set[int]]:
    """The rate at which an arm ends lowest on V, and the seeds that have each of the rates: that it is told by."""
    each = {rate: arms.get((arm, rate), {}) for rate in rates}
    seeds = set.intersection(*(set(by_seed) for by_seed in each.values()))
    loss = {rate: sum(by_seed[s]["curve"][-1]["target_loss"] for s in seeds) for rate, by_seed in each.items()}
    return min(loss, key=loss.__getitem__), seeds


def named(arms: Mapping[At, BySeed]) -> dict[At, str]:
    """What tables call them. Of an arm at several rates the one of least loss on V counts, once a seed has them all."""
    names = {}
    for arm, rate in arms:
        rates = [other for name, other in arms if name == arm]
        least, seeds = least_on_v(arms, arm, rates)
        told = f"{arm}, {rate:g}" if len(rates) > 1 or arm == PLAIN else arm
        names[arm, rate] = f"{told} (higher on V)" if seeds and rate != least else told
    return names


def of_noise(found: Sequence[Mapping[str, Any]], rates: Sequence[float]) -> str:
    """The arms of a noise, those that gain most first, over seeds that have all tokens at each rate; "" for none."""
    each = by_arm(found)
    best, tuned = least_on_v(each, PLAIN, rates)
    if not tuned:
        return ""
    names_of = named(each)
    arms = {names_of[at]: by_seed for at, by_seed in each.items()}
    own_name = names_of[PLAIN, best]
    plain = {seed: one for seed, one in arms.pop(own_name).items() if seed in tuned}
    # Arms are compared over the same seeds, so those that lack some are told of apart.
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, by_seed in arms.items():
        groups[tuple(sorted(plain.keys() & by_seed.keys()))].append(name)
    together = sum(len(names) for seeds, names in groups.items() if len(seeds) > 1)
    cells = [cell for seeds, names in groups.items() if seeds for cell in _cells(arms, names, plain, seeds, together)]
    rows = sorted(cells, key=lambda row: -row[0])
    gained = [f"gain: {name}" for name in MEASURES]
    head = ["arm", "seeds", "kept", "bad kept", "loss", *gained, "loss on V, on the way", "retention loss"]
    own = _about(own_name, list(plain.values()))
    return markdown(head, [[*own[:5], *("" for _ in MEASURES), *own[5:]], *(row[1] for row in rows)])


def _cells(
    arms: Mapping[str, Mapping[int, Mapping[str, Any]]],
    names: Sequence[str],
    plain: Mapping[int, Mapping[str, Any]],
    seeds: Sequence[int],
    together: int,
) -> list[tuple[float, list[str]]]:
    """Of each arm its gain, by which it is sorted, and its row."""
    columns, first = [], np.zeros(len(names))
    for n, (over, by) in enumerate(MEASURES.values()):
        sums = np.array([[arms[name][s]["held"][over] for s in seeds] for name in names], float)
        own = np.array([plain[s]["held"][over] for s in seeds], float)
        sign = -1 if over == "digits_right" else 1
        found = gains(sign * sums, sign * own, np.array(plain[seeds[0]]["held"][by], float), together)
        columns.append(_with_half(found))
        first = found.gain if n == 0 else first
    told = [_about(name, [arms[name][s] for s in seeds]) for name in names]
    return [(float(first[k]), [*one[:5], *(column[k] for column in columns), *one[5:]]) for k, one in enumerate(told)]


def _with_half(found: Gains) -> list[str]:
    halves = [None] * len(found.gain) if found.half is None else found.half.tolist()
    return [f"{g:+.3f}" + ("" if h is None else f" ± {h:.3f}") for g, h in zip(found.gain, halves, strict=True)]


def _about(name: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name, seeds, what is kept, what of the bad is, loss, losses on V on the way, and retention loss."""
    kept = mean(one["kept_tokens"] / one["response_tokens"] for one in found)
    bad = [one["kept_bad"] / one["bad_tokens"] for one in found if one["bad_tokens"]]
    loss, forgotten = mean(map(held_loss, found)), mean(one["curve"][-1]["retention_loss"] for one in found)
    on_v = [mean(each) for each in zip(*([at["target_loss"] for at in one["curve"]] for one in found), strict=True)]
    told = [name, str(len(found)), f"{kept:.0%}", f"{mean(bad):.0%}" if bad else "", f"{loss:.3f}"]
    return [*told, ", ".join(f"{one:.3f}" for one in on_v), f"{forgotten:.3f}"]


def held_loss(found: Mapping[str, Any]) -> float:
    """Of a run the loss per held token, in nats."""
    return float(sum(found["held"]["nll"]) / sum(found["held"]["tokens"]))


def chosen(found: Sequence[Mapping[str, Any]]) -> str:
    """Loss of each arm on the rows that tune, by rate; the least is chosen."""
    loss: dict[str, dict[float, float]] = defaultdict(dict)
    for line in found:
        loss[line["config"]["arm"]][line["config"]["about"]["learning_rate"]] = held_loss(line["found"])
    rows = []
    for arm, by_rate in loss.items():
        least = min(by_rate, key=lambda rate: by_rate[rate])
        cells = [f"{by_rate[rate]:.3f}" if rate in by_rate else "" for rate in RATES]
        rows.append([arm, *cells, f"{least:g}" if len(by_rate) == len(RATES) else ""])
    return markdown(["arm", *(f"{rate:g}" for rate in RATES), "chosen"], rows)


def report() -> str:
    """All tables there are lines for."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in lines.read("referee"):
        found[line["config"]["model"], line["config"]["stage"], line["config"]["noise"]].append(line)
    parts = []
    for (model, stage, noise), some in sorted(found.items(), key=_in_order):
        if stage == CHOOSE:
            parts.append(f"### {model}: {noise}, chosen on split A\n\n{chosen(some)}")
            continue
        seeds = {one["config"]["seed"] for one in some}
        beside = [
            one
            for one in found.get((model, TEST, noise), ())
            if one["config"]["arm"] in STAGES[stage].beside and one["config"]["seed"] in seeds
        ]
        named = "" if stage == TEST else f", {stage}"
        if table := of_noise([*some, *beside], STAGES[stage].rates(PLAIN, noise)):
            parts.append(f"### {model}: {noise}{named}\n\n{table}")
    return "\n\n".join(parts)


def _in_order(found: tuple[tuple[str, str, str], Any]) -> tuple[str, int]:
    """Of a model and its stages in their order."""
    (model, stage, _), _ = found
    return model, [CHOOSE, *STAGES].index(stage)


if __name__ == "__main__":
    print(report())
