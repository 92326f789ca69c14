"""Time as schedulers count it."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any


def seconds_of(text: Any) -> Any:
    """`"23:50:00"` and `"1-12:00:00"` (days) as seconds; numbers stay, as do wrong values, for pydantic to refuse.

    YAML 1.1 itself reads an unquoted 23:50:00 as the number of seconds.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text.strip()) if isinstance(text, str) else None
    if not found:
        return text
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def process_age(process: int) -> float:
    """Seconds since a process was started; 0 where the system does not tell.

    A launcher outlives the restarts of its workers, so its age is what a scheduler's limit counts.
    """
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])  # starttime, the 22nd field (proc(5)); the command, in brackets, was the second
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
