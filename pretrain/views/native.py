"""The compiled part of making views on a CPU: `render.c`, built once and kept in the user's cache.

Where there is no C compiler (or `HEADWATER_NATIVE=0` is set), `library()` is None and the same operations run
in torch, several times slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("render.c")
# No contraction: a product and a sum stay two roundings, so that vector code and its remainder agree. Pixels are
# finite, and the sign of a zero says nothing: minima and maxima become single instructions.
_EXACT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffinite-math-only")
_FLAGS = ("-O3", "-march=native", *_EXACT, "-shared", "-fPIC")
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = {
    "headwater_render": [_POINTER] * 2 + [_NUMBER] * 2 + [_POINTER] * 3 + [_NUMBER] + [_POINTER] * 4,
    "headwater_cut": [_POINTER] + [_NUMBER] * 3 + [_POINTER] * 2,
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled `render.c`, or None where it cannot be had."""
    if os.environ.get("HEADWATER_NATIVE") == "0":
        return None
    try:
        path = _built()
        found = None if path is None else ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None
    for name, arguments in _ARGUMENTS.items() if found is not None else ():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    return found


@torch.compiler.assume_constant_result
def compiled() -> bool:
    """Whether `library()` is there; a constant to torch.compile."""
    return library() is not None


def _built() -> Path | None:
    """The shared object in the cache; compiled if this source, compiler and processor are new."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    compiler = shutil.which(compiler) or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or ""
    if not compiler:
        return None
    words = (compiler, *_FLAGS, platform.machine(), _processor())
    name = hashlib.sha256(SOURCE.read_bytes() + "\0".join(words).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headwater"
    target = folder / f"render-{name}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / "render.so"
        subprocess.run([compiler, *_FLAGS, str(SOURCE), "-o", str(made), "-lm"], check=True, capture_output=True)
        made.replace(target)  # whole or not at all, also when several processes build it at once
    return target


def _processor() -> str:
    """What `-march=native` depends on: a cache may be shared by machines of different kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(line for line in lines if line.startswith(("model name", "flags")))[:8192]
