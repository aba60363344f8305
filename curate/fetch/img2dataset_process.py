"""The process in which the real img2dataset downloads: `python -m curate.fetch.img2dataset_process FD FOLDER`.

Its Downloader and Resizer are as they are. What is ours stands around them:

    below   urllib, by which it asks, gets an opener (`urllib.request.install_opener`) that knows http and https alone,
            no proxy, no cookies; caps bodies, redirects and time; heeds opt-outs; reads headers before anything is
            decoded; and does not ask again for what will never pass. An audit hook refuses every connection that the
            guard refuses, whoever makes it, and every process that would be outside of this one.
    above   in place of its writer, one that hands each row over at once, so that a kill costs no row that was done.

stdin: the configuration, then shards, each a line of JSON; when it ends, so does this process, in the middle of what it
does: it never outlives the one that started it. To the file descriptor FD go events, each a line of JSON:

    ready · cannot (why) · open (row) · closed (row, http_status, bytes, format) · decoding (row)
    row (row, status, …, size; the image's bytes follow) · end
"""

from __future__ import annotations

import io
import json
import os
import queue
import socket
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable
from http.client import HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO, Any
from urllib.parse import urljoin

from curate.config import AGENT, FetchConfig
from curate.fetch.failures import TransferError
from curate.fetch.guard import Guard
from curate.fetch.img2dataset_errors import as_transfer_error
from curate.fetch.manners import DIRECTIVES, opt_out
from curate.fetch.transfer import allow_open_files, parse_target, tls_context
from curate.images import Resize, check_size, probe
from curate.ledger import Reason

Tell = Callable[..., None]
BLOCK_BYTES = 1 << 16
LONGEST_WORDS = 1000
# Reaching out by another process would pass by the guard of this one.
OTHER_PROCESSES = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system")


class Channel:
    """Where events go; used by many threads."""

    def __init__(self, file: int) -> None:
        self._file, self._lock = os.fdopen(file, "wb"), threading.Lock()

    def tell(self, event: str, content: bytes = b"", **facts: Any) -> None:
        """Send an event, and the bytes that belong to it."""
        line = json.dumps({"event": event, "size": len(content), **facts}).encode()
        with self._lock:
            self._file.write(line + b"\n" + content)
            self._file.flush()


class Answer:
    """A body that was read, in the form in which img2dataset takes an answer of urllib."""

    def __init__(self, content: bytes, headers: HTTPMessage) -> None:
        self.content, self.headers = content, headers

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self) -> bytes:
        """The body."""
        return self.content


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https, as many as are allowed; their bodies are not read."""

    # urllib's own limits: never reached
    max_repeats = max_redirections = 1_000

    def __init__(self, most: int) -> None:
        self.most = most

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage
    ) -> Any:
        """Follow it.

        Raises:
            TransferError: it leads nowhere, or where no request may go, or is one too many.
        """
        fp.close()
        location = headers.get("Location", "").strip()
        if not location:
            raise TransferError(Reason.BAD_RESPONSE, "redirect without Location", http_status=code)
        if sum(getattr(req, "redirect_dict", {}).values()) >= self.most:
            raise TransferError(Reason.TOO_MANY_REDIRECTS, str(self.most), http_status=code)
        target = str(parse_target(urljoin(req.full_url, location)))
        del headers["Location"]
        headers["Location"] = target
        return super().http_error_302(req, io.BytesIO(), code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class Opener:
    """What `urllib.request.urlopen` asks in this process."""

    def __init__(self, config: FetchConfig, tell: Tell) -> None:
        self.config, self.tell = config, tell
        self.director = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(context=tls_context()),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            Redirects(config.max_redirects),
        ):
            self.director.add_handler(handler)
        self.start({})

    def start(self, rows: dict[str, int]) -> None:
        """Begin a shard: URL → row."""
        self.rows = rows
        self.row_of_body: dict[int, int] = {}
        self._lasting: dict[str, TransferError] = {}

    def open(self, request: urllib.request.Request, _data: None, timeout: float) -> Answer:
        """One attempt at a row, redirects included.

        Raises:
            TransferError: no image came.
        """
        url = request.full_url
        if url in self._lasting:
            raise self._lasting[url]
        row = self.rows[url]
        request.add_header("User-Agent", self.config.user_agent)
        self.tell("open", row=row)
        closed: dict[str, Any] = {}
        try:
            return self._attempt(request, timeout, closed)
        except Exception as error:
            refused = as_transfer_error(error, closed.get("http_status"))
            if not refused.may_pass:
                self._lasting[url] = refused
            closed["http_status"] = refused.http_status
            raise refused from error
        finally:
            self.tell("closed", row=row, **closed)

    def _attempt(self, request: urllib.request.Request, timeout: float, closed: dict[str, Any]) -> Answer:
        until = time.monotonic() + self.config.total_timeout_s
        with self.director.open(request, timeout=timeout) as response:
            closed["http_status"] = response.status
            headers = response.headers
            tags, tdm = headers.get_all("X-Robots-Tag", []), headers.get_all("TDM-Reservation", [])
            if refusal := opt_out(tags, tdm, self.config.ignore_opt_outs):
                raise TransferError(Reason.OPT_OUT, refusal, http_status=response.status)
            content = self._read(response, until)
        closed["bytes"] = len(content)
        closed["format"] = self._check_header(content)
        self.row_of_body[hash(content)] = self.rows[request.full_url]
        return Answer(content, headers)

    def _read(self, response: HTTPResponse, until: float) -> bytes:
        """The body, in pieces as they come, within its limits of size and time."""
        most, left, content = self.config.max_bytes, response.length, bytearray()
        status = response.status
        if left is not None and left > most:
            raise TransferError(Reason.TOO_LARGE, f"says {left} bytes", http_status=status)
        while left != len(content) and (piece := response.read1(BLOCK_BYTES)):
            content += piece
            if len(content) > most:
                raise TransferError(Reason.TOO_LARGE, f"over {most} bytes", http_status=status)
            if time.monotonic() > until:
                raise TransferError(Reason.TIMEOUT, "total", http_status=status, may_pass=True)
        if left is not None and len(content) < left:
            raise TransferError(Reason.BROKEN_TRANSFER, "in the body", http_status=status, may_pass=True)
        if not content:
            raise TransferError(Reason.EMPTY_BODY, http_status=status)
        return bytes(content)

    def _check_header(self, content: bytes) -> str:
        """The format; nothing with too many pixels or too few, as it is or resized, reaches a decoder."""
        header = probe(content)
        check_size(header, self.config.max_pixels, self.config.min_side)
        resize = Resize(self.config.resize_mode, self.config.image_size, self.config.resize_only_if_bigger)
        resize.scaled(header.width, header.height)
        return header.format


def refuse_what_the_guard_refuses(guard: Guard) -> None:
    """From here on, no thread of this process connects to an address that the guard refuses."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and arguments[0].family in (socket.AF_INET, socket.AF_INET6):
            guard.check(arguments[1][0], arguments[1][1])

    sys.addaudithook(hook)


