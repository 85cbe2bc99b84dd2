"""Commands as processes of their own, forked from one that has imported everything, and killed where a test says.

A process started from nothing spends seconds on imports. Here one server imports them once; it is asked over a pipe
to fork, and each fork is a whole `alphatoken-curate` command that ends, or is ended, by itself.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import faults

import alphatoken_curate

_IMPORTS = (
    "alphatoken_curate.cli.main",
    "alphatoken_curate.cli.mask",
    "alphatoken_curate.cli.refresh",
    "alphatoken_curate.cli.score",
    "alphatoken_curate.cli.terminal",
    "rich.progress",
    "safetensors.torch",
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)

_LONGEST = 120.0
"""Seconds after which a command that does not end is killed: `watch` whose moment to stop never came."""


@dataclass(frozen=True)
class Process:
    """How a command ended: exit code, or minus the signal that ended it; what it said; its life in seconds."""

    code: int
    out: str
    err: str
    seconds: float
    meanwhile: Process | None = None
    """The command that ran while this one was stopped."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail where what runs inside, in this process, does not end in time: a `watch` that waits for ever."""

    def late(number: int, frame: object) -> None:
        raise AssertionError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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

    def run(self, *arguments: object, **settings: Any) -> Process:
        """`begin` a command and wait for its `end`."""
        self.begin(*arguments, **settings)
        return self.end()

    def begin(
        self,
        *arguments: object,
        kill_at: str = "",
        after: float = -1,
        once: Path | None = None,
        said: str = "",
        signal: int = 9,
        meanwhile: Sequence[object] = (),
        fake: bool = False,
        log: Path | None = None,
        refuse: tuple[str, str] | None = None,
        clock_back: bool = False,
        spill: bool = False,
    ) -> None:
        """A command that is sent `signal` `after` so many seconds, once a file is there or once it `said` some words.

        With `meanwhile` it is stopped at that moment for as long as another command takes, then goes on. With `kill_at`
        it kills itself. `fake`, `log`, `refuse`, `clock_back`, `spill`: `fake_scorer`, `log_scoring`, `refuse`,
        `clock_back` and `spill` of `faults`.
        """
        assert self._server.stdin is not None
        order = {"arguments": [str(a) for a in arguments], "kill_at": kill_at, "after": after, "signal": signal}
        order |= {"once": None if once is None else str(once), "said": said, "err": str(self._folder / "stderr")}
        order |= {"out": str(self._folder / "stdout"), "meanwhile": [str(a) for a in meanwhile]}
        order |= {"fake": fake, "log": None if log is None else str(log), "refuse": refuse, "clock_back": clock_back}
        order |= {"spill": spill}
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()

    def end(self) -> Process:
        """Wait for the command that was begun."""
        assert self._server.stdout is not None
        ended = json.loads(self._server.stdout.readline())
        other = ended.pop("meanwhile")
        return Process(**ended, meanwhile=Process(**other) if other else None)


def _child(order: dict[str, Any]) -> None:
    from alphatoken_curate.cli.main import main
    from alphatoken_curate.runs.atomic import KILL_AT

    if order.get("fake"):
        faults.fake_scorer()
    if order.get("log"):
        faults.log_scoring(Path(order["log"]))
    if order.get("clock_back"):
        faults.clock_back()
    if order.get("spill"):
        faults.spill()
    if order.get("refuse"):
        faults.refuse(*order["refuse"])
    os.environ[KILL_AT] = order["kill_at"]
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_APPEND), descriptor)
    sys.argv = ["alphatoken-curate", *order["arguments"]]
    main()


def _fork(order: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    for name in ("out", "err"):
        Path(order[name]).write_bytes(b"")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _child(order)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
    sent, other = False, None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        past = time.monotonic() - began
        if past > _LONGEST:
            os.kill(child, signal.SIGKILL)
        elif not sent and _is_time(order, past):
            sent = True
            if order["meanwhile"]:
                other = _meanwhile(child, order)
            else:
                os.kill(child, order["signal"])
        left = order["after"] - past
        time.sleep(min(0.005, left) if left > 0 else 0.005)
    told = {name: Path(order[name]).read_text() for name in ("out", "err")}
    seconds = time.monotonic() - began
    return {"code": os.waitstatus_to_exitcode(status), "seconds": seconds, "meanwhile": other, **told}


def _is_time(order: dict[str, Any], past: float) -> bool:
    if order["said"] and order["said"].encode() in Path(order["out"]).read_bytes() + Path(order["err"]).read_bytes():
        return True
    return 0 <= order["after"] <= past or bool(order["once"] and os.path.exists(order["once"]))


def _meanwhile(child: int, order: dict[str, Any]) -> dict[str, Any]:
    os.kill(child, signal.SIGSTOP)
    always = {"arguments": order["meanwhile"], "meanwhile": [], "once": None, "said": "", "after": -1, "kill_at": ""}
    ended = _fork({name: order[name] + "-meanwhile" for name in ("out", "err")} | always)
    os.kill(child, signal.SIGCONT)
    ended.pop("meanwhile")
    return ended


def _serve() -> None:
    for name in _IMPORTS:
        importlib.import_module(name)
    for name in alphatoken_curate.__all__:
        getattr(alphatoken_curate, name)
    for line in sys.stdin:
        print(json.dumps(_fork(json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve()
