"""What is tried: selections by name, and which of them in which setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selections import Selection

PUBLISHED: Mapping[str, Any] = {}
EXACT = {"estimator": "exact"}
INFLUENCE = {"estimator": "influence", "layers": "all"}
ADAM = {"precondition": "adam", "precondition_rows": 64}
EKFAC = {"precondition": "ekfac", "precondition_rows": 64}
INFLUENCE_EKFAC = {**INFLUENCE, **EKFAC}
INFLUENCE_ASTRA = {**INFLUENCE, "precondition": "astra", "precondition_rows": 64}
MEMORY = {"retention": "remember"}
RHO1 = {"reference": "tuned"}
"""A reference trained on clean rows of the target's task, beside all others; the next two on others."""
TARGET_RHO1 = {"reference": "tuned on target"}
OWN_RHO1 = {"reference": "tuned on train"}
MORE = {"target": "beside"}
"""As many target rows as Rho-1's reference is trained on."""
LOOKAHEAD = {"drift": "lookahead", "lookahead_lr": 3e-5, "lookahead_rows": 64}
SURPRISE = "nll / (entropy + 0.1)"
"""A token's loss over what the model expected it to be: high where the model was sure of another token."""
BY_RATIO = {
    # What `reference_ratio` names.
    "by": "CASE WHEN nll < reference_nll THEN EXP(nll - reference_nll) ELSE 1 END",
    "keep": 1.0,
    "weights": "relu",
}

SELECTIONS: dict[str, Selection] = {
    "all tokens": Selection(who="all"),
    "oracle": Selection(who="oracle"),
    **{f"random {keep}": Selection(mask={"by": "random", "keep": keep}) for keep in (0.5, 0.8, 0.9, 0.95)},
    **{f"nll high {keep}": Selection(mask={"by": "nll", "keep": keep}) for keep in (0.5, 0.8)},
    **{f"nll low {keep}": Selection(mask={"by": "-nll", "keep": keep}) for keep in (0.5, 0.8, 0.9, 0.95)},
    **{f"surprise low {keep}": Selection(mask={"by": f"-{SURPRISE}", "keep": keep}) for keep in (0.5, 0.8, 0.9, 0.95)},
    "surprise under 7": Selection(mask={"by": f"7 - {SURPRISE}", "keep": "positive"}),
    "excess loss over -0.5": Selection(score=RHO1, mask={"by": "nll - reference_nll + 0.5", "keep": "positive"}),
    "surprise soft": Selection(mask={"by": f"1 / (1 + {SURPRISE} / 4)", "keep": 1.0, "weights": "relu"}),
    "excess loss soft": Selection(score=RHO1, mask=BY_RATIO),
    "excess loss over target rows soft": Selection(score=TARGET_RHO1, mask=BY_RATIO),
    "all, then surprise low 0.95": Selection(
        mask={"by": f"-{SURPRISE}", "keep": 0.95, "generation": "latest"}, refresh=16, warm=True
    ),
    "all, then published 0.5": Selection(mask={"keep": 0.5}, refresh=16, warm=True),
    **{f"entropy {keep}": Selection(mask={"by": "entropy", "keep": keep}) for keep in (0.5, 0.8)},
    **{
        f"excess loss {keep}": Selection(score=RHO1, mask={"by": "nll - reference_nll", "keep": keep})
        for keep in (0.5, 0.8, 0.9)
    },
    **{
        f"excess loss over {name} {keep}": Selection(score=score, mask={"by": "nll - reference_nll", "keep": keep})
        for name, score in {"target rows": TARGET_RHO1, "own rows": OWN_RHO1}.items()
        for keep in (0.8, 0.9)
    },
    **{
        f"excess low {keep}": Selection(score=RHO1, mask={"by": "reference_nll - nll", "keep": keep})
        for keep in (0.8, 0.95)
    },
    "reference low 0.95": Selection(score=RHO1, mask={"by": "-reference_nll", "keep": 0.95}),
    **{
        f"{name} {keep}": Selection(score=score, mask={"keep": keep})
        for name, score in {
            "published": PUBLISHED,
            "exact": EXACT,
            "influence": INFLUENCE,
            "influence adam": {**INFLUENCE, **ADAM},
            "influence ekfac": INFLUENCE_EKFAC,
            "influence astra": INFLUENCE_ASTRA,
            "published ekfac": EKFAC,
            "published, more target rows": MORE,
            "influence ekfac, more target rows": {**INFLUENCE_EKFAC, **MORE},
        }.items()
        for keep in (0.3, 0.5, 0.8, 0.9, 0.95, "positive")
    },
    **{
        f"{name} {keep}": Selection(
            score={"estimator": estimator, **MEMORY}, mask={"keep": keep, "stability_scale": "rms"}
        )
        for name, estimator in {"retention rms": "published", "influence retention rms": "influence"}.items()
        for keep in (0.5, 0.8)
    },
    **{
        f"{name} {weights}": Selection(score=score, mask={"keep": 1.0, "weights": weights})
        for name, score in {
            "published": PUBLISHED,
            "influence": INFLUENCE,
            "influence ekfac": INFLUENCE_EKFAC,
        }.items()
        for weights in ("rank", "sigmoid")
    },
    **{
        f"{name} {keep} every {k}": Selection(score=score, mask={"keep": keep}, refresh=k)
        for name, score in {"published": PUBLISHED, "influence": INFLUENCE}.items()
        for keep in (0.5, 0.8)
        for k in (4, 8, 16)
    },
    "published 0.5 every 8, stability rms": Selection(mask={"keep": 0.5, "stability_scale": "rms"}, refresh=8),
    "published 0.5 every 8, no stability": Selection(mask={"keep": 0.5, "stability_weight": 0.0}, refresh=8),
    "published 0.5, lookahead rms": Selection(score=LOOKAHEAD, mask={"keep": 0.5, "stability_scale": "rms"}),
    **{
        f"retention alone 0.8{name}": Selection(
            score=MEMORY, mask={"by": "stab_direct + stab_causal", "keep": 0.8}, refresh=k
        )
        for name, k in {"": 0, " every 8": 8}.items()
    },
}

