"""Workers on the machines of a Ray cluster: an actor for each, which Ray places where cards or cores are free.

All machines see the same run folder and models under the same paths, and have the same releases. Ray restarts and
retries nothing: an actor that is gone, with its machine or without, costs what it was doing, as any worker's end does.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from alphatoken_curate.errors import CurateError, UsageError
from alphatoken_curate.scoring.identity import versions
from alphatoken_curate.scoring.named import check_shared
from alphatoken_curate.scoring.pool import Beginning, Member, Pool, Told, answer, begun, unsent
from alphatoken_curate.scoring.spawned import portable
from alphatoken_curate.scoring.worker import Task, Worker

_PATIENCE = 10.0
"""Seconds in which a cluster must answer."""

_LOOK = 30.0
"""Seconds after which it is said that the cluster has no room for a worker."""


@dataclass(slots=True, eq=False)
class _Actor:
    """`awaited`: what comes of the last it was told."""

    actor: Any
    awaited: Any


class Ray(Pool[_Actor]):
    """`workers` actors on the cluster at `address`; `auto` is one for each card, or as many as cores have room for.

    `address`: as `ray.init` takes it, such as `auto` for the cluster of this machine. None is that of RAY_ADDRESS, or
    without it a cluster of this machine alone, which ends with the scoring. Where this process is connected to one by
    itself (`ray.init`), it is that, and stays so.
    """

    def __init__(self, address: str | None = None, workers: int | Literal["auto"] = "auto") -> None:
        super().__init__(workers)
        self._address = address
        self._ray: Any = None
        self._ours = False

    def device(self, name: str) -> str:
        """As `Engine`: what the machines of the cluster have."""
        check_shared(name)
        cards = self._cluster().cluster_resources().get("GPU", 0)
        if name == "cuda" and not cards:
            raise UsageError(f"--device {name}: the Ray cluster has no card. Use --device cpu.")
        return "cuda" if cards and name in ("auto", "cuda") else "cpu"

    def sharing(self) -> int:
        """As `Engine`: each has a card of its own, or as many are on a machine as its cores have room for."""
        assert self._beginning is not None, "begin() comes first"
        if _on_cards(self._beginning):
            return 1
        machines = [one["Resources"].get("CPU", 0) for one in self._cluster().nodes() if one["Alive"]]
        return max(1, min(self.workers, int(max(machines, default=0) // _each(self._beginning))))

    def close(self) -> None:
        """As `Engine`."""
        super().close()
        if self._ray is not None and self._ours:
            self._ray.shutdown()
        self._ray, self._ours = None, False

    def _cluster(self) -> Any:
        """Ray, connected. Raises UsageError where it is not installed, or the cluster does not answer."""
        if self._ray is None and (known := sys.modules.get("ray")) is not None and known.is_initialized():
            self._ray = known
        if self._ray is None:
            address = self._address or os.environ.get("RAY_ADDRESS") or "local"
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            if address == "local":
                # A token of its own, which Ray would keep in the home folder otherwise; read when it is imported.
                os.environ.setdefault("RAY_AUTH_MODE", "token")
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            try:
                import ray
            except ImportError as error:
                raise UsageError("--engine ray: Ray is not installed: pip install 'alphatoken-curate[ray]'") from error
            try:
                _check_open(address)
                ray.init(address, include_dashboard=False if address == "local" else None, **_QUIET)
            except (ray.exceptions.RayError, ValueError, RuntimeError, OSError) as error:
                raise UsageError(f"--engine ray: no cluster at {address} ({_first_line(error)}).") from error
            self._ray, self._ours = ray, True
        return self._ray

    def _most(self, beginning: Beginning) -> int:
        resources = self._cluster().cluster_resources()
        return max(1, int(resources.get("GPU" if _on_cards(beginning) else "CPU", 0) // _each(beginning)))

    def _start(self, beginning: Beginning) -> _Actor:
        ray = self._cluster()
        wants = {"num_gpus": 1, "num_cpus": 1} if _on_cards(beginning) else {"num_cpus": _each(beginning)}
        made = ray.remote(Serving).options(max_restarts=0, max_task_retries=0, **wants).remote()
        return _Actor(made, made.begin.remote(beginning))

    def _hand(self, member: Member[_Actor], message: Beginning | tuple[str, Task]) -> None:
        actor = member.handle.actor
        if isinstance(message, Beginning):
            member.handle.awaited = actor.begin.remote(message)
        else:
            member.handle.awaited = actor.do.remote(*message)

    def _hear(self) -> Iterator[tuple[Member[_Actor], str, Any]]:
        awaited = {member.handle.awaited: member for member in self._members if member.handle.awaited is not None}
        found, _ = self._ray.wait(list(awaited), num_returns=1, timeout=_LOOK)
        if not found:
            yield from self._told_of_room()
        for one in found:
            member = awaited[one]
            member.handle.awaited = None
            try:
                said = self._ray.get(one)
            except self._ray.exceptions.RayTaskError as error:
                said = [("failed", _failed(member, error))]
            except self._ray.exceptions.RayError as error:
                yield member, "died", f"was lost ({_last_line(error)})"
                continue
            for what, told in said:
                yield member, what, told

    def _told_of_room(self) -> Iterator[tuple[Member[_Actor], str, Any]]:
        """Say so where the cluster has had no room for a worker for long."""
        starting = [member for member in self._members if not member.ready]
        if starting and len(starting) == len(self._members):
            yield starting[0], "warn", "The Ray cluster has no room for a worker: waiting for cards or cores."

    def _stop(self, members: Sequence[Member[_Actor]]) -> None:
        for member in members:
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(member.handle.actor)


_QUIET = {"log_to_driver": False, "configure_logging": False, "logging_level": "error"}


class Serving:
    """What an actor does. Each method gives what it says, one after the other, as `Pool` hears it."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def begin(self, beginning: Beginning) -> list[tuple[str, Any]]:
        """Be ready for a generation, once this machine is found to be as the one that leads."""
        if odd := _odd(beginning):
            return [("failed", CurateError(f"{socket.gethostname()}: {odd}"))]
        self._worker = None
        try:
            self._worker = begun(beginning)
        except Exception as error:
            return [("failed", portable(error))]
        return [("ready", None)]

    def do(self, which: str, task: Task) -> list[tuple[str, Any]]:
        """A task."""
        assert self._worker is not None, "begin comes first"
        said: list[tuple[str, Any]] = []
        said.append(answer(self._worker, which, task, Told(lambda what, told: said.append((what, told)))))
        return said


