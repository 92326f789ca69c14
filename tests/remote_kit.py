"""Servers on loopback that remote datasets are read from: HTTP with faults on demand, and S3."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Fault = Callable[[str, int, str], str | None]
"""(method, number of the request for this file, file) -> `500`, `reset`, `slow`, `hang`, `short` or None."""


class FolderServer:
    """Serves a folder; counts requests by (method, file); `fault` says which go wrong, and how."""

    def __init__(self, folder: Path, ranges: bool = True) -> None:
        self.folder, self.ranges = folder, ranges
        self.fault: Fault = lambda method, number, name: None
        self.requests: Counter[tuple[str, str]] = Counter()
        self.sent = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                outer.answer(self, "HEAD")

            def do_GET(self) -> None:
                outer.answer(self, "GET")

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, method: str) -> None:
        name = request.path.lstrip("/")
        self.requests[method, name] += 1
        fault = self.fault(method, self.requests[method, name], name)
        path = self.folder / name
        if fault in ("403", "500", "503"):
            request.send_response(int(fault))
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if fault == "hang":
            time.sleep(30)
        if path.is_dir():
            body = "".join(f'<a href="{each.name}">{each.name}</a>\n' for each in sorted(path.iterdir())).encode()
            self._send(request, method, 200, body, {"Content-Type": "text/html"}, None)
            return
        if not path.is_file():
            request.send_response(404)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        body, headers, status = path.read_bytes(), {"Last-Modified": formatdate(path.stat().st_mtime)}, 200
        headers["ETag"] = f'"{path.stat().st_mtime_ns:x}-{len(body):x}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if self.ranges:
            headers["Accept-Ranges"] = "bytes"
            if wanted:
                first, last = int(wanted[1]), int(wanted[2] or len(body) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
                body, status = body[first : last + 1], 206
        self._send(request, method, status, body, headers, fault)

    def _send(
        self, request: Any, method: str, status: int, body: bytes, headers: dict[str, str], fault: str | None
    ) -> None:
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if method == "HEAD":
            return
        half = len(body) // 2
        if fault in ("reset", "short"):
            request.wfile.write(body[:half])
            request.wfile.flush()
            if fault == "reset":  # RST instead of FIN
                request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            request.close_connection = True
            request.connection.close()
            return
        if fault == "slow":
            for start in range(0, len(body), max(1, len(body) // 10)):
                request.wfile.write(body[start : start + max(1, len(body) // 10)])
                request.wfile.flush()
                time.sleep(0.02)
        else:
            request.wfile.write(body)
        self.sent += len(body)


@contextmanager
def serving(folder: Path, ranges: bool = True) -> Iterator[FolderServer]:
    server = FolderServer(folder, ranges)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def s3_server() -> Iterator[str]:
    """moto's S3 in a server of its own; its endpoint."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """What a process needs to use the cache in `folder`, with little patience."""
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    return {"HEADWATER_CACHE": str(folder), "HEADWATER_CACHE_SIZE": "50M", "HEADWATER_PATIENCE": "3"} | keys | settings