def refuse_other_processes() -> None:
    """From here on, this process starts no other."""

    def hook(event: str, _: tuple[Any, ...]) -> None:
        if event in OTHER_PROCESSES:
            raise PermissionError(f"{event}: not in this process")

    sys.addaudithook(hook)


def download(rows: list[tuple[int, str]], config: FetchConfig, opener: Opener, folder: Path, tell: Tell) -> None:
    """Let img2dataset download these rows (number, URL) and tell what became of each."""
    import pyarrow as pa
    from img2dataset.downloader import Downloader

    shard = folder / "shard.feather"
    table = pa.table({"row": [row for row, _ in rows], "url": [url for _, url in rows]})
    with pa.ipc.new_file(shard, table.schema) as file:
        file.write_table(table)
    opener.start({url: row for row, url in rows})
    Downloader(
        sample_writer_class=lambda *_: HandOver(tell),
        resizer=TellingResizer(config, opener, tell),
        thread_count=config.connections,
        save_caption=False,
        extract_exif=False,
        output_folder=str(folder),
        column_list=["row", "url"],
        timeout=config.read_timeout_s,
        number_sample_per_shard=len(rows),
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=config.encode_format,
        retries=config.retries,
        user_agent_token=AGENT,
        disallowed_header_directives=sorted(DIRECTIVES.difference(config.ignore_opt_outs)),
    ).download_shard((0, str(shard)))


class TellingResizer:
    """img2dataset's Resizer; it tells whose image goes into the decoder, in case none comes out."""

    def __init__(self, config: FetchConfig, opener: Opener, tell: Tell) -> None:
        from img2dataset.resizer import Resizer

        self.opener, self.tell = opener, tell
        self.resize = Resizer(
            image_size=config.image_size,
            resize_mode=config.resize_mode,
            resize_only_if_bigger=config.resize_only_if_bigger,
            encode_quality=config.encode_quality,
            encode_format=config.encode_format,
            skip_reencode=config.skip_reencode,
            disable_all_reencoding=not config.decode,
        )

    def __call__(self, stream: io.BytesIO, boxes: None = None) -> tuple[Any, ...]:
        """As img2dataset calls it."""
        self.tell("decoding", row=self.opener.row_of_body.get(hash(stream.getvalue())))
        result: tuple[Any, ...] = self.resize(stream, boxes)
        return result


class HandOver:
    """In place of img2dataset's writers: tells each row, the image with it."""

    TOLD = ("row", "status", "original_width", "original_height", "sha256")

    def __init__(self, tell: Tell) -> None:
        self.tell = tell

    def write(self, content: bytes | None, _key: str, _caption: None, facts: dict[str, Any]) -> None:
        """As img2dataset calls it, for each row once."""
        why = (facts["error_message"] or "")[:LONGEST_WORDS]
        self.tell("row", content or b"", **{name: facts[name] for name in self.TOLD}, error_message=why)

    def close(self) -> None:
        """Nothing is left to do."""


def take_lines(lines: queue.SimpleQueue[Any]) -> None:
    """Put what comes on stdin into a queue; at its end, which is that of our parent, end this process."""
    for line in sys.stdin:
        lines.put(json.loads(line))
    os._exit(1)


def main() -> None:
    """Do what comes on stdin until it ends."""
    channel, folder = Channel(int(sys.argv[1])), Path(sys.argv[2])
    lines: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=take_lines, args=(lines,), daemon=True).start()
    config = FetchConfig(**lines.get())
    allow_open_files(2 * config.connections + 1024)
    refuse_what_the_guard_refuses(Guard.allowing(config.allow_addresses))
    try:
        import img2dataset.downloader  # heavy, and may not work here
        import img2dataset.resizer  # noqa: F401 - the same

        refuse_other_processes()
        opener = Opener(config, channel.tell)
        urllib.request.install_opener(opener)  # type: ignore[arg-type]  # all that urlopen calls is `open`
        channel.tell("ready")
        while True:
            download(lines.get(), config, opener, folder, channel.tell)
            channel.tell("end")
    except Exception as error:  # noqa: BLE001 - handed over to the parent, which raises it
        channel.tell("cannot", why=f"{type(error).__name__}: {error}", trace=traceback.format_exc())


if __name__ == "__main__":
    main()
