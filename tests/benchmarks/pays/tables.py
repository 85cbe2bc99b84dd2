"""Tables and figures from the result lines; nothing is typed by hand.

Prints every table there are lines for. `--readme` writes those that results/README.md marks by
`<!-- pays: NAME SETTING -->`, and those of all settings of one behind `<!-- NAME -->`; `--svg DIR` draws the outcomes:

    python tests/benchmarks/pays/tables.py --readme
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import forgetting
import lines
from referee import PLAIN
from verdict import report
from writing import markdown, with_interval


def fidelity(setting: str) -> str:
    """Each ranking beside the exact effect, the nearest first."""
    found = [line for line in lines.read("fidelity") if line["config"]["setting"] == setting]
    names = ["spearman_plain", "positive_kept_plain", "spearman_adamw", "positive_kept_adamw", "bad_found"]
    names = [name for name in names if any(name in line["found"] for line in found)]
    found.sort(key=lambda line: -line["found"]["spearman_plain"])
    rows = [[line["config"]["ranking"], *(f"{line['found'][name]:.2f}" for name in names)] for line in found]
    return markdown(["ranking", *names], rows)


def counterfactual(setting: str) -> str:
    """The gap of each ranking at each share, and how far random drops spread."""
    found = [line for line in lines.read("counterfactual") if line["config"]["setting"] == setting]
    loss: dict[tuple[str, float], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in found:
        c = line["config"]
        loss[c["ranking"], c["share"]][c["without"]].append(line["found"]["target_loss"])
    shares = sorted({share for _, share in loss if share})
    rows = []
    for name in dict.fromkeys(name for name, _ in loss if name != "random"):
        gaps = [_gap(loss.get((name, share), {})) for share in shares]
        rows.append([name, *("" if gap is None else f"{1000 * gap:+.1f}" for gap in gaps)])
    noise = [loss.get(("random", share), {}).get("top", []) for share in shares]
    spread = [f"± {2000 * math.sqrt(2) * stdev(x):.1f}" if len(x) > 1 else "" for x in noise]
    rows.append(["random (twice the spread of a gap)", *spread])
    return markdown(["ranking", *(f"{share:.0%}" for share in shares)], rows)


def _gap(losses: dict[str, list[float]]) -> float | None:
    return mean(losses["top"]) - mean(losses["bottom"]) if {"top", "bottom"} <= set(losses) else None


def by_selection(setting: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Results of each selection by seed."""
    found: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in lines.read("outcome"):
        if line["config"]["setting"] == setting:
            found[line["config"]["selection"]][line["config"]["seed"]] = line["found"]
    return found


def outcome(setting: str) -> str:
    """Losses after training beside training on all tokens, the best first."""
    found = by_selection(setting)
    plain = found.get("all tokens", {})
    names = sorted(found, key=lambda name: mean(one["curve"][-1]["target_loss"] for one in found[name].values()))
    has_bad = any(one["bad_tokens"] for one in plain.values())
    more = ["dpo_loss", "pair_accuracy"] if setting == "preference" else ["token_accuracy"]
    rows = [[name, *_outcome_row(found[name], plain, more, has_bad=has_bad)] for name in names]
    head = ["selection", "seeds", "kept", *(["bad kept"] if has_bad else []), "target loss", "less than all tokens"]
    return markdown([*head, "at equal kept tokens", "retention loss", *(name.replace("_", " ") for name in more)], rows)


def _outcome_row(
    mine: dict[int, dict[str, Any]], plain: dict[int, dict[str, Any]], more: Sequence[str], *, has_bad: bool
) -> list[str]:
    ends = {seed: one["curve"][-1] for seed, one in mine.items()}
    both = [seed for seed in ends if seed in plain]
    gained = [plain[s]["curve"][-1]["target_loss"] - ends[s]["target_loss"] for s in both]
    level = [_at_kept(plain[s]["curve"], ends[s]["kept"]) - ends[s]["target_loss"] for s in both]
    row = [str(len(ends)), f"{mean(e['kept'] for e in ends.values()) / _offered(mine):.0%}"]
    if has_bad:
        row.append(f"{mean(one['kept_bad'] / one['bad_tokens'] for one in mine.values()):.0%}")
    row += [with_interval([e["target_loss"] for e in ends.values()])]
    row += [with_interval(gained) if gained else "", with_interval(level) if level else ""]
    return row + [with_interval([e[name] for e in ends.values()]) for name in ("retention_loss", *more)]


