"""Several processes on this machine, through `accelerate launch` and a configuration of ours."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from data.errors import UserError

CONFIGS = Path(__file__).parent / "accelerate"


def processes_for(asked: int | None) -> int:
    """The number of processes: as asked, else one for each GPU, else one."""
    if asked is not None and asked < 1:
        raise UserError(f"--processes {asked}: at least one process is needed")
    if asked is not None:
        return asked
    import torch

    return max(1, torch.cuda.device_count())


def launch_command(count: int, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command and environment that run `pretrain ARGUMENTS` in `count` processes.

    On the CPU accelerate would start a single process; its multi-GPU path with ACCELERATE_USE_CPU set
    starts them all, connected by gloo. Our own configuration file is named, so that a user's default one
    is never picked up.
    """
    import torch

    gpu = torch.cuda.is_available()
    if gpu and count > torch.cuda.device_count():
        raise UserError(f"--processes {count}: this machine has {torch.cuda.device_count()} GPUs")
    config = CONFIGS / ("ddp.yaml" if gpu else "cpu.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(count), "--main_process_port", "0", "-m", "pretrain"]
    command += without_processes(arguments)
    environment = dict(os.environ)
    home = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [home, environment.get("PYTHONPATH", "")]))
    if not gpu:
        environment["ACCELERATE_USE_CPU"] = "true"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    return command, environment


def without_processes(arguments: list[str]) -> list[str]:
    """The same arguments less `--processes N`."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith("--processes="):
            skip = False
        elif argument == "--processes":
            skip = True
        else:
            kept.append(argument)
    return kept
