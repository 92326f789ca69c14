"""Brings remote files into the cache: what is needed now at once, what comes next in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from data import transfer
from data.cache import Cache, Full
from data.errors import DamagedData, UserError
from data.transfer import Remote

_THREADS = 4
_POLL = 0.05
_REMEMBERED = 60.0
"""Seconds for which a file that does not exist, or is damaged, is not asked for again."""


class Fetcher:
    """One machine's way to the files of remote datasets; safe to use from many threads."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._wanted: list[Remote] = []
        self._keep: set[str] = set()
        self._changed = threading.Condition()
        self._bad: dict[str, tuple[float, str]] = {}
        self._threads: list[threading.Thread] = []
        cache.clear_leftovers()

    def __reduce__(self) -> tuple[type[Fetcher], tuple[Cache]]:
        return Fetcher, (self.cache,)

    def look_up(self, urls: Sequence[str]) -> list[Remote]:
        """Size and version of each, several at a time; see `transfer.look_up`."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(transfer.look_up, urls))

    def listed(self, url: str) -> list[str]:
        """See `transfer.listed`."""
        return transfer.listed(url)

    def read(self, url: str) -> bytes:
        """See `transfer.read_small`."""
        return transfer.read_small(url)

    def fetch(self, remote: Remote) -> None:
        """Return when the file is in the cache.

        Raises:
            DamagedData: it does not exist or is damaged.
            UserError: it cannot be had, or the cache is too small for what is in use at once.
        """
        until = time.monotonic() + max(10.0, transfer.patience())
        while not self.cache.path(remote.key).exists():
            try:
                if not self._bring(remote):
                    time.sleep(_POLL)  # another process is on it
                    until = max(until, time.monotonic() + 1.0)
            except Full:
                if time.monotonic() > until:
                    raise UserError(
                        f"the cache {self.cache.folder} of {self.cache.limit:,} bytes is full of files in use; set "
                        "HEADWATER_CACHE_SIZE to hold twice what is shuffled together (data.shuffle_samples)"
                    ) from None
                time.sleep(_POLL)

    def ahead(self, remotes: Sequence[Remote]) -> None:
        """Bring these into the cache in the background, the first ones first, as far as there is room."""
        with self._changed:
            self._wanted = list(remotes)
            self._keep = {remote.key for remote in remotes}
            if not self._threads:
                self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(_THREADS)]
                for thread in self._threads:
                    thread.start()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._wanted:
                    self._changed.wait()
                remote = self._wanted.pop(0)
            if self.cache.path(remote.key).exists():
                continue
            try:
                self._bring(remote, ahead=True)
            except Full:
                with self._changed:  # until something is let go, or something else is wanted
                    if remote.key in self._keep:
                        self._wanted.insert(0, remote)
                    self._changed.wait(0.5)
            except Exception:  # whoever needs it will ask, and hear why; the background must go on
                continue

    def _bring(self, remote: Remote, ahead: bool = False) -> bool:
        """Download unless somebody else does; whether it was done here."""
        when, sentence = self._bad.get(remote.key, (0.0, ""))
        if sentence and time.monotonic() - when < _REMEMBERED:
            raise DamagedData(sentence)
        try:
            # Reading ahead must not throw out what comes sooner; what is needed now may, as a last resort.
            with self.cache.writing(remote.key, remote.size, self._kept, strict=ahead) as descriptor:
                if descriptor is None:
                    return False
                transfer.download(remote, descriptor)
                if remote.size is None:  # nothing was set aside
                    self.cache.make_room(0, self._kept)
                return True
        except DamagedData as error:
            self._bad[remote.key] = (time.monotonic(), str(error))
            raise
        except OSError as error:
            raise UserError(f"cannot write to the cache {self.cache.folder}: {error.strerror or error}") from None

    def _kept(self, key: str) -> bool:
        return key in self._keep
