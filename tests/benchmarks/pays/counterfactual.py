"""What a ranking of tokens is worth: train without its top and without its bottom, and see which hurts the target.

    python tests/benchmarks/pays/counterfactual.py --data ../shared/data --jobs 2

From the same start on the same batches, one pass over 64 rows. A line holds the target loss after training without the
top (or bottom) share of the response tokens of those rows; the gap between the two is the score of the ranking
(tables.py). `random` without a share, at several seeds, gives the error bars. Resumable, as all here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lines
import numpy as np
from grid import COUNTERFACTUAL, RANKINGS
from numpy.typing import NDArray
from selections import scored
from settings import Setting, about, setting
from training import Weights, load, train

import alphatoken_curate as atc

ROWS = 64
SHARES = (0.01, 0.05, 0.1, 0.2)
RANDOM_SEEDS = 4


def one(data: str, work: str, config: dict[str, Any]) -> dict[str, Any]:
    """Train once without some tokens."""
    where = setting(config["setting"], Path(data))
    rank = ranking(where, config["ranking"], Path(work), config["seed"])
    where = replace(where, train=where.train[:ROWS], epochs=1)
    flat = np.concatenate([r[row.response] for r, row in zip(rank[:ROWS], where.train, strict=True)])
    count = round(config["share"] * len(flat))
    order = np.argsort(flat, kind="stable")
    dropped = np.zeros(len(flat), np.bool_)
    dropped[order[len(flat) - count :] if config["without"] == "top" else order[:count]] = True
    curve = train(load(), where, _without(where, dropped), seed=0, measure_every=10**9)
    return {"target_loss": curve[-1]["target_loss"], "retention_loss": curve[-1]["retention_loss"], "dropped": count}


def ranking(where: Setting, name: str, work: Path, seed: int) -> list[NDArray[np.float64]]:
    """A number for each token of each row, (T,); NaN off the response."""
    if name == "random":
        draws = np.random.default_rng(seed)
        return [np.where(row.response, draws.random(len(row.ids)), np.nan) for row in where.train]
    if name == "oracle":
        return [np.where(row.response, row.good, np.nan) for row in where.train]
    settings, expression = RANKINGS[name]
    run = scored(settings, where, work)
    found = atc.scan_tokens(run).sql(f"SELECT row_id, position, {expression} AS number FROM self").collect()
    ranked = [np.full(len(row.ids), np.nan) for row in where.train]
    for row_id, position, number in found.iter_rows():
        ranked[row_id][position] = number
    return ranked


def _without(where: Setting, dropped: NDArray[np.bool_]) -> Weights:
    weights: Weights = []
    at = 0
    for row in where.train:
        weight = np.zeros(len(row.ids), np.float32)
        count = int(row.response.sum())
        weight[row.response] = ~dropped[at : at + count]
        weights.append(weight)
        at += count
    return weights


def main() -> None:
    """Run what has no line yet."""
    parser = lines.parser(__doc__)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    args = parser.parse_args()

    def config(where: str, name: str, share: float, without: str, seed: int) -> dict[str, Any]:
        known = about(where, Path(args.data))
        what = {"ranking": name, "share": share, "without": without, "seed": seed, "rows": ROWS}
        return {"setting": where, "about": known, **what}

    configs = [
        config(where, name, share, without, seed)
        for where, names in COUNTERFACTUAL.items()
        for share in args.shares
        for name in names
        for without in ("top", "bottom")
        for seed in range(RANDOM_SEEDS if name == "random" else 1)
        if not (name == "random" and without == "bottom") and lines.asked(args.only, COUNTERFACTUAL, where, name)
    ]
    configs += [
        config(where, "random", 0.0, "top", 0)
        for where in COUNTERFACTUAL
        if lines.asked(args.only, COUNTERFACTUAL, where, "random")
    ]
    lines.run("counterfactual", configs, partial(one, args.data, str(args.work.resolve())), args.jobs)


if __name__ == "__main__":
    main()