def _odd(beginning: Beginning) -> str | None:
    """What keeps a machine from computing what another one would."""
    spec = beginning.spec
    folder = spec.store.folder if spec.store.folder.is_absolute() else f"{beginning.folder}/{spec.store.folder}"
    missing = next((one for one in (folder, beginning.folder) if not os.path.isdir(one)), None)
    if missing is not None:
        return f"it does not see {missing}. All machines need the run, models and data under the same paths."
    if (own := versions(spec.device)) != beginning.versions:
        odd = next(name for name in own if own[name] != beginning.versions.get(name))
        return f"it has {odd} {own[odd]}, and the machine that leads {beginning.versions.get(odd)}."
    return None


def _check_open(address: str) -> None:
    """Raise OSError where nobody answers at HOST:PORT: Ray itself asks for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()


def _failed(member: Member[_Actor], error: Exception) -> CurateError:
    """The error of an actor that is there still: it hands over those of its tasks, so this is of what came of one."""
    why = _last_line(error)
    return CurateError(f"A worker could not begin ({why}).") if member.task is None else unsent(member.task[1], why)


def _on_cards(beginning: Beginning) -> bool:
    return beginning.spec.device.startswith("cuda")


def _each(beginning: Beginning) -> int:
    return 1 if _on_cards(beginning) else beginning.threads


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _last_line(error: BaseException) -> str:
    """Ray puts the cause last."""
    return str(error).strip().rpartition("\n")[2].strip()