def _offered(mine: dict[int, dict[str, Any]]) -> float:
    """Response tokens of all steps, from the share of them that a static mask keeps."""
    return mean(one["offered"] for one in mine.values())


def _at_kept(curve: Sequence[dict[str, float]], kept: float) -> float:
    """Target loss after so many tokens, between measurements by straight lines."""
    for before, after in itertools.pairwise(curve):
        if before["kept"] <= kept <= after["kept"]:
            share = (kept - before["kept"]) / (after["kept"] - before["kept"])
            return float(before["target_loss"] + share * (after["target_loss"] - before["target_loss"]))
    return float(curve[-1]["target_loss"])


# ------------------------------------------------------------------------------------------------------ the first look

AS_REHEARSED, VALUES = "as rehearsed", "values"


def rehearsal() -> str:
    """Of every setting there are lines for: its values, what training on them left, and what other trainings leave."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines.read("rehearsal"):
        found[line["config"]["setting"].removesuffix(" 128")].append(line)
    parts = []
    for setting, mine in found.items():
        values = next((line["found"] for line in mine if line["config"]["selection"] == VALUES), None)
        trained = [line for line in mine if line["config"]["selection"] != VALUES]
        tables = [_values(values) if values else "", _as_rehearsed(trained), _transfer(trained)]
        parts.append("\n\n".join([f"### {setting}", *(_said_once(table, parts) for table in tables if table)]))
    return "\n\n".join(parts)


def _said_once(table: str, before: Sequence[str]) -> str:
    """A table whose rows name what an earlier one has, of the same training for another outcome, as such."""
    said = {row for part in before for row in part.splitlines() if not set(row) <= set("|-: ")}
    rows = table.splitlines()
    same = [row.replace(" |", ", as above |", 1) if row in said else row for row in rows[2:]]
    return "\n".join([*rows[:2], *same])


def _values(found: dict[str, Any]) -> str:
    """Tokens below 0, and beyond their error; how values find what is bad, by token and by row."""
    names = ["below_0", "beyond_error", "by_chance", "rows_beyond_error", "area", "row_area", "spearman_with_all"]
    by_rows = {n: told for n, told in found.items() if n.isdecimal()}
    names = [name for name in names if any(name in told for told in by_rows.values())]
    rows = [[n, *(_number(by_rows[n].get(name)) for name in names)] for n in sorted(by_rows, key=int, reverse=True)]
    return markdown(["target rows", *(name.replace("_", " ") for name in names)], rows)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.2f}" if abs(value) <= 1 else f"{value:.0f}"


def _as_rehearsed(found: Sequence[dict[str, Any]]) -> str:
    """Losses after the training that was rehearsed, the best first."""
    mine = {line["config"]["selection"]: line["found"] for line in found if _training(line) == AS_REHEARSED}
    if not mine:
        return ""
    ends = {name: one["curve"][-1] for name, one in mine.items()}
    has_bad = any(one["bad_tokens"] for one in mine.values())
    more = ["dpo_loss", "pair_accuracy"] if all("dpo_loss" in end for end in ends.values()) else ["token_accuracy"]
    rows = []
    for name in sorted(mine, key=lambda name: ends[name]["target_loss"]):
        one, end = mine[name], ends[name]
        row = [name, f"{one['kept_tokens'] / one['response_tokens']:.0%}"]
        row += [f"{one['kept_bad'] / one['bad_tokens']:.0%}"] if has_bad else []
        row += [f"{end['target_loss']:.3f}", _less(ends, name)]
        rows.append([*row, f"{end['retention_loss']:.3f}", *(f"{end[one]:.3f}" for one in more)])
    head = ["selection", "kept", *(["bad kept"] if has_bad else []), "target loss", "less than all tokens"]
    return markdown([*head, "retention loss", *(one.replace("_", " ") for one in more)], rows)


def _transfer(found: Sequence[dict[str, Any]]) -> str:
    """Target loss after other trainings with the same weights, and what it is less than that of all tokens there."""
    by_training: dict[str, dict[str, Any]] = defaultdict(dict)
    for line in found:
        by_training[_training(line)][line["config"]["selection"]] = line["found"]["curve"][-1]
    for name, ends in by_training.items():  # all tokens train alike, whatever was rehearsed
        if plain := by_training.get(name.removesuffix(", rehearsed"), {}).get(PLAIN):
            ends[PLAIN] = plain
    others = [name for name in by_training if name != AS_REHEARSED]
    if not others:
        return ""
    columns = [AS_REHEARSED, *others]
    rows = []
    for name in dict.fromkeys(name for other in others for name in by_training[other]):
        there = [(by_training[column], by_training[column].get(name)) for column in columns]
        cells = ["" if end is None else f"{end['target_loss']:.3f} ({_less(ends, name)})" for ends, end in there]
        rows.append([name, *cells])
    return markdown(["selection", *columns], rows)


def _training(line: dict[str, Any]) -> str:
    return str(line["config"]["training"])


def _less(ends: dict[str, Any], name: str) -> str:
    return f"{ends[PLAIN]['target_loss'] - ends[name]['target_loss']:+.3f}" if PLAIN in ends else ""


# ------------------------------------------------------------------------------------------------------------ detection


def detection() -> str:
    """Areas under the curve of each number, by token, and by row where rows are bad; over one column a noise."""
    found = {line["config"]["setting"]: line["found"] for line in lines.read("detection")}
    columns = [
        (setting, measure)
        for setting, numbers in found.items()
        for measure in ("area", "row_area")
        if all(measure in told for told in numbers.values())
    ]
    names = dict.fromkeys(name for numbers in found.values() for name in numbers)
    rows = [[name, *(f"{found[setting][name][measure]:.2f}" for setting, measure in columns)] for name in names]
    told = {"area": "tokens", "row_area": "rows"}
    heads = [f"{setting.removeprefix('A ')}, {told[measure]}" for setting, measure in columns]
    return markdown(["number", *heads], rows) if rows else ""


# ------------------------------------------------------------------------------------------------------------- adapters


def adapters() -> str:
    """Of every setting: how values of a LoRA go with those of all parameters, and what LoRAs trained by TRL leave."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines.read("adapters"):
        found[line["config"]["setting"]].append(line)
    parts = []
    for setting, mine in found.items():
        values = next((line["found"] for line in mine if line["config"]["selection"] == VALUES), None)
        parts += [f"### {setting}", *([_agreement(values)] if values else []), _adapters(mine)]
    return "\n\n".join(filter(None, parts))


