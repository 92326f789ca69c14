"""Several processes, on this machine or several, through Accelerate's launcher and a configuration of ours."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from data.errors import UserError
from launch.network import Nodes
from pretrain.exits import PEER_LOST, REQUEUE
from pretrain.preemption import SIGNALS, Preempted

CONFIGS = Path(__file__).parent / "accelerate"
GRACE_SECONDS = "120"
"""Between a signal and the launcher's SIGKILL: for the step at hand and a save (torchrun's default is 30)."""


def processes_for(asked: int | None) -> int:
    """The number of processes: as asked, else one for each GPU, else one."""
    if asked is not None and asked < 1:
        raise UserError(f"--processes {asked}: at least one process is needed")
    if asked is not None:
        return asked
    import torch

    return max(1, torch.cuda.device_count())


def launch(
    count: int,
    arguments: list[str],
    run: Path | None,
    max_restarts: int = 0,
    nodes: Nodes | None = None,
    module: str = "pretrain",
) -> int:
    """Run `MODULE ARGUMENTS` in `count` processes; returns the exit status when all have ended.

    The same as `accelerate launch`, but that a process which stops with an error stops the others without
    the launcher's own report: it has said what was wrong, and its exit status is passed on. A run that was
    told to stop and saved ends with status 75 (see `pretrain.preemption`), as it does in one process.

    Args:
        run: the run's folder, whose status.json is read at the end; None where there is none.
        max_restarts: how often all processes are started again after one of them crashed or hung.
        nodes: the machines, each of which runs this with its own `count` processes; this one alone without.
        module: `pretrain` or `finetune`.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    words, environment = launch_words(count, arguments, max_restarts, nodes, module)
    if nodes:
        nodes.wait()
        nodes.watch()
    os.environ.update(environment)
    logging.disable(logging.ERROR)  # the launcher's own accounts of what its workers have said
    try:
        launch_command(launch_command_parser().parse_args(words))
    except SignalException as error:
        return REQUEUE if error.sigval in SIGNALS else 128 + int(error.sigval)
    except ChildFailedError as error:
        return _failed(error)
    except (RendezvousError, DistError) as error:
        where = f" at {nodes.main}:{nodes.port}" if nodes else ""
        print(f"headwater: the processes lost each other{where} ({str(error).splitlines()[0]})", file=sys.stderr)
        return PEER_LOST
    return 0 if run is None else _stopped(run)


def _stopped(run: Path) -> int:
    """The status of a run whose processes all ended well: 75 where it was preempted and wants to go on."""
    try:
        said = json.loads((run / "status.json").read_text())
    except (OSError, ValueError):
        return 0
    return Preempted(said.get("reason", "")).status if said.get("state") == "preempted" else 0


def _failed(error: Any) -> int:
    """The exit status after torchrun's `ChildFailedError`; names the signal where one has killed a process."""
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


def launch_words(
    count: int, arguments: list[str], max_restarts: int = 0, nodes: Nodes | None = None, module: str = "pretrain"
) -> tuple[list[str], dict[str, str]]:
    """The words after `accelerate launch`, and what they need in the environment.

    On the CPU accelerate would start a single process; its multi-GPU path with ACCELERATE_USE_CPU set
    starts them all, connected by gloo. Our own configuration file is named, so that a user's default one
    is never picked up.
    """
    import torch

    gpu = torch.cuda.is_available()
    if gpu and count > torch.cuda.device_count():
        raise UserError(f"--processes {count}: this machine has {torch.cuda.device_count()} GPUs")
    several = "fsdp2.yaml" if "train.shard=true" in arguments else "ddp.yaml"
    config = "nodes.yaml" if nodes else several if gpu else "cpu.yaml"
    words = ["--config_file", str(CONFIGS / config)]
    words += nodes.words(count) if nodes else ["--num_processes", str(count), "--main_process_port", "0"]
    words += ["--max_restarts", str(max_restarts), "-m", module]
    home = str(Path(__file__).resolve().parent.parent)
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH", "")]))}
    threads = str(max(1, (os.cpu_count() or 1) // count))
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", threads)
    # Without this, SIGUSR1 would kill the launcher alone. What time there is to save, the scheduler decides.
    handled = [*(each.name for each in SIGNALS), "SIGINT", "SIGHUP", "SIGQUIT"]
    environment["PET_SIGNALS_TO_HANDLE"] = os.environ.get("PET_SIGNALS_TO_HANDLE", ",".join(handled))
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", GRACE_SECONDS)
    if not gpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    # torchrun's own meeting place, new for every start: those of accelerate's default are found stale by workers
    # that were started again. On several machines they meet where --main-address says.
    meeting = nodes.environment() if nodes else {"PET_STANDALONE": "1", "PET_LOCAL_ADDR": "127.0.0.1"}
    meeting["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    environment |= {name: os.environ.get(name, value) for name, value in meeting.items()}
    return words + arguments, environment
