"""What `card.py run` found, as one page of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Found = dict[str, Any]

WANTED = 0.7
"""Of the speed of a forward: what three layers should reach where a quarter of each row is prompt."""


def page(report: Found) -> str:
    """The whole page, of as many steps as there are by now."""
    told = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    lines = [told["card"], f"packed from {told['commit']}", f"Python {told['python']}, CUDA {told['cuda']}, {versions}"]
    for name, step in report["steps"].items():
        lines += ["", f"{TITLES[name]}: {_ended(step)}"]
        found = step.get("found")
        if found:
            lines += [f"  {line}" for line in TOLD[name](found)]
        if "said" in step:
            lines += ["  last lines it printed:", *(f"  | {line[:200]}" for line in step["said"][-12:])]
    return "\n".join(lines) + "\n"


def _ended(step: Found) -> str:
    return f"{step['ended']}, {step['seconds']} s" if "seconds" in step else str(step["ended"])


def _tests(found: Found) -> Iterator[str]:
    yield f"{found['passed']} passed, {len(found['failed'])} failed, {found['skipped']} skipped"
    for one in found["failed"]:
        yield f"FAILED {one['test'].rpartition('/')[2]}: {(one['said'].splitlines() or [''])[-1][:150]}"


def _tables(found: Found) -> Iterator[str]:
    yield found["head"]
    for table in found["tables"]:
        yield from ("", *table.splitlines())


def _three_layers(found: Found) -> Iterator[str]:
    yield from _tables(found)
    if "CPU" in found["head"]:
        return  # which says nothing of a card
    quarter = found["jobs"][found["prompt"].index(0.25)]
    for told in quarter:
        if told["job"].startswith("3") and "seconds" in told:
            speed = 1 / told["times_forward"]
            word = "reaches" if speed >= WANTED else "misses"
            yield f"{told['job']} at 25% prompt: {speed:.0%} of its forward's speed, which {word} {WANTED:.0%}"


def _whole_run(found: Found) -> Iterator[str]:
    yield _model(found)
    if "shards_before_kill" in found:
        yield f"killed after {found['shards_before_kill']} shards"
    if "resume_seconds" in found:
        yield f"started again, it ended in {found['resume_seconds']} s:"
        yield from (f"| {line}" for line in found["resume_said"])
    for name in ("mask_0_said", "mask_1_said", "export_said"):
        if name in found:
            yield from (f"{name.removesuffix('_said')}: {line}" for line in found[name][:2])
    if "score_seconds" in found:
        same = "the same bytes" if found["same_bytes"] else "other bytes"
        rate = found["tokens"] / found["score_seconds"]
        yield f"unbroken: {found['score_seconds']} s, {rate:,.0f} tokens/s with all that a command does; {same}"
    if "largest_difference" in found:
        yield "largest difference of the two, in parts of the largest value:"
        yield from _worst(found["largest_difference"])


def _model(found: Found) -> str:
    return (
        f"{found['parameters']:,} parameters in bfloat16 and a reference; {found['rows']} rows,"
        f" {found['tokens']:,} tokens, {found['response_tokens']:,} of responses"
    )


def _worst(columns: dict[str, float]) -> Iterator[str]:
    """Four columns a line."""
    told = [f"{name} {value:.1e}" for name, value in columns.items()]
    yield from (f"  {', '.join(told[at : at + 4])}" for at in range(0, len(told), 4))


def _same_as_cpu(found: Found) -> Iterator[str]:
    yield f"float32, largest difference in parts of the largest value (wanted: {found['within']:.0e}):"
    for estimator, columns in found["largest_difference"].items():
        yield f"{estimator}:"
        yield from _worst(columns)


def _memory(found: Found) -> Iterator[str]:
    yield _model(found)
    if "estimated_peak_mib" in found:
        yield f"check --estimate: {found['estimated_seconds']:.1f} s, {found['estimated_peak_mib']:,.0f} MiB"
    if "peak_mib" in found:
        ratio = found["estimated_peak_mib"] / found["peak_mib"]
        yield f"score: {found['score_seconds']:.1f} s, {found['peak_mib']:,.0f} MiB; estimated over found: {ratio:.2f}"


def _profile(found: Found) -> Iterator[str]:
    for name, told in found.items():
        yield f"{name}: {told['seconds']:.3f} s, of which the device was at work {told['busy_seconds']:.3f} s"
        for one in told["top"]:
            yield f"  {one['share']:>6.1%} {one['seconds']:>9.4f} s {one['calls']:>6} x {one['kernel']}"


TITLES = {
    "tests": "Tests that need a card",
    "three_layers": "What three layers cost",
    "all_layers": "What all layers cost",
    "whole_run": "A whole run, killed and started again",
    "same_as_cpu": "The same as on the CPU",
    "memory": "Peak memory beside what check --estimate says",
    "profile": "Where the time goes with three layers",
}
TOLD: dict[str, Callable[[Found], Iterator[str]]] = {
    "tests": _tests,
    "three_layers": _three_layers,
    "all_layers": _tables,
    "whole_run": _whole_run,
    "same_as_cpu": _same_as_cpu,
    "memory": _memory,
    "profile": _profile,
}
"""By step: the lines of what it found, which may be a part of what it looks for."""