def _agreement(found: dict[str, Any]) -> str:
    names = [name for name in found if name != "tokens"]
    return markdown([name.replace("_", " ") for name in names], [[f"{found[name]:.2f}" for name in names]])


def _adapters(found: Sequence[dict[str, Any]]) -> str:
    """Losses, the best first; those of all tokens are of the same seeds."""
    by_name: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in found:
        if line["config"]["selection"] != VALUES:
            by_name[line["config"]["selection"]][line["config"]["seed"]] = line["found"]
    plain = by_name.get("all tokens", {})
    has_bad = any(one["bad_tokens"] for seeds in by_name.values() for one in seeds.values())
    rows = []
    for name in sorted(by_name, key=lambda name: mean(one["target_loss"] for one in by_name[name].values())):
        seeds = by_name[name]
        mine, both = list(seeds.values()), [seed for seed in seeds if seed in plain]
        gained = [plain[seed]["target_loss"] - seeds[seed]["target_loss"] for seed in both]
        row = [name, str(len(mine)), f"{mean(one['kept_tokens'] / one['response_tokens'] for one in mine):.0%}"]
        row += [f"{mean(one['kept_bad'] / one['bad_tokens'] for one in mine):.0%}"] if has_bad else []
        row += [with_interval([one["target_loss"] for one in mine]), with_interval(gained) if gained else ""]
        rows.append([*row, with_interval([one["retention_loss"] for one in mine])])
    head = ["selection", "seeds", "kept", *(["bad kept"] if has_bad else []), "target loss", "less than all tokens"]
    return markdown([*head, "retention loss"], rows) if rows else ""


