"""Does training on a mask pay: target and retention loss after training, for each setting, selection and seed.

    python tests/benchmarks/pays/outcome.py --data ../shared/data --jobs 2

Resumable: a run that has a line in results/outcome.jsonl is not run again. `--only SETTING ... SELECTION ...` narrows,
`--seeds` says how many. Equal steps and equal rate; every 16th step is measured, so that equal kept tokens can be read
off the same lines (tables.py does).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lines
from grid import OUTCOME, SELECTIONS
from selections import Refresher, counts, weights_of
from settings import about, setting
from training import load, offered, train


def one(data: str, work: str, config: dict[str, Any]) -> dict[str, Any]:
    """Train once."""
    where, chosen = setting(config["setting"], Path(data)), SELECTIONS[config["selection"]]
    weights = weights_of(chosen, where, Path(work), config["seed"])
    refresher = Refresher(chosen, where, Path(work), config["seed"]) if chosen.refresh else None
    try:
        curve = train(
            load(),
            where,
            weights,
            seed=config["seed"],
            measure_every=8 if where.name == "narrow" else 16,
            measure_start=chosen.who == "all",
            refresh_every=chosen.refresh,
            refresh=refresher,
        )
    finally:
        if refresher is not None:
            refresher.close()
    return {"curve": curve, "offered": offered(where, config["seed"]), **counts(where, weights)}


def main() -> None:
    """Run what has no line yet."""
    parser = lines.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    configs = [
        {
            "setting": where,
            "about": about(where, Path(args.data)),
            "selection": name,
            **SELECTIONS[name].about(),
            "seed": seed,
        }
        for seed in range(args.seeds)
        for where, names in OUTCOME.items()
        for name in names
        if lines.asked(args.only, OUTCOME, where, name)
    ]
    lines.run("outcome", configs, partial(one, args.data, str(args.work.resolve())), args.jobs)


if __name__ == "__main__":
    main()
