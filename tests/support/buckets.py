"""An S3 in this process (moto), and buckets in it."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator
from typing import Any
from unittest import mock

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "a-key",
    "AWS_SECRET_ACCESS_KEY": "a-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The address of a server; the environment names it and has credentials for it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel("ERROR")  # a line for every request
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    with mock.patch.dict(os.environ, {**CREDENTIALS, "AWS_ENDPOINT_URL": address}):
        try:
            yield address
        finally:
            server.stop()


def s3() -> Any:
    """The file system of `s3://`, with nothing kept of what was listed before."""
    import fsspec

    store = fsspec.filesystem("s3", use_listings_cache=False)
    store.invalidate_cache()
    return store


def new_bucket() -> str:
    """The name of an empty bucket."""
    name = f"bucket-{secrets.token_hex(4)}"
    s3().mkdir(name)
    return name
