"""The whole method on a real model: score, train with the masks, save, refresh: pytest -m slow -k chain -s.

It trains 20 steps on GSM8K, once on SFT rows and once on preference pairs, saves checkpoints on the way, scores the
same rows again at each, and prints how large each component was and how many decisions of the mask stability changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chains import SAVED, dpo_loss, ran, sft_loss, train

from alphatoken_curate import scan, verify

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[3] / "shared" / "data"


def head(name: str, path: Path, count: int, longest: int) -> str:
    """The first rows of a file that are short enough to train on in a test."""
    source = DATA / name
    if not source.is_file():
        pytest.skip(f"needs real rows in {DATA}")
    lines = [line for line in source.read_text().splitlines() if len(line) < longest]
    path.write_text("\n".join(lines[:count]) + "\n")
    return str(path)


def told(run: Path, generation: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ran("stats", run, "--json", "--generation", generation).out)
    return found


@pytest.mark.parametrize(("kind", "name"), [("sft", "gsm8k_sft.jsonl"), ("preference", "gsm8k_preference.jsonl")])
def test_chain_of_score_train_refresh(kind: str, name: str, tmp_path: Path) -> None:
    data = head(name, tmp_path / "data.jsonl", 32, 600)
    target = head("gsm8k_target.jsonl", tmp_path / "target.jsonl", 16, 600)
    run, out = tmp_path / "run", tmp_path / "out"
    # As published. Trained on all tokens the model learns so much that its gradients shrink, and with them stability.
    half = ("--keep", 0.5, "--always-keep", "none")
    ran("score", data, "--target", target, "--model", "smollm2-135m", "--fisher-rows", 32, *half, "-o", run)
    train(run, out, dpo_loss if kind == "preference" else sft_loss)
    ran("refresh", run, "--checkpoint", out)
    assert verify(run) == []
    found = [told(run, generation) for generation in range(1 + len(SAVED))]
    names = ("adapt_direct", "adapt_causal", "stab_direct", "stab_causal")
    for step, stats in zip((0, *SAVED), found, strict=True):
        spreads = "  ".join(f"{part} {stats['rms'][part]:.3g}" for part in names)
        changed = "  ".join(f"{scale} {count}" for scale, count in stats["decisions_changed"].items())
        print(f"\n{kind} step {step}: {spreads}  changed of {stats['scored_tokens']}: {changed}", end="")
        stability = max(stats["rms"]["stab_direct"], stats["rms"]["stab_causal"])
        assert stats["rms"]["adapt_direct"] > 0
        assert (stability == 0) == (step == 0) == stats["stability_is_zero"]
    grown = [stats["rms"]["stability"] for stats in found]
    assert grown == sorted(grown)
    if kind == "preference":
        margins = [scan(run, generation=g).collect()["margin"].drop_nulls().mean() for g in range(len(found))]
        assert margins[0] == 0 and margins[-1] > margins[1] > 0  # training raises what the pairs prefer
