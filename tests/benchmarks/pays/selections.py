"""Which tokens train: selections by name, each a scoring and a mask of the tool itself, and their weights.

A scoring is made once for each setting and its settings, in a run folder under `--work`, and shared by the masks.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from settings import MODEL, Row, Setting, records, rows_sha256
from training import Weights, load, train

import alphatoken_curate as atc

SCORE = {"dtype": "bfloat16", "batch_tokens": 2048, "fisher_rows": 64, "device": "cpu"}
"""Settings that every scoring shares."""

TUNED_ON = {"tuned": "beside", "tuned on target": "target", "tuned on train": "train"}
"""Of each reference that is trained here, on which rows of a setting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Settings of `score` and `mask`, and how many steps later both are taken again (0: never).

    `who`: `score`, or `all` response tokens, or the `oracle`'s, or `rehearsal` (`rehearsals`, which reads `score` and
    `mask` in its own way). `warm`: all response tokens until the first refresh.
    """

    who: str = "score"
    score: Mapping[str, Any] = field(default_factory=dict)
    mask: Mapping[str, Any] = field(default_factory=dict)
    refresh: int = 0
    warm: bool = False

    def about(self) -> dict[str, Any]:
        """What a result line says of it."""
        about = {"who": self.who, "score": dict(self.score), "mask": dict(self.mask), "refresh": self.refresh}
        return about | {"warm": True} if self.warm else about


def weights_of(chosen: Selection, setting: Setting, work: Path, seed: int) -> Weights:
    """The weights of each training row's (or branch's) tokens."""
    if chosen.who == "all" or chosen.warm:
        return [row.response.astype(np.float32) for row in setting.train]
    if chosen.who == "oracle":
        return [(row.response & row.good).astype(np.float32) for row in setting.train]
    run = scored(chosen.score, setting, work)
    with alone(run):
        return masked(run, chosen, setting, seed)


def masked(run: Path, chosen: Selection, setting: Setting, seed: int) -> Weights:
    """Weights by a mask made now, of the newest scoring."""
    found = atc.mask(run, atc.MaskConfig(**{"seed": seed, "always_keep": "none", **chosen.mask}))
    weights: Weights = [np.zeros(len(row.ids), np.float32) for row in setting.train]
    for line in atc.scan(run, "train", mask=found.mask).collect().iter_rows(named=True):
        for n, branch in enumerate(("chosen_", "rejected_") if setting.pairs else ("",)):
            at = line["row_id"] * (2 if setting.pairs else 1) + n
            weights[at][:] = line[f"{branch}loss_weight"]
    return weights


class Refresher:
    """Scores again on the way: saves the model, refreshes a copy of its run, and makes the mask of what it finds."""

    def __init__(self, chosen: Selection, setting: Setting, work: Path, seed: int) -> None:
        self.chosen, self.setting, self.seed = chosen, setting, seed
        origin = scored(chosen.score, setting, work)
        self.run = work / f"refreshed-{origin.name}-{digest(chosen.about(), seed)}"
        shutil.rmtree(self.run, ignore_errors=True)
        with alone(origin):
            shutil.copytree(origin, self.run)

    def __call__(self, model: Any, step: int) -> Weights:
        """New weights, at the model as it is."""
        checkpoint = self.run.with_name(f"{self.run.name}-model")
        save(model, checkpoint)
        atc.refresh(self.run, str(checkpoint))
        shutil.rmtree(checkpoint)
        return masked(self.run, self.chosen, self.setting, self.seed)

    def close(self) -> None:
        """Remove what a refreshed run leaves."""
        shutil.rmtree(self.run, ignore_errors=True)


def scored(settings: Mapping[str, Any], setting: Setting, work: Path) -> Path:
    """The run folder of a scoring, scored now if it is not there; gradients of the same target rows are made once."""
    about = {**SCORE, **settings}
    run = work / f"{setting.name}-{digest(about, rows_sha256(setting))}"
    first = work / f"first-{digest(about, rows_sha256(setting, ['target', 'remember', 'beside']))}"
    with alone(run):
        if not (run / "manifest.json").is_file():
            files = written(setting, work / "rows" / rows_sha256(setting)[:12])
            given = {"model": MODEL, "target": "target", **about}
            if given.get("reference") in TUNED_ON:
                given["reference"] = str(tuned(setting, TUNED_ON[given["reference"]], work))
            for name in ("target", "retention"):
                if given.get(name) in files:
                    given[name] = str(files[given[name]])
            if first.exists():
                given["reuse"] = str(first.resolve())
            atc.score(atc.ScoreConfig(data=(str(files["train"]),), **given), run)
        if not first.exists():
            first.unlink(missing_ok=True)
            with suppress(FileExistsError):
                first.symlink_to(run, target_is_directory=True)
    return run


def written(setting: Setting, work: Path) -> dict[str, Path]:
    """Files of a setting's rows, as `score` reads them."""
    work.mkdir(parents=True, exist_ok=True)
    parts = ("train", "target", "beside", "remember")
    found = {name: work / f"{setting.name}-{name}.jsonl" for name in parts}
    for name in parts:
        lines = records(getattr(setting, name), pairs=setting.pairs and name == "train")
        content = b"".join(orjson.dumps(line) + b"\n" for line in lines)
        if not found[name].is_file() or found[name].read_bytes() != content:
            found[name].write_bytes(content)
    return found


def tuned(setting: Setting, part: str, work: Path) -> Path:
    """A reference as Rho-1 has one: the model trained on rows of one part of a setting."""
    folder = work / f"tuned-{digest(rows_sha256(setting, [part]), setting.learning_rate)}"
    with alone(folder):
        if not folder.is_dir():
            model, rows = load(), getattr(setting, part)
            plain = replace(setting, name=part, train=rows)
            train(model, plain, [row.response.astype(np.float32) for row in rows], seed=0, measure_every=10**9)
            save(model, folder)
    return folder


def save(model: Any, folder: Path) -> None:
    """A checkpoint, whole once its folder is there."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    part.rename(folder)


def counts(where: Setting, weights: Weights) -> dict[str, int]:
    """Response tokens of a setting, how many of them train, and how many of either are known to be bad."""
    kept = sum(int((weight > 0).sum()) for weight in weights)
    good = sum(int(((weight > 0) & row.good).sum()) for weight, row in zip(weights, where.train, strict=True))
    bad = sum(int((row.response & ~row.good).sum()) for row in where.train)
    return {
        "response_tokens": trainable(where.train),
        "kept_tokens": kept,
        "kept_bad": kept - good,
        "bad_tokens": bad,
    }


def trainable(rows: list[Row]) -> int:
    """Response tokens of some rows."""
    return sum(int(row.response.sum()) for row in rows)


def digest(*about: Any) -> str:
    """Of what can be written as JSON, enough of it for a name."""
    return hashlib.sha256(orjson.dumps(about, option=orjson.OPT_SORT_KEYS)).hexdigest()[:12]


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time inside, for one path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
