"""A real SLURM on this machine: one controller, and several nodes by made-up names."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import apt_kit

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
NODES = ("hw-one", "hw-two", "hw-three")


def missing() -> str | None:
    """Why SLURM cannot run here, after trying to install it; None when it can."""
    if os.geteuid() != 0:
        return "starting SLURM needs root"
    return apt_kit.missing(PROGRAMS, ["slurm-wlm", "munge"])


@contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """SLURM with `NODES`, of one core each, for as long as the block runs; `SLURM_CONF` points to it."""
    host, ports = socket.gethostname(), _free_ports(len(NODES) + 1)
    for name in ("state", "spool", "log"):
        (folder / name).mkdir(parents=True)
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=1000 State=UNKNOWN"
        for name, port in zip(NODES, ports[1:], strict=True)
    )
    config = folder / "slurm.conf"
    config.write_text(_CONFIG.format(host=host, port=ports[0], folder=folder, nodes=nodes, names=",".join(NODES)))
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(config)
    munge = _start_munge()
    try:
        for words in (["slurmctld"], *(["slurmd", "-N", name] for name in NODES)):
            subprocess.run(words, check=True, capture_output=True)
        until(lambda: tell("sinfo", "-h", "-o", "%D %t") == f"{len(NODES)} idle", 60, "the nodes are idle")
        yield
    finally:
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        for path in folder.glob("*.pid"):
            subprocess.run(["kill", path.read_text().strip()], capture_output=True)
        if munge is not None:
            munge.terminate()
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


def tell(*words: str) -> str:
    """What a SLURM command prints."""
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until `holds()`; fails, saying `what` did not happen, after so many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}\n{tell('scontrol', 'show', 'job')}"
        time.sleep(0.3)


def job(number: int, field: str) -> str:
    """A field of `scontrol show job`, empty when there is none."""
    found = re.search(rf"\b{field}=(\S*)", tell("scontrol", "show", "job", "-o", str(number)))
    return found.group(1) if found else ""


def _start_munge() -> subprocess.Popen[bytes] | None:
    """The daemon that signs messages; None when one is running already."""
    if subprocess.run(["pgrep", "-x", "munged"], capture_output=True).returncode == 0:
        return None
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge")
    words = ["setpriv", "--reuid=munge", "--regid=munge", "--init-groups", "munged", "--foreground"]
    daemon = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(Path("/run/munge/munge.socket.2").exists, 20, "munged listens")
    return daemon


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


# cred_expire is also how long a requeued job waits before it may start again: two minutes by default.
_CONFIG = """ClusterName=headwater-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobRequeue=1
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,bf_continue
MpiDefault=none
KillWait=30
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""
