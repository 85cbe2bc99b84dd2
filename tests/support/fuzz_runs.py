"""Whole small runs of random rows, flags, expressions, masks and exports, one after the other, under one oracle.

`python tests/support/fuzz_runs.py --seconds 600` begins with `--seed 0` and goes on upwards; a round that falls is told
with its seed and its commands, and runs again alone by `--seed N --rounds 1`. Every command has to end in time, with a
documented exit code and no traceback; what it says has to be what the files hold and what `verify` says; and whatever
is refused leaves what was committed as it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fuzz_flags
import torch
from corpus import corpus_tokenizer, save_corpus_models
from forks import Forks, within
from fuzz_oracle import CODES, Fell, Stored, check_answers, check_counts, check_export, check_mask, hold, said, stored
from fuzz_rows_made import Material, Rows, make_rows
from light import light_scorer
from tiny_files import Ended, command, contents

from alphatoken_curate.rows.files import legible

LIMIT = 60.0
"""Seconds that a command may take: a hundred times what most do."""
SHOWN = "[\u200c-\u200e]"
"""What `show` lets through: joiners within words, and its own mark behind text that is written from the right."""
STAY = "The values are scored and stay"
"""What is said where a scoring is whole and gives no such mask."""
KNOWN = "rows whose answers are known"
REAL, FORKED = 0.2, 0.06
"""Shares of rounds scored by a real tiny model, and of those whose commands are processes of their own."""


@dataclass
class Bench:
    """What all rounds share."""

    folder: Path
    models: dict[str, str]
    material: Material
    forks: Forks
    tokenizer: Any
    codes: Counter[str] = field(default_factory=Counter)


class Round:
    """One run from its rows to its exports; `commands`: what was done."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench, self.seed, self.draw = bench, seed, random.Random(seed)
        self.folder = bench.folder / f"round-{seed}"
        self.folder.mkdir(parents=True)
        self.run = self.folder / "run"
        self.commands: list[str] = []
        self.forked = self.draw.random() < FORKED
        self.real = self.forked or self.draw.random() < REAL
        self.score: list[str] = []

    def command(self, *arguments: object) -> Ended:
        """A command that ends as it is documented."""
        name = str(arguments[0])
        self.commands.append(shlex.join(map(str, arguments)))
        try:
            if self.forked:
                done = self.bench.forks.run(*arguments)
                ended = Ended(done.code, done.out, done.err)
            else:
                with within(LIMIT), contextlib.nullcontext() if self.real else light_scorer():
                    ended = command(*arguments)
        except Exception as error:
            raise Fell(f"{name} raised\n{traceback.format_exc()}") from error
        self.bench.codes[f"{name} {ended.code}"] += 1
        told = ended.out + ended.err
        hold(ended.code in CODES and "Traceback" not in told, f"{name} ended with {ended.code}: {told[-3000:]}")
        hold(ended.code == 0 or bool(ended.err.strip()), f"{name} ended with {ended.code} and said nothing")
        told = re.sub(SHOWN, "", told) if name == "show" else told
        hold(told == legible(told), f"{name} commands a terminal: {told!r}")
        return ended

    def on_run(self, *arguments: object) -> Ended:
        """A command that may change the run: only by what it adds, and where it is refused not at all."""
        before = contents(self.run) if self.run.exists() else {}
        ended = self.command(*arguments)
        after = contents(self.run) if self.run.exists() else {}
        finished = "manifest.json" in before
        if ended.code and finished and STAY not in ended.err:
            changed = sorted(name for name in before | after if before.get(name) != after.get(name))
            hold(not changed, f"refused, and changed {changed}")
        kept = [name for name in before if name.startswith(("values/", "train/")) and before[name] != after.get(name)]
        hold(not kept, f"{arguments[0]} changed {kept}, which were committed")
        if ended.code == 0 or (self.run / "manifest.json").exists():
            self.verified()
        return ended

    def verified(self) -> None:
        ended = self.command("verify", self.run)
        hold(ended.code == 0, f"verify: {ended.err}")

    # --- the parts of a round

    def go(self) -> None:
        """All of it."""
        if not self.scored():
            return
        for _ in range(self.draw.randrange(2, 7)):
            step = self.draw.choices(
                (self.mask, self.read, self.export, self.refresh, self.again, self.other, self.replay),
                weights=(6, 5, 6, 2, 1, 1, 1),
            )[0]
            step()

    def rows(self) -> tuple[list[Rows], list[str]]:
        """Files of DATA and the flags of a scoring."""
        draw, most = self.draw, 4 if self.forked else 12
        pairs = draw.random() < 0.25
        make = {"draw": draw, "material": self.bench.material, "folder": self.folder, "pairs": pairs}
        place = self.folder / "data"
        place.mkdir()
        data = [
            make_rows(name=f"rows{i}", most=most, **make | {"folder": place}) for i in range(draw.choice((1, 1, 1, 2)))
        ]
        beside = fuzz_flags.Beside(self.bench.models, folder=self.folder)
        for name, share in (("target", 0.5), ("retention", 0.12), ("prompts", 0.1)):
            if draw.random() < share:
                setattr(beside, name, make_rows(name=name, most=4, calm=True, **make).path)
        flags = fuzz_flags.score_flags(draw, beside, real=self.real)
        return data, flags + (fuzz_flags.mask_flags(draw, 1, mild=True) if draw.random() < 0.3 else [])

    def scored(self) -> bool:
        """Whether there is a run."""
        data, flags = self.rows()
        paths = [str(one.path) for one in data]
        if self.draw.random() < 0.1:
            paths = [self.draw.choice((str(self.folder / "data"), str(self.folder / "data" / "*.*")))]
        self.score = ["score", *paths, *flags, "-o", str(self.run)]
        checked = self.command("check", *paths, *flags) if self.draw.random() < 0.3 else None
        ended = self.on_run(*self.score)
        hold(checked is None or self._agree(checked.code, ended), f"check ended with {checked and checked.code}")
        if ended.code:
            self._check_refused(ended)
            return False
        found = stored(self.run)
        counts = check_counts(found)
        told = said(r"^  rows +([\d,]+) scored of ([\d,]+)", ended.out)
        hold(told == (counts["scored"], counts["read"]), f"{told} was said of {counts}")
        for word, name in (("held out as target", "target"), ("failed", "failed"), ("rejected", "rejected")):
            aside = re.search(rf"^  rows .*[( ](\d+) {word}", ended.out, re.MULTILINE)
            hold(counts[name] == (int(aside[1]) if aside else 0), f"{aside} {word} was said of {counts}")
        if all(one.count is not None for one in data):
            limit = int(flags[flags.index("--limit") + 1]) if "--limit" in flags else 10**9
            wanted = min(limit, sum(one.count or 0 for one in data))
            hold(counts["read"] == wanted, f"{counts['read']} rows were read of {wanted}")
        if checked is not None:
            to_score, target = said(r"^rows +[\d,]+ +([\d,]+) to score.*?, ([\d,]+) target", checked.out)
            hold(
                (to_score, target) == (counts["scored"] + counts["failed"], len_target(found, counts, target)), "check"
            )
        self.bench.codes[KNOWN] += check_answers(found, data, self.bench.tokenizer, flags)
        self._check_mask(found, ended)
        return True

    def _check_refused(self, ended: Ended) -> None:
        """There is no run, or one whose values gave no such mask, and that gives another."""
        if (self.run / "manifest.json").exists():
            hold(STAY in ended.err, f"refused, and there is a run: {ended.err}")
            ended = self.on_run("mask", self.run)
            hold(ended.code == 0, f"no mask at all: {ended.err}")
            self._check_mask(stored(self.run), ended)

    def _agree(self, checked: int, ended: Ended) -> bool:
        """What `check` ends with is told of `score`, which looks at more."""
        return ended.code in {0: (0, 2, 3), 2: (2,), 3: (2, 3)}.get(checked, ())

    def _check_mask(self, found: Stored, ended: Ended) -> None:
        numbers = re.search(r"train/mask=(\d+)", ended.out)
        hold(numbers is not None, "no mask was named")
        told = said(r"^  tokens +([\d,]+) of ([\d,]+) response tokens kept", ended.out)
        for mask in found.train:
            counts = check_mask(found, mask)
            hold(numbers is None or mask != int(numbers[1]) or counts == told, f"{told} was said of {counts}")

    def masks(self) -> tuple[int, int]:
        """How many masks and generations there are."""
        manifest = json.loads((self.run / "manifest.json").read_bytes())
        return len(manifest["masks"]), len(manifest["generations"])

    def mask(self) -> None:
        """Another mask."""
        before = contents(self.run)
        ended = self.on_run("mask", self.run, *fuzz_flags.mask_flags(self.draw, self.masks()[1]))
        if ended.code == 0:
            hold(not ended.out.startswith("Already") or contents(self.run) == before, "it was there, and was written")
            self._check_mask(stored(self.run), ended)

    def read(self) -> None:
        """What only reads: nothing is changed but for the page."""
        before, (masks, generations) = contents(self.run), self.masks()
        page = self.folder / "page.html"
        rows = json.loads((self.run / "manifest.json").read_bytes())["counts"]["read"]
        some = ["--generation", str(self.draw.randrange(generations + 1))] if self.draw.random() < 0.2 else []
        for _ in range(self.draw.randrange(1, 4)):
            tried = self.draw.choice(
                (
                    ["show", self.run, *fuzz_flags.show_flags(self.draw, rows), *some],
                    ["show", self.run, *fuzz_flags.show_flags(self.draw, rows)],
                    ["stats", self.run, *some],
                    ["stats", self.run, "--json"],
                    ["compare", self.run, *self._compared(generations)],
                    ["report", self.run, "-o", page],
                )
            )
            ended = self.command(*tried)
            hold(contents(self.run) == before, f"{tried[0]} changed the run")
            hold(tried[0] not in ("stats", "report") or bool(some) or ended.code == 0, f"{tried[0]}: {ended.err}")
            if tried[0] == "stats" and "--json" in tried:
                told, found = json.loads(ended.out), stored(self.run)
                newest = found.manifest["masks"][-1]
                counts = (told["rows"]["read"], len(told["masks"]), told["kept_tokens"])
                hold(counts == (rows, masks, newest["kept_tokens"]), f"stats: {counts}")

    def _compared(self, generations: int) -> list[object]:
        """With what a run is compared: where it has one generation, mostly with itself."""
        other: list[object] = [self.run] if generations == 1 and self.draw.random() < 0.9 else []
        return other + self.draw.choice(([], ["--json"], ["--generations", "0,0"], ["--changed", "0"]))

    def export(self) -> None:
        """The rows of a mask as files; verified, and read as their trainer does."""
        flags = fuzz_flags.export_flags(self.draw, self.masks()[0])
        place = self.folder / f"export-{len(self.commands)}"
        before = contents(self.run)
        ended = self.command("export", self.run, *flags, "-o", place)
        hold(contents(self.run) == before, "export changed the run")
        hold((ended.code == 0) == place.exists(), f"ended with {ended.code}, and the folder is there: {place.exists()}")
        if ended.code == 0:
            hold(self.command("verify", place).code == 0, "an export is not as it was written")
            check_export(stored(self.run), place, ended, flags)

    def refresh(self) -> None:
        """The rows scored again at another checkpoint, or at none."""
        names = [*self.bench.models.values(), *self.bench.models.values(), str(self.folder / "none"), str(self.run)]
        ended = self.on_run("refresh", self.run, "--checkpoint", self.draw.choice(names))
        if ended.code == 0 and "Nothing was written" not in ended.out:
            found = stored(self.run)
            check_counts(found)
            self._check_mask(found, ended)

    def again(self) -> None:
        """The same scoring again leaves all as it is; of a run with more generations, its mask takes the newest."""
        before = contents(self.run)
        ended = self.on_run(*self.score)
        hold(ended.code == 0, f"again: {ended.err}")
        if self.masks()[1] == 1:
            hold(contents(self.run) == before, f"again: {ended.out}")
        else:
            self._check_mask(stored(self.run), ended)

    def other(self) -> None:
        """A scoring by other settings, or of rows that were edited, in the same folder."""
        if self.draw.random() < 0.5:
            path = min((self.folder / "data").iterdir())
            held, when = path.read_bytes(), path.stat()
            path.write_bytes(held + b'\n{"prompt": "more", "completion": " of it"}\n')
            ended = self.on_run(*self.score)
            path.write_bytes(held)
            os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))
            hold(ended.code != 0 or "--limit" in self.score, "rows that were edited are taken for those of before")
            return
        flag = self.draw.choice((["--max-length", "31"], ["--layers", "1"], ["--seed", "5"], ["--turns", "last"]))
        ended = self.on_run(*self.score, *flag)
        if ended.code == 0:
            self._check_mask(stored(self.run), ended)

    def replay(self) -> None:
        """The run's own config gives the same values in another folder."""
        other = self.folder / f"replay-{len(self.commands)}"
        reuse = ["--reuse", self.run] if self.draw.random() < 0.3 else []
        ended = self.command("score", "-c", self.run / "config.yaml", *reuse, "-o", other)
        hold(ended.code == 0, f"its own config: {ended.err}")
        one, two = (contents(folder / "values" / "generation=0") for folder in (self.run, other))
        hold(one == two, "its own config gives other values")


