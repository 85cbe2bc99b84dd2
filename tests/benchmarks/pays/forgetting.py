"""What a training at a rate that makes the model forget costs what it knew, and what each arm gives back.

    python tests/benchmarks/pays/forgetting.py

Forgotten is the loss of 32 passages of fiction after training less that before it, in nats a token. All tokens are told
at a lower rate too: an arm that forgets as much as that, at no lower loss of held rows, is no remedy. `±` is a 95%
interval over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import lines
from referee import FORGETTING_RATE, PLAIN
from verdict import by_arm, held_loss
from writing import markdown, with_interval

STAGE = "forgetting"

HEAD = ("arm", "seeds", "loss", "gain", "retention loss", "forgotten", "less forgotten than by all tokens")


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The arms that lines are of, least forgotten first; "" unless all tokens were trained at the rate of the stage."""
    arms = by_arm(found)
    plain = arms.get((PLAIN, FORGETTING_RATE), {})
    rows = []
    for (arm, rate), by_seed in arms.items():
        if seeds := sorted(plain.keys() & by_seed.keys()):
            name = f"{arm}, {rate:g}" if arm == PLAIN else arm
            rows.append(_row(name, [by_seed[s] for s in seeds], [plain[s] for s in seeds]))
    return markdown(HEAD, [row for _, row in sorted(rows)]) if rows else ""


def _row(name: str, mine: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> tuple[float, list[str]]:
    """What is forgotten, by which arms are sorted, and the row of an arm."""
    pairs = list(zip(mine, plain, strict=True))
    gain = [held_loss(own) - held_loss(one) for one, own in pairs]
    back = [_retention(own) - _retention(one) for one, own in pairs]
    forgotten = mean(_retention(one) - own["curve"][0]["retention_loss"] for one, own in pairs)
    told = [name, str(len(mine)), f"{mean(map(held_loss, mine)):.3f}", with_interval(gain)]
    return forgotten, [*told, f"{mean(map(_retention, mine)):.3f}", f"{forgotten:.3f}", with_interval(back)]


def _retention(found: Mapping[str, Any]) -> float:
    return float(found["curve"][-1]["retention_loss"])


def report() -> str:
    """The table there are lines for, of each model."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines.read("referee"):
        if line["config"]["stage"] == STAGE:
            found.setdefault(line["config"]["model"], []).append(line)
    return "\n\n".join(f"### {model}\n\n{told}" for model, some in found.items() if (told := table(some)))


if __name__ == "__main__":
    print(report())