# --------------------------------------------------------------------------------------------------------- few to many


MEASURES = ("tokens", "within rows", "row sums", "lowest 5%", "lowest 10%", "loss in 5%", "loss in 10%")
WORTH_A_LINE = {"tokens": 0.05, "lowest 10%": 0.2}
"""A column by which no measure of these is that high is left out."""


def few_to_many() -> str:
    """Of every setting how predictions rank held rows, what they are off by, and what one setting tells of another."""
    found = lines.read("few_to_many")
    parts = []
    for setting in dict.fromkeys(line["config"]["setting"] for line in found):
        mine = [line for line in found if line["config"]["setting"] == setting]
        own = {line["config"]["rows"]: line["found"] for line in mine if line["config"]["fit"] == setting}
        others = {line["config"]["fit"]: line["found"] for line in mine if line["config"]["fit"] != setting}
        tables = [_ranked(own) if own else "", _off(own) if own else "", _across(own, others) if others else ""]
        parts.append("\n\n".join([f"### Of {setting}", *filter(None, tables)]))
    return "\n\n".join(parts)


def _ranked(own: dict[int, dict[str, Any]]) -> str:
    """Every measure by most fitted rows, and that of tokens by fewer; what predicts best comes first."""
    most, fewer = max(own), sorted(own)[:-1]
    measured = own[most]["measures"]
    rows, names = [], MEASURES
    shown = [name for name, told in measured.items() if any(told[one] >= n for one, n in WORTH_A_LINE.items())]
    for name in sorted(shown, key=lambda name: -measured[name]["tokens"]):
        early = [f"{own[n]['measures'][name]['tokens']:.2f}" for n in fewer]
        rows.append([name, *early, *(f"{measured[name][one]:.2f}" for one in names)])
    halves = own[most]["ceiling"]
    rows.append(["half of the target groups", *("" for _ in fewer), *(f"{halves[name]:.2f}" for name in names)])
    whole = [f"{_ceiling(halves[name]):.2f}" if name in MEASURES[:3] else "" for name in names]
    rows.append(["most that can be reached", *("" for _ in fewer), *whole])
    return markdown(["by", *(f"tokens, {n} rows" for n in fewer), f"tokens, {most} rows", *names[1:]], rows)


def _ceiling(halves: float) -> float:
    """Correlation of what is measured with what it measures, from that of its halves (Spearman and Brown)."""
    return math.sqrt(2 * halves / (1 + halves))


def _off(own: dict[int, dict[str, Any]]) -> str:
    """Residuals and half widths of intervals in standard deviations of the values, what these hold, and margins."""
    rows = [
        [f"{name}, {n} rows", *(f"{told[one]:.2f}" for one in ("residual", "width", "covered"))]
        for n in sorted(own)
        for name, told in sorted(own[n]["error"].items())
    ]
    return markdown(["by", "residual", "half width of the interval", "values in it"], rows)


def _across(own: dict[int, dict[str, Any]], others: dict[str, dict[str, Any]]) -> str:
    """Tokens of held rows, by models of other settings and the best column there."""
    named = {**({"itself": own[max(own)]} if own else {}), **others}
    rows = []
    for fit, found in named.items():
        measured, best = found["measures"], found["best column"]
        cells = [f"{measured[name]['tokens']:.2f}" for name in found["margin"]]
        rows.append([fit, f"{found['fitted rows']:.0f}", *cells, f"{measured[best]['tokens']:.2f} ({best})"])
    head = ["fitted on", "rows", *next(iter(named.values()))["margin"], "best column"]
    return markdown(head, rows)