def len_target(found: Stored, counts: dict[str, int], told: int) -> int:
    """Rows held out; `check` counts those of --target, which no run holds, as told."""
    return counts["target"] or told


# --- the campaign


def bench(folder: Path) -> Bench:
    """A bench in a folder, whose server of processes has not begun."""
    return Bench(folder, save_corpus_models(folder / "models"), Material.of_corpus(), Forks(folder), corpus_tokenizer())


def tried(on: Bench, seed: int, keep: bool = False) -> str | None:
    """One round; what fell, with the commands that led there."""
    here, one = os.getcwd(), Round(on, seed)
    os.chdir(one.folder)
    try:
        one.go()
    except Exception as error:
        fell = str(error) if isinstance(error, Fell) else traceback.format_exc()
        steps = "\n".join(f"  {line[:600]}" for line in one.commands)
        return f"seed {seed}{' (real)' if one.real else ''}{' (forked)' if one.forked else ''}: {fell}\n{steps}"
    finally:
        os.chdir(here)
        if not keep:
            shutil.rmtree(one.folder)
    return None


def rounds(first: int, most: int, seconds: float) -> Iterator[int]:
    """Seeds, for as long as there is time."""
    began = time.monotonic()
    for seed in range(first, first + most):
        if time.monotonic() - began > seconds:
            return
        yield seed


def main() -> int:
    """Run rounds; the exit code is 1 where one fell."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seed", type=int, default=0, help="the first round")
    options.add_argument("--rounds", type=int, default=10**9)
    options.add_argument("--seconds", type=float, default=600.0)
    options.add_argument("--keep", type=Path, help="a folder for the files of all rounds, which stay")
    asked = options.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    began, done, fell = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        on = bench(asked.keep or Path(temporary))
        with on.forks:
            for seed in rounds(asked.seed, asked.rounds, asked.seconds):
                found = tried(on, seed, keep=asked.keep is not None)
                done, fell = done + 1, fell + (found is not None)
                if found is not None:
                    print(f"{found}\nagain: python tests/support/fuzz_runs.py --seed {seed} --rounds 1", flush=True)
    known = on.codes.pop(KNOWN, 0)
    told = {
        "rounds": done,
        "fell": fell,
        "known": known,
        "commands": sum(on.codes.values()),
        "codes": dict(sorted(on.codes.items())),
    }
    print(json.dumps(told | {"seconds": round(time.monotonic() - began, 1)}))
    return fell > 0


if __name__ == "__main__":
    sys.exit(main())
