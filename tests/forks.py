"""Commands as processes of their own, forked from one that has imported everything, and killed where a test says.

A process started from nothing spends seconds on imports. Here one server imports them once; it is asked over a pipe
to fork, and each fork is a whole `alphatoken-curate` command that ends, or is ended, by itself.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import alphatoken_curate

_IMPORTS = (
    "alphatoken_curate.cli.main",
    "alphatoken_curate.cli.mask",
    "alphatoken_curate.cli.score",
    "alphatoken_curate.cli.terminal",
    "rich.progress",
    "safetensors.torch",
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)


@dataclass(frozen=True)
class Process:
    """How a command ended: exit code, or minus the signal that ended it; what it said; its life in seconds."""

    code: int
    err: str
    seconds: float


class Forks:
    """The server, from outside."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.communicate(timeout=60)

    def run(
        self, *arguments: object, kill_at: str = "", after: float = -1, once: Path | None = None, signal: int = 9
    ) -> Process:
        """A command that is sent `signal` `after` so many seconds, or once a file is there; or kills itself."""
        assert self._server.stdin is not None and self._server.stdout is not None
        order = {"arguments": [str(a) for a in arguments], "kill_at": kill_at, "after": after, "signal": signal}
        order |= {"once": None if once is None else str(once), "err": str(self._folder / "stderr")}
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        ended = json.loads(self._server.stdout.readline())
        return Process(code=ended["code"], err=(self._folder / "stderr").read_text(), seconds=ended["seconds"])


def _child(order: dict[str, Any]) -> None:
    from alphatoken_curate.atomic import KILL_AT
    from alphatoken_curate.cli.main import main

    os.environ[KILL_AT] = order["kill_at"]
    err = os.open(order["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(err, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ["alphatoken-curate", *order["arguments"]]
    main()


def _fork(order: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _child(order)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            sys.stderr.flush()
            os._exit(code)
    sent = False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        past = time.monotonic() - began
        if not sent and (0 <= order["after"] <= past or (order["once"] and os.path.exists(order["once"]))):
            os.kill(child, order["signal"])
            sent = True
        time.sleep(0.005)
    return {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - began}


def _serve() -> None:
    for name in _IMPORTS:
        importlib.import_module(name)
    for name in alphatoken_curate.__all__:
        getattr(alphatoken_curate, name)
    for line in sys.stdin:
        print(json.dumps(_fork(json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve()
