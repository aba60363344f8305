"""The Hugging Face hub in small: what huggingface_hub asks for, served from folders on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves each ROOT/ORG/NAME as a repository with one commit, `main`.

    GET /close ends it: what comes after is refused, as by a hub that is not there.

    Attributes:
        root: the folder of folders.
        asked: method and path of each request.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.asked = root, list[str]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append(f"{self.command} {path}")
        if path == "close":
            self.server.socket.close()  # at once, so that no connection is taken after the answer
            threading.Thread(target=self.server.shutdown).start()
            return self.send(200, b"{}")
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            return self.api(parts[2:])
        return self.file(parts)

    def api(self, parts: list[str]) -> None:
        """/api/models/ORG/NAME[/revision/REVISION]."""
        folder = self.server.root.joinpath(*parts[:2])
        if len(parts) < 2 or not folder.is_dir():
            return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if parts[2:] not in ([], ["revision", "main"]):
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        name = "/".join(parts[:2])
        told = {
            "id": name, "modelId": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False,
            "tags": [], "siblings": [{"rfilename": file.name} for file in sorted(folder.iterdir())],
        }  # fmt: skip
        return self.send(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def file(self, parts: list[str]) -> None:
        """/ORG/NAME/resolve/REVISION/FILE."""
        path = self.server.root.joinpath(*parts[:2], *parts[4:])
        commit = {"X-Repo-Commit": COMMIT}
        if len(parts) < 5 or parts[2] != "resolve" or not path.is_file():
            kind = "EntryNotFound" if self.server.root.joinpath(*parts[:2]).is_dir() else "RepoNotFound"
            return self.send(404, b"", commit | {"X-Error-Code": kind, "X-Error-Message": kind})
        content = path.read_bytes()
        return self.send(200, content, commit | {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """A hub that answers while it is open."""
    hub = Hub(root)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
