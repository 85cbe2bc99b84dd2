"""The whole method on a real model: score, train with the masks, save, refresh: pytest -m slow -k chain -s.

It trains 20 steps on GSM8K, once on SFT rows and once on preference pairs, saves checkpoints on the way, scores the
same rows again at each, and prints how large each component was and how many decisions of the mask stability changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_files import Ended, command, quiet
from torch import Tensor

from alphatoken_curate import scan, verify
from alphatoken_curate.models import find_model, load_model

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[2] / "shared" / "data"
STEPS, SAVED, BATCH = 20, (5, 10, 20), 2
LEARNING_RATE = 1e-5


def head(name: str, path: Path, count: int, longest: int) -> str:
    """The first rows of a file that are short enough to train on in a test."""
    source = DATA / name
    if not source.is_file():
        pytest.skip(f"needs real rows in {DATA}")
    lines = [line for line in source.read_text().splitlines() if len(line) < longest]
    path.write_text("\n".join(lines[:count]) + "\n")
    return str(path)


def ran(*arguments: object) -> Ended:
    ended = command(*arguments)
    assert ended.code == 0, ended.err
    return ended


def log_probs(model: Any, row: dict[str, Any], branch: str) -> Tensor:
    """-log p of the tokens that train, weighed, (n,): what the mask leaves of the loss."""
    ids, weight = torch.tensor([row[f"{branch}input_ids"]]), torch.tensor(row[f"{branch}loss_weight"])
    kept = weight.nonzero().squeeze(1)
    logits = model(input_ids=ids).logits[0, kept - 1].float()
    return weight[kept] * torch.log_softmax(logits, -1).gather(1, ids[0, kept, None]).squeeze(1)


def sft_loss(model: Any, _: Any, rows: list[dict[str, Any]]) -> Tensor:
    found = torch.cat([log_probs(model, row, "") for row in rows])
    return -found.mean()


def dpo_loss(model: Any, reference: Any, rows: list[dict[str, Any]], beta: float = 0.1) -> Tensor:
    """Reference and policy are masked alike."""
    losses = []
    for row in rows:
        with torch.no_grad():
            before = [log_probs(reference, row, branch).sum() for branch in ("chosen_", "rejected_")]
        after = [log_probs(model, row, branch).sum() for branch in ("chosen_", "rejected_")]
        losses.append(-torch.nn.functional.logsigmoid(beta * (after[0] - before[0] - after[1] + before[1])))
    return torch.stack(losses).mean()


def train(run: Path, out: Path, loss_of: Callable[..., Tensor]) -> None:
    """Train on train/ of a run by AdamW, as its masks say; save checkpoints under `out`."""
    source, options = find_model("smollm2-135m"), {"dtype": torch.float32, "device": torch.device("cpu")}
    reference = load_model(source, **options) if loss_of is dpo_loss else None  # type: ignore[arg-type]
    model = load_model(source, **options).requires_grad_(True)  # type: ignore[arg-type]
    # Its weights are plain tensors by now, but transformers saves nothing that was read from GGUF.
    model.hf_quantizer = None
    del model.config.quantization_config
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    rows = scan(run, "train").collect().to_dicts()
    for step in range(1, STEPS + 1):
        first = BATCH * (step - 1) % len(rows)
        loss = loss_of(model, reference, [rows[(first + i) % len(rows)] for i in range(BATCH)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in SAVED:
            with quiet():
                model.save_pretrained(out / f"checkpoint-{step}")


def told(run: Path, generation: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ran("stats", run, "--json", "--generation", generation).out)
    return found


@pytest.mark.parametrize(("kind", "name"), [("sft", "gsm8k_sft.jsonl"), ("preference", "gsm8k_preference.jsonl")])
def test_chain_of_score_train_refresh(kind: str, name: str, tmp_path: Path) -> None:
    data = head(name, tmp_path / "data.jsonl", 32, 600)
    target = head("gsm8k_target.jsonl", tmp_path / "target.jsonl", 16, 600)
    run, out = tmp_path / "run", tmp_path / "out"
    # As published. Trained on all tokens the model learns so much that its gradients shrink, and with them stability.
    half = ("--keep", 0.5)
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
