"""A tar kept open for reading at random places."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

_KEPT_BYTES = 2**26
"""Mapped bytes read after which their pages are handed back: they stay cached, but no longer count as ours."""


class OpenShard:
    """Reads pieces of a tar: copied out of a memory map, which takes half the time of `pread` where they are cached.

    A map of a file that is cut short would end the process (SIGBUS), so its size is looked at before every
    batch of pieces; what is no longer there is then left to `pread`, which only comes back short.
    """

    def __init__(self, descriptor: int) -> None:
        """Takes over an open descriptor, and closes it in the end."""
        self.descriptor = descriptor
        self._touched = 0
        self._map: mmap.mmap | None = None
        try:
            self._map = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        except (OSError, ValueError):  # not every file system can; an empty file cannot be mapped
            return
        self._bytes = memoryview(self._map)

    def read(self, offsets: Sequence[int], sizes: Sequence[int], cold: bool = False) -> list[bytes]:
        """The bytes at `offsets`; a piece is shorter than its size where the file ends.

        Args:
            cold: whether to wait for the storage, which `pread` does without holding up other threads.

        Raises:
            OSError: the storage cannot be read.
        """
        if cold or not self._holds(offsets, sizes):
            return [os.pread(self.descriptor, size, offset) for size, offset in zip(sizes, offsets, strict=True)]
        view = self._bytes
        found = [view[offset : offset + size].tobytes() for size, offset in zip(sizes, offsets, strict=True)]
        self._touched += sum(sizes)
        if self._touched > _KEPT_BYTES:
            assert self._map is not None
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return found

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        if self._map is not None:
            self._bytes.release()
            self._map.close()
            self._map = None
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _holds(self, offsets: Sequence[int], sizes: Sequence[int]) -> bool:
        """Whether all pieces lie in the map, and the file is still that long."""
        if self._map is None:
            return False
        end = max((offset + size for offset, size in zip(offsets, sizes, strict=True)), default=0)
        return end <= len(self._bytes) and end <= os.fstat(self.descriptor).st_size
