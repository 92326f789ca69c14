"""Programs that only some tests need: installed by apt where that may be done."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence


def missing(programs: Sequence[str], packages: Sequence[str]) -> str | None:
    """Why `programs` cannot be had here, after trying to install `packages` (Debian's names); None when they can."""
    if all(map(shutil.which, programs)):
        return None
    advice = f"Debian: apt-get install {' '.join(packages)}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"{', '.join(name for name in programs if not shutil.which(name))} not installed ({advice})"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    error = ""
    for words in (["update", "-qq"], ["install", "-y", "-qq", *packages]):
        # Another test process may be installing something at this moment: wait for it.
        command = ["apt-get", "-o", "DPkg::Lock::Timeout=300", *words]
        error = subprocess.run(command, env=environment, capture_output=True, text=True).stderr.strip()[-200:]
    absent = [name for name in programs if not shutil.which(name)]
    return f"{', '.join(absent)} could not be installed ({advice}): {error}" if absent else None
