"""A real S3 server (moto's) on loopback, and the environment that leads s3fs to it and nowhere else."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pytest
from moto.server import ThreadedMotoServer


@dataclass
class Bucket:
    """The server, s3fs, and the first line of each request that was answered: from whatever process it came."""

    server: ThreadedMotoServer
    system: Any
    requests: list[str] = field(default_factory=list)

    def downloads(self) -> list[str]:
        """Names of the objects that were fetched, in that order, one for each request."""
        return [
            line.split()[1].rpartition("/")[2] for line in self.requests if line.startswith("GET") and "?" not in line
        ]

    def start(self) -> None:
        self.server.start()

    def stop(self) -> None:
        self.server.stop()
        self.server._server.server_close()  # else it would still take connections


class _Requests(logging.Handler):
    def __init__(self, requests: list[str]) -> None:
        super().__init__()
        self.requests = requests

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r"(GET|HEAD|PUT|POST|DELETE) \S+ HTTP", record.getMessage()):
            self.requests.append(found[0])


@contextmanager
def s3_server(bucket: str) -> Iterator[Bucket]:
    """A server with an empty bucket of this name."""
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    server._ip_address, server._port = host, port  # where it starts again
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        system = fsspec.filesystem("s3")
        system.mkdir(bucket)
        found = Bucket(server, system)
        handler, log = _Requests(found.requests), logging.getLogger("werkzeug")
        log.addHandler(handler)
        try:
            yield found
        finally:
            log.removeHandler(handler)
            found.stop()
