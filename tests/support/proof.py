"""Proof of value: everything the commands write and print of the sample data and of stored older runs, as digests.

    python tests/support/proof.py /tmp/proof > before.txt

Run it before and after a change that should alter nothing, with the same library versions and the same OUT (config.yaml
names it), and `diff` the two. Some ten minutes; OUT must not be there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
STORED = ROOT / "tests" / "data"
SIDE = ("--target", "sample_data/target.jsonl", "--fisher-rows", "32", "--batch-tokens", "2048")
SCORINGS = {
    "sft": ("sample_data/sft.jsonl", *SIDE),
    "pairs": ("sample_data/preference.jsonl", *SIDE),
    "all": ("sample_data/sft.jsonl", *SIDE, "--estimator", "exact+influence",
            "--drift", "lookahead", "--lookahead-lr", "1e-5", "--lookahead-rows", "16"),
    "curved": ("sample_data/sft.jsonl", "--batch-tokens", "2048", "--estimator", "influence", "--layers", "2",
               "--precondition", "ekfac", "--precondition-rows", "16", "--retention", "sample_data/target.jsonl"),
}  # fmt: skip
MASKS = (
    ("--keep", "0.5", "--always-keep", "none"),
    ("--by", "7 - surprise", "--keep", "positive"),
    ("--keep", "0.6", "--scope", "row", "--weights", "rank", "--stability-scale", "rms"),
    ("--by", "random", "--keep", "0.3", "--scope", "batch:4", "--weights", "sigmoid"),
)
FORMS = ("hf", "llamafactory", "ms-swift", "levanter", "tinker", "megatron", "verl", "skyrl", "jsonl-weights")


def main(out: Path) -> None:
    """Make everything below `out`, and print a line for each file."""
    out.mkdir(parents=True)
    shutil.copytree(ROOT / "sample_data", out / "sample_data")
    for name, arguments in SCORINGS.items():
        ran(out, f"score {name}", "score", *arguments, "-o", name)
        looked_at(out, name)
    for version in sorted(STORED.glob("v*.tar.xz")):
        stem = version.name.partition(".")[0]
        with tarfile.open(version) as archive:
            archive.extractall(out / stem, filter="data")
        for kind in ("sft", "preference"):
            looked_at(out, f"{stem}/{kind}")
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        print(hashlib.sha256(path.read_bytes()).hexdigest(), path.relative_to(out))


def looked_at(out: Path, run: str) -> None:
    """Everything that is made of a run's values, and printed of it."""
    for number, settings in enumerate(MASKS):
        ran(out, f"{run} mask {number}", "mask", run, *settings)
    for form in FORMS:
        ran(out, f"{run} export {form}", "export", run, "--for", form, "-o", f"{run}.{form}", "--binarize")
    ran(out, f"{run} export strict", "export", run, "--for", "hf", "--strict", "-o", f"{run}.strict", "--binarize")
    ran(out, f"{run} report", "report", run, "-o", f"{run}.html")
    ran(out, f"{run} show", "show", run, "--row", "1")
    ran(out, f"{run} show tokens", "show", run, "--row", "2", "--tokens")
    ran(out, f"{run} stats", "stats", run)
    ran(out, f"{run} stats json", "stats", run, "--json")
    ran(out, f"{run} stats svg", "stats", run, "--svg", f"{run}.svg")
    ran(out, f"{run} compare", "compare", run, run)
    ran(out, f"{run} verify", "verify", run)


def ran(out: Path, name: str, *arguments: str) -> None:
    """Run a command in `out`, and keep what it says on stdout, how it ended, and the last line of errors."""
    command = Path(sys.executable).with_name("alphatoken-curate")
    env = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([command, *arguments], cwd=out, env=env, capture_output=True, text=True, check=False)
    (out / "said").mkdir(exist_ok=True)
    told = out / "said" / (name.replace("/", "-").replace(" ", "-") + ".txt")
    errors = [line for line in done.stderr.splitlines() if line.startswith(("Error", "!"))]
    told.write_text(f"exit {done.returncode}\n{done.stdout}" + "\n".join(errors) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
