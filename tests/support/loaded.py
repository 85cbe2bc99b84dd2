"""What a command imports, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

HEAVY = frozenset({"torch", "transformers", "datasets", "peft", "trl", "tokenizers"})
"""Packages that take seconds to import."""

_CODE = """
import json, sys
from alphatoken_curate.cli.main import main
sys.argv = ["alphatoken-curate", *json.loads(sys.argv[1])]
try:
    main()
finally:
    print("\\n" + json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@dataclass(frozen=True)
class Loaded:
    """How a command ended, what it said, and the packages that were imported by then."""

    code: int
    out: str
    err: str
    modules: set[str]


def loaded_by(*arguments: object) -> Loaded:
    """Run a command line."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", _CODE, json.dumps(list(map(str, arguments)))],
        capture_output=True,
        text=True,
        check=False,
    )
    out, _, modules = done.stdout.rstrip("\n").rpartition("\n")
    return Loaded(code=done.returncode, out=out, err=done.stderr, modules=set(json.loads(modules)))