OUTCOME: dict[str, list[str]] = {
    "corrupted": [
        "all tokens",
        "oracle",
        "random 0.5",
        "nll low 0.95",
        "influence 0.8",
        "surprise low 0.95",
        "nll low 0.9",
        "excess loss 0.8",
        "published 0.5",
        "published ekfac 0.8",
        "influence positive",
        "published 0.5 every 8",
        "published 0.5 every 8, stability rms",
        "all, then surprise low 0.95",
        "published sigmoid",
        "influence rank",
        "published 0.3",
        "published 0.8",
        "exact 0.5",
        "influence 0.5",
        "published ekfac 0.5",
        "published 0.5 every 4",
        "published 0.5 every 16",
        "published 0.5 every 8, no stability",
        "published 0.5, lookahead rms",
        "nll high 0.5",
        "nll low 0.5",
        "entropy 0.5",
        "entropy 0.8",
        "excess low 0.95",
        "excess loss 0.9",
        "surprise under 7",
        "surprise soft",
        "excess loss over -0.5",
        "excess loss soft",
        "excess loss over target rows 0.9",
        "excess loss over own rows 0.9",
        "influence ekfac 0.8",
        "influence ekfac 0.9",
        "influence ekfac sigmoid",
        "influence ekfac, more target rows 0.8",
        "published, more target rows 0.5",
    ],
    "lightly": ["all tokens", "oracle", "surprise under 7", "excess loss soft"],
    "mixture": ["all tokens", "oracle", "published 0.5", "random 0.5", "published ekfac 0.5"],
    "narrow": [
        "all tokens",
        "random 0.5",
        "published 0.5",
        "surprise low 0.95",
        "retention rms 0.5",
        "influence retention rms 0.8",
        "retention alone 0.8",
        "published 0.5 every 8",
        "published 0.5 every 8, stability rms",
        "retention alone 0.8 every 8",
        "nll low 0.8",
    ],
    "preference": ["all tokens", "published 0.5", "random 0.5", "surprise low 0.95"],
    "clean": [
        "all tokens",
        "random 0.5",
        "published 0.5",
        "influence 0.8",
        "excess loss 0.8",
        "surprise low 0.95",
        "all, then surprise low 0.95",
        "published 0.5 every 8",
        "published sigmoid",
        "influence rank",
        "entropy 0.5",
        "entropy 0.8",
        "nll high 0.8",
        "excess loss 0.9",
        "surprise under 7",
        "surprise soft",
        "excess loss over -0.5",
        "excess loss soft",
        "published ekfac 0.8",
        "influence ekfac 0.8",
        "influence ekfac 0.9",
        "influence ekfac sigmoid",
    ],
}

ALL, HALF = {"layers": "all"}, {"layers": 15}
KFAC = {"precondition": "kfac", "precondition_rows": 64}

RANKINGS: dict[str, tuple[Mapping[str, Any], str]] = {
    "published K=3": (PUBLISHED, "value"),
    "published K=15": (HALF, "value"),
    "published K=all": (ALL, "value"),
    "exact direct K=3": (EXACT, "adapt_direct"),
    "exact direct + causal K=3": (EXACT, "value"),
    "exact direct K=all": ({**EXACT, **ALL}, "adapt_direct"),
    "exact direct + causal K=all": ({**EXACT, **ALL}, "value"),
    "influence K=3": ({"estimator": "influence"}, "value"),
    "influence K=15": ({"estimator": "influence", **HALF}, "value"),
    "influence K=all": (INFLUENCE, "value"),
    "published K=3 adam": (ADAM, "value"),
    "published K=3 kfac": (KFAC, "value"),
    "published K=3 ekfac": (EKFAC, "value"),
    "influence K=3 adam": ({"estimator": "influence", **ADAM}, "value"),
    "influence K=3 ekfac": ({"estimator": "influence", **EKFAC}, "value"),
    "influence K=all adam": ({**INFLUENCE, **ADAM}, "value"),
    "influence K=all ekfac": (INFLUENCE_EKFAC, "value"),
    "nll": (PUBLISHED, "nll"),
    "entropy": (PUBLISHED, "entropy"),
    "excess loss": (RHO1, "nll - reference_nll"),
    "surprise": (PUBLISHED, SURPRISE),
    "excess loss over target rows": (TARGET_RHO1, "nll - reference_nll"),
}
"""Of each: what is scored, and the column or expression that ranks."""

FIDELITY = ("clean", "corrupted")

COUNTERFACTUAL: dict[str, list[str]] = {
    "clean": [
        "random",
        "influence K=all",
        "influence K=all ekfac",
        "published K=3",
        "nll",
        "entropy",
        "surprise",
        "excess loss",
        "excess loss over target rows",
    ],
    "corrupted": [
        "random",
        "oracle",
        "nll",
        "entropy",
        "surprise",
        "published K=3",
        "published K=3 ekfac",
        "influence K=all",
        "influence K=all ekfac",
        "excess loss",
        "excess loss over target rows",
    ],
}
