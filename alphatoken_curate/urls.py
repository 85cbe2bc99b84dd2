"""URLs where a name may be one, and their refusal where a folder or file of this machine is meant.

`Path` makes `s3:/bucket` of `s3://bucket`, a folder `s3:` in the current one: both forms are known here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from alphatoken_curate.errors import UsageError

RUN_ADVICE = "Copy the run to a folder of this machine; in Python scan(URL) reads a published one as it lies."
"""What to do where a run was meant."""

OUT_ADVICE = "Write to a folder of this machine; a finished run goes to s3:// by: alphatoken-curate publish RUN URL"
"""What to do where something is to be written."""

FILE_ADVICE = "Copy it to this machine, and name the copy."
"""What to do where a file or a folder is read that is neither rows nor a run."""

_SLASHES = re.compile(r"^\s*([^/:]+(?:::[^/:]+)*):/{0,2}")
_SCHEME = re.compile(r"\s*(?:[A-Za-z][\w+.-]*::)*[A-Za-z][\w+.-]+:\s*(/|$)")
_MOST_CHARS = 200


def expanded(name: str | Path) -> Path:
    """The path with its home folder for `~`; one of no user stays as it is, and is not there."""
    return Path(os.path.expanduser(name))


def names_url(name: str) -> bool:
    """Whether a name of rows is a URL."""
    return "://" in name and is_url(name)


def is_url(name: str | Path) -> bool:
    """Whether a name begins as a URL does, or as what `Path` leaves of one; `C:/` does not."""
    return _SCHEME.match(str(name)) is not None


def check_local(name: str | Path, advice: str) -> None:
    """Raise `UsageError` for a URL where a folder or file of this machine is meant; nothing was done by then."""
    if not is_url(name):
        return
    there = os.path.abspath(name)
    made = f" (The folder of that name that is here: {there}.)" if os.path.lexists(there) else ""
    raise UsageError(f"{shown(name)}: a URL, and a folder or file of this machine is meant. {advice}{made}")


def shown(url: str | Path) -> str:
    """A URL as messages show it: without user, password and query string, of which any may be a secret."""
    scheme, rest = _parts(str(url))
    authority, slash, path = rest.partition("/")
    path = re.split(r"\?(?=[^/]*=)", path)[0]
    text = f"{scheme}://{authority.rpartition('@')[2].partition('?')[0]}{slash}{path}"
    if ":" in authority and "@" in path:  # a secret may have slashes in it
        text = f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"
    return text if len(text) <= _MOST_CHARS else text[: _MOST_CHARS - 1] + "…"


def scheme_of(url: str) -> str:
    """`s3` of `S3://bucket/name`."""
    return _parts(url)[0]


def checked(url: str) -> tuple[str, str]:
    """The scheme of a URL in small letters, and what follows `://`. Raises `UsageError` where it holds more than names.

    What stands before `@`, and queries, are credentials or signatures: they would end up in config.yaml and the card.
    """
    scheme, rest = _parts(url)
    authority, _, path = rest.partition("/")
    if "@" in authority or (":" in authority and "@" in path) or re.search(r"\?[^/]*=", rest):
        raise UsageError(
            f"{shown(url)}: the URL has more in it than bucket and name (a user, password or query string). Credentials"
            " are taken from the environment, as the store's own tools take them: leave them out."
        )
    if not authority.strip():
        raise UsageError(f"{shown(url)}: names no bucket. Give it as {scheme}://bucket/name.")
    if any(part in (".", "..") for part in path.split("/")):
        raise UsageError(f"{shown(url)}: names in a store are no paths, and `.` or `..` leads nowhere. Write it out.")
    return scheme, rest


def _parts(url: str) -> tuple[str, str]:
    found = _SLASHES.match(url)
    return ("", url) if found is None else (found[1].lower(), url[found.end() :])
