"""Runs in an environment of TRL: the code of an export's README, and a few steps.

drive_trl.py CODE MODEL SETTINGS: a file of Python, the model's folder, and a YAML file for TRL's configuration.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml


def main() -> None:
    code, model, settings = sys.argv[1:]
    text = Path(code).read_text(encoding="utf-8")
    # The README leaves output, steps and the device to the user: they are put in front of what it sets itself.
    given = text.replace("SFTConfig(max_length", "SFTConfig(**settings, max_length")
    if given == text:
        raise SystemExit(f"{code}: no SFTConfig to add settings to")
    names = {"model": model, "settings": yaml.safe_load(Path(settings).read_text())}
    exec(compile(given, code, "exec"), names)
    names["trainer"].train()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
