"""Several processes on this machine, through Accelerate's launcher and a configuration of ours."""

from __future__ import annotations

import logging
import os
import signal
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


def launch(count: int, arguments: list[str]) -> int:
    """Run `pretrain ARGUMENTS` in `count` processes; returns the exit status when all have ended.

    The same as `accelerate launch`, but that a process which stops with an error stops the others without
    the launcher's own report: it has said what was wrong, and its exit status is passed on.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    words, environment = launch_words(count, arguments)
    os.environ.update(environment)
    logging.disable(logging.ERROR)  # the launcher's own accounts of what its workers have said
    try:
        launch_command(launch_command_parser().parse_args(words))
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if any(each.exitcode == 2 for each in error.failures.values()):
            return 2
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        print(
            f"headwater: process {rank} was killed by {name}; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 128 - int(failure.exitcode)
    return 0


def launch_words(count: int, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words after `accelerate launch`, and what they need in the environment.

    On the CPU accelerate would start a single process; its multi-GPU path with ACCELERATE_USE_CPU set
    starts them all, connected by gloo. Our own configuration file is named, so that a user's default one
    is never picked up.
    """
    import torch

    gpu = torch.cuda.is_available()
    if gpu and count > torch.cuda.device_count():
        raise UserError(f"--processes {count}: this machine has {torch.cuda.device_count()} GPUs")
    words = ["--config_file", str(CONFIGS / ("ddp.yaml" if gpu else "cpu.yaml"))]
    words += ["--num_processes", str(count), "--main_process_port", "0", "-m", "pretrain"]
    home = str(Path(__file__).resolve().parent.parent)
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH", "")]))}
    threads = str(max(1, (os.cpu_count() or 1) // count))
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", threads)
    if not gpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    return words + arguments, environment