# ------------------------------------------------------------------------------------------------------------- figures


def figure(setting: str) -> str:
    """Target loss of each selection: a dot for each seed, its mean as a bar; the dashed line is all tokens."""
    found = by_selection(setting)
    ends = {name: [one["curve"][-1]["target_loss"] for one in seeds.values()] for name, seeds in found.items()}
    names = sorted(ends, key=lambda name: mean(ends[name]))
    low, high = min(min(x) for x in ends.values()), max(max(x) for x in ends.values())
    left, width, line = 190, 420, 22

    def x(value: float) -> float:
        return left + width * (value - low) / ((high - low) or 1)

    height = 40 + line * len(names)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 70} {height}" role="img"'
        f' font-family="system-ui, sans-serif" font-size="12" fill="#777"><title>Target loss, {escape(setting)}</title>'
    ]
    if "all tokens" in ends:
        at = x(mean(ends["all tokens"]))
        parts.append(f'<path d="M{at:.1f} 8V{height - 28}" stroke="#777" stroke-dasharray="3 3"/>')
    for n, name in enumerate(names):
        y = 20 + line * n
        parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        parts += [f'<circle cx="{x(v):.1f}" cy="{y}" r="3.5" fill="#2166ac" fill-opacity=".6"/>' for v in ends[name]]
        at = x(mean(ends[name]))
        parts.append(f'<path d="M{at:.1f} {y - 7}v14" stroke="#b2182b" stroke-width="2"/>')
        parts.append(f'<text x="{left + width + 12}" y="{y + 4}">{mean(ends[name]):.3f}</text>')
    parts.append(f'<text x="{left}" y="{height - 8}">target loss after training, nats a token</text></svg>')
    return "\n".join(parts)


TABLES: dict[str, Callable[[str], str]] = {
    "fidelity": fidelity,
    "counterfactual": counterfactual,
    "outcome": outcome,
}
PAGE = lines.RESULTS / "README.md"
WHOLE: dict[str, Callable[[], str]] = {
    "rehearsal": rehearsal,
    "detection": detection,
    "referee": report,
    "forgetting": forgetting.report,
    "adapters": adapters,
    "few to many": few_to_many,
}
"""Of all settings together."""
MARKED = re.compile(r"(<!-- pays: (\w+) (\w+) -->\n).*?(<!-- end of pays -->)", re.DOTALL)


def filled(text: str) -> str:
    """A text with its marked tables as the lines have them now."""
    for name, tables in WHOLE.items():
        text = _between(text, name, tables())
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]](found[3])}\n{found[4]}", text)


def _between(text: str, name: str, tables: str) -> str:
    """A text with tables between the marks of a name."""
    marked = re.compile(f"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    return marked.sub(lambda found: "\n".join([found[1], *filter(None, [tables, ""]), found[2]]), text)


def main() -> None:
    """Print every table there are lines for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="write the tables of results/README.md")
    parser.add_argument("--svg", metavar="DIR", help="folder for figures")
    args = parser.parse_args()
    if args.readme:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for name, table in TABLES.items():
        for setting in dict.fromkeys(line["config"]["setting"] for line in lines.read(name)):
            print(f"\n## {name}: {setting}\n\n{table(setting)}")
    for name, tables in WHOLE.items():
        print(f"\n## {name}\n\n{tables()}")
    if args.svg:
        folder = Path(args.svg)
        folder.mkdir(parents=True, exist_ok=True)
        for setting in dict.fromkeys(line["config"]["setting"] for line in lines.read("outcome")):
            (folder / f"{setting}.svg").write_text(figure(setting) + "\n")


if __name__ == "__main__":
    main()
