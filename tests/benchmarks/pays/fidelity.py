"""How near each estimator comes to the exact first-order effect of leaving a token's loss out.

    python tests/benchmarks/pays/fidelity.py --data ../shared/data --jobs 1

The truth is <gradient of the token's loss, M> over *all* parameters in float32, with M the gradient of the target loss
(`plain`: a step of gradient descent) or that gradient divided by the root of the second moment of training gradients
(`adamw`: a step of AdamW). Of each estimator, scoring set and preconditioner: Spearman's correlation of its value to
either truth, the share of all positive effect that the top half by value holds (1 would be the true top half's), and,
where tokens are known to be bad, the share of pairs (bad, good) that it orders right (area under the curve).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lines
import numpy as np
import torch
from counterfactual import ranking
from grid import FIDELITY, RANKINGS
from numpy.typing import NDArray
from settings import MODEL, Setting, about, rows_sha256, setting, token_rows

from alphatoken_curate.directions.losses import row_means
from alphatoken_curate.directions.parameters import rest_gradient, rest_of_batch
from alphatoken_curate.directions.precondition import estimate, precondition
from alphatoken_curate.directions.target import target_gradient
from alphatoken_curate.engine.capture import captured
from alphatoken_curate.models.load import find_model, load_model
from alphatoken_curate.reading.compare import spearman
from alphatoken_curate.signals.influence import make_scorer
from alphatoken_curate.tokens.plan import collate, plan_batches

ROWS = 32
EPS = 1e-8


def one(data: str, work: str, config: dict[str, Any]) -> dict[str, float | None]:
    """Compare one ranking with the truth."""
    where = setting(config["setting"], Path(data))
    where = replace(where, name=f"{where.name}-{ROWS}", train=where.train[:ROWS])
    path = Path(work) / f"{where.name}-{rows_sha256(where)[:12]}-truth.npz"
    if not path.is_file():
        np.savez(path, **truth(where))
    rank = ranking(where, config["ranking"], Path(work), 0)
    mine = np.concatenate([r[row.response] for r, row in zip(rank, where.train, strict=True)])
    found = dict[str, float | None]()
    with np.load(path) as stored:
        for name in ("plain", "adamw"):
            found[f"spearman_{name}"] = spearman(mine, stored[name])
            found[f"positive_kept_{name}"] = positive_kept(mine, stored[name])
    good = np.concatenate([row.good[row.response] for row in where.train])
    if not good.all():
        found["bad_found"] = area(mine, good)
    return found


def truth(where: Setting) -> dict[str, NDArray[np.float64]]:
    """The effect of each response token over all parameters, (N,), under gradient descent and under AdamW."""
    model = load_model(find_model(MODEL), dtype=torch.float32, device=torch.device("cpu"))
    rows, target = token_rows(where.train), token_rows(where.target)
    with captured(model, "all", "all") as scoring:
        batches = [collate(target, some) for some in plan_batches(target, 2048)]
        plain = target_gradient(scoring, batches, all_positions=True) + rest_gradient(scoring, batches)
        singles = [collate(rows, [i]) for i in range(len(rows))]
        moments = estimate("adam", scoring, lambda: singles, row_means)
        count = len(scoring.maps)
        adamw = precondition("adam", moments, scoring, plain[:count], eps=EPS, damping=0.0)
        squares = [torch.zeros_like(x) for x in plain[count:]]
        for single in singles:
            for total, grad in zip(squares, rest_of_batch(scoring, single, row_means), strict=True):
                total.add_(grad.square() / len(rows))
        adamw += [x / (v.sqrt() + EPS) for x, v in zip(plain[count:], squares, strict=True)]
        scorer = make_scorer(scoring, [plain, adamw], "influence", 0)
        signals = [scorer.score(single).influence for single in singles]
    both = torch.cat([s for s in signals if s is not None], dim=1).double().numpy()
    return {"plain": both[0], "adamw": both[1]}


def positive_kept(x: NDArray[np.float64], effect: NDArray[np.float64]) -> float:
    """Share of all positive effect that lies in the top half by x."""
    top = np.argsort(x, kind="stable")[len(x) // 2 :]
    return float(np.maximum(effect[top], 0).sum() / np.maximum(effect, 0).sum())


def area(x: NDArray[np.float64], good: NDArray[np.bool_]) -> float:
    """Share of pairs of a good and a bad token in which the good one ranks higher; ties count half."""
    bad = np.sort(x[~good])
    below = np.searchsorted(bad, x[good], "left") + np.searchsorted(bad, x[good], "right")
    return float(below.mean() / 2 / len(bad))


def main() -> None:
    """Run what has no line yet."""
    args = lines.parser(__doc__).parse_args()
    configs = [
        {
            "setting": where,
            "about": about(where, Path(args.data)),
            "ranking": name,
            "score": dict(RANKINGS[name][0]),
            "by": RANKINGS[name][1],
            "rows": ROWS,
        }
        for where in FIDELITY
        for name in RANKINGS
        if lines.asked(args.only, FIDELITY, where, name)
    ]
    lines.run("fidelity", configs, partial(one, args.data, str(args.work.resolve())), args.jobs)


if __name__ == "__main__":
    main()
