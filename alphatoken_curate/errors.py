"""Every error the package raises on purpose.

    CurateError                exit 1  something is wrong on our side
    ├── UsageError             exit 2  a flag, a config key or their combination cannot be used
    │   └── ModelError         exit 2  the model cannot be found, read safely or captured exactly
    ├── InputError             exit 3  rows were refused
    └── StoredDataError        exit 4  a run folder is damaged
        └── FingerprintError   exit 4  a run folder was made with other settings or other inputs

A message says where, what was found and what to do. An interrupt (exit 130) is not an error of ours:
`cli.main` turns KeyboardInterrupt into the line that says how to go on.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping


class CurateError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(CurateError):
    """A flag, a config key or their combination cannot be used."""

    exit_code = 2


class BusyError(UsageError):
    """Another process holds the run."""


class ModelError(UsageError):
    """A model cannot be found, read safely or captured exactly."""


class InputError(CurateError):
    """Rows were refused."""

    exit_code = 3


class StoredDataError(CurateError):
    """A stored file is damaged, missing or foreign."""

    exit_code = 4


class FingerprintError(StoredDataError):
    """A run folder exists, made with other settings or inputs.

    `fields` names what differs; `stored`: the values that all fields have there, where they are known.
    """

    def __init__(self, message: str, fields: tuple[str, ...], stored: Mapping[str, object] | None = None) -> None:
        super().__init__(message, fields, stored)  # all of it, so that it can be pickled
        self.fields = fields
        self.stored = stored or {}

    def __str__(self) -> str:
        """The message."""
        return str(self.args[0])


_IN_THE_WAY = "a file lies where a folder is needed, so name another place"
_OF_NAMES = {
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "a link there leads back to itself, so name what it should lead to",
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EEXIST: _IN_THE_WAY,
    errno.EISDIR: "a folder has this name, so name another file",
}
"""What to do where it is the name that the system does not take."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a disk takes no more."""

_OF_THE_DISK = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check its permissions"),
    **dict.fromkeys(NO_ROOM, "make room"),
}


def refused(error: OSError, place: object = None) -> CurateError:
    """What the system refused as an error of ours: where, `place` or the file that it names, what, and what to do."""
    where = f"{error.filename if place is None else place}: {error.strerror}"
    if do := _OF_NAMES.get(error.errno or 0):
        return UsageError(f"{where}; {do}")
    return CurateError(f"{where}; {_OF_THE_DISK.get(error.errno or 0, 'see what is there')}")


def is_of_a_name(error: OSError) -> bool:
    """Whether it is the name that the system does not take, whatever the disk has."""
    return error.errno in _OF_NAMES
