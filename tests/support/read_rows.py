"""Read a file in a process of its own: what came of it, the seconds it took, and the most memory that was held."""

from __future__ import annotations

import json
import sys
import time

from fuzz_rows import peak

from alphatoken_curate.errors import InputError
from alphatoken_curate.rows.read import read_rows

if __name__ == "__main__":
    before, began = peak(), time.monotonic()
    try:
        result = read_rows(sys.argv[1:])
        told = {"rows": [row.line for row in result.rows], "bad": [(bad.line, bad.reason) for bad in result.bad]}
    except InputError as error:
        told = {"refused": str(error)}
    print(json.dumps(told | {"seconds": time.monotonic() - began, "peak": peak(), "before": before}))
