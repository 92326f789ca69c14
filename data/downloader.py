"""The one process that downloads, and how the others ask it.

fsspec's file systems run an event loop that does not survive a fork, and reading processes are forked. So a
process of its own is spawned, listens on a socket in a private folder, and lives as long as one of those that
could ask: its standard input ends when the last of them does, however it ended.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.cache import Cache
from data.errors import DamagedData, UserError
from data.fetcher import Fetcher
from data.transfer import Remote

_processes: dict[str, subprocess.Popen[bytes]] = {}
"""The downloaders that this process started, by socket; kept so that their standard input stays open."""


class Downloader:
    """Asks the downloading process; can be pickled, and used in any process of the machine."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.address = os.path.join(tempfile.mkdtemp(prefix="headwater-"), "socket")
        self._start()

    def look_up(self, urls: Sequence[str]) -> list[Remote]:
        """See `Fetcher`; so for the others."""
        return [Remote(**found) for found in self._ask("look_up", list(urls))]

    def listed(self, url: str) -> list[str]:
        """See `Fetcher`."""
        return list(self._ask("listed", url))

    def read(self, url: str) -> bytes:
        """See `Fetcher`."""
        return base64.b64decode(self._ask("read", url))

    def fetch(self, remote: Remote) -> None:
        """See `Fetcher`."""
        self._ask("fetch", asdict(remote))

    def ahead(self, remotes: Sequence[Remote]) -> None:
        """See `Fetcher`."""
        self._ask("ahead", [asdict(remote) for remote in remotes])

    def _ask(self, what: str, about: Any) -> Any:
        for attempt in range(3):
            try:
                answer = self._once({"do": what, "about": about})
                break
            except OSError:  # it was killed: start another at the same place
                if attempt == 2:
                    raise UserError("the downloading process ends again and again; is the memory full?") from None
                self._start()
        if "error" in answer:
            raise (DamagedData if answer["damaged"] else UserError)(answer["error"])
        return answer["value"]

    def _once(self, question: dict[str, Any]) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            line.connect(self.address)
            line.sendall(json.dumps(question).encode() + b"\n")
            with line.makefile("rb") as answers:
                answer = answers.readline()
        if not answer.endswith(b"\n"):
            raise ConnectionError("no answer")
        return dict(json.loads(answer))

    def _start(self) -> None:
        home = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
        os.makedirs(os.path.dirname(self.address), mode=0o700, exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "data.downloader", self.address, str(self.cache.folder), str(self.cache.limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for those who ask
        )
        assert process.stdout is not None
        with process.stdout as said:
            if said.readline() != b"ready\n":
                raise UserError(f"the downloading process did not start (status {process.wait()})")
        _processes[self.address] = process


def stop_all() -> None:
    """End the downloaders that this process started; they would end with it anyway."""
    for process in _processes.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    _processes.clear()


class _Answers(socketserver.StreamRequestHandler):
    """One question, one answer, each a line of JSON."""

    def handle(self) -> None:
        """Called by the server in a thread of its own."""
        question = json.loads(self.rfile.readline() or b"null")
        if question is None:
            return
        fetcher: Fetcher = self.server.fetcher  # type: ignore[attr-defined]
        try:
            answer = {"value": _answer(fetcher, question["do"], question["about"])}
        except UserError as error:
            answer = {"error": str(error), "damaged": isinstance(error, DamagedData)}
        except Exception as error:
            answer = {"error": f"downloading failed: {type(error).__name__}: {error}", "damaged": False}
        self.wfile.write(json.dumps(answer).encode() + b"\n")


def _answer(fetcher: Fetcher, what: str, about: Any) -> Any:
    if what == "look_up":
        return [asdict(remote) for remote in fetcher.look_up(about)]
    if what == "listed":
        return fetcher.listed(about)
    if what == "read":
        return base64.b64encode(fetcher.read(about)).decode()
    if what == "fetch":
        return fetcher.fetch(Remote(**about))
    assert what == "ahead", what
    return fetcher.ahead([Remote(**each) for each in about])


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128


def main(address: str, folder: str, limit: str) -> None:
    """Answer at `address` until standard input ends."""
    place = Path(address)
    place.unlink(missing_ok=True)
    with _Server(address, _Answers) as server:
        server.fetcher = Fetcher(Cache(Path(folder), int(limit)))  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print("ready", flush=True)
        os.close(1)
        while os.read(0, 1024):
            pass
        shutil.rmtree(place.parent, ignore_errors=True)
        os._exit(0)  # downloads in the background are of no use to anybody


if __name__ == "__main__":
    main(*sys.argv[1:])
