"""Runs in the environment of tinker: the code of an export's README, and what its Datum objects hold, as JSON lines.

drive_tinker.py CODE: a file of Python that makes `data`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    names: dict[str, Any] = {}
    exec(compile(Path(sys.argv[1]).read_text(encoding="utf-8"), sys.argv[1], "exec"), names)
    for datum in names["data"]:
        lists = {name: _list(tensor) for name, tensor in datum.loss_fn_inputs.items()}
        print(json.dumps({"model_input": datum.model_input.to_ints(), **lists}))


def _list(tensor: Any) -> dict[str, Any]:
    return {"dtype": tensor.dtype, "data": tensor.tolist()}


if __name__ == "__main__":
    main()
