"""`headwater launch slurm`: a batch script that requeues before its time limit and goes on exactly where it was."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import UserError
from data.files import write_atomically
from pretrain.exits import PEER_LOST, REQUEUE

TIME = re.compile(r"(\d+-)?\d{1,3}(:\d{2}){0,2}")
_POLL_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """What is asked of SLURM."""

    run: Path
    """The run's folder, on a file system that all nodes share."""
    words: Sequence[str]
    """What follows `headwater pretrain`: the recipe and its settings."""
    nodes: int = 1
    gpus: int = 0
    """GPUs of each node; 0 asks for none and starts `processes` CPU processes a node."""
    processes: int | None = None
    """Processes of each node; one for each GPU by default."""
    cpus: int | None = None
    """CPU cores of each node."""
    time: str = "24:00:00"
    """Time limit, as sbatch writes it (`[days-]hours:minutes:seconds`)."""
    lead: int = 300
    """Seconds before the limit at which the run is told to save and stop."""
    failures: int = 3
    """How often a job that failed on some node is requeued without that node."""
    setup: Sequence[str] = ()
    """Shell lines for every node before the run: modules, proxies, environment variables."""
    options: Sequence[str] = ()
    """More words for sbatch, such as `--partition=gpu`."""
    python: str = field(default_factory=lambda: sys.executable)


def script(job: Job) -> str:
    """The batch script.

    Raises:
        UserError: a number below what makes sense, or a time that sbatch would not read.
    """
    _check(job)
    per_node = job.processes or max(1, job.gpus)
    asked = {
        "job-name": job.run.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "time": job.time,
        "signal": f"USR1@{job.lead}",
        "requeue": None,
        "open-mode": "append",
        "output": job.run / "slurm" / "%j.log",
    }
    asked |= {"gpus-per-node": job.gpus} if job.gpus else {}
    asked |= {"cpus-per-task": job.cpus} if job.cpus else {}
    lines = [f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in asked.items()]
    lines += [f"#SBATCH {option}" for option in job.options]
    command = [job.python, "-m", "launch.cli", "pretrain", *job.words, "--output", str(job.run)]
    return _SCRIPT.format(
        directives="\n".join(lines),
        home=shlex.quote(str(Path(__file__).resolve().parent.parent)),
        setup="\n".join(f"    {line}" for line in job.setup) or "    :",
        run=shlex.quote(str(job.run)),
        command=shlex.join(command),
        per_node=per_node,
        failures=job.failures,
        peer_lost=PEER_LOST,
        again=REQUEUE,
    )


_SCRIPT = """#!/usr/bin/env bash
{directives}

# Written by `headwater launch slurm`; kept beside the run it belongs to.
# The steps get SIGUSR1 before the time limit, and SIGTERM when the job is preempted: the run then saves and
# ends with status {again}, and this script puts the job back into the queue, where it goes on from that save.
set -uo pipefail
export PYTHONPATH={home}${{PYTHONPATH:+:$PYTHONPATH}}
export HEADWATER_RUN={run}
export HEADWATER_MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEADWATER_PORT=$((20000 + SLURM_JOB_ID % 20000))

on_node() {{
    trap : USR1 TERM  # SLURM signals this shell as well: it waits for what the run makes of it
{setup}
    {command} --processes {per_node} --nodes "$SLURM_NNODES" \\
        --main-address "$HEADWATER_MAIN" --main-port "$HEADWATER_PORT"
    status=$?
    case $status in
        0 | 2 | {peer_lost} | {again}) ;;  # ended, bad input, lost another node, saved and to be continued
        *) echo "$status" > "$HEADWATER_RUN/slurm/failed-$SLURM_JOB_ID@$SLURMD_NODENAME" ;;
    esac
    return $status
}}
export -f on_node

srun --wait=300 bash -c on_node
status=$?

if [ $status -eq {again} ]; then
    echo "headwater: saved and to be continued; back into the queue"
    scontrol requeue "$SLURM_JOB_ID" && sleep 600
fi

# A node has failed: the same job once more, without it. (A requeued job could not be told to leave it out.)
failed=("$HEADWATER_RUN"/slurm/failed-"$SLURM_JOB_ID"@*)
if [ -e "${{failed[0]}}" ] && [ "${{HEADWATER_TRY:-0}}" -lt {failures} ]; then
    export HEADWATER_TRY=$((${{HEADWATER_TRY:-0}} + 1))
    gone=("${{failed[@]##*@}}" ${{HEADWATER_EXCLUDE:+${{HEADWATER_EXCLUDE//,/ }}}})
    export HEADWATER_EXCLUDE=$(printf '%s\\n' "${{gone[@]}}" | sort -u | paste -sd, -)
    next=$(sbatch --parsable --exclude="$HEADWATER_EXCLUDE" "$HEADWATER_RUN/slurm/job.sh") &&
        printf '{{"job": %s}}\\n' "${{next%%;*}}" > "$HEADWATER_RUN/slurm/job.json" &&
        echo "headwater: status $status; job $next goes on without $HEADWATER_EXCLUDE"
fi
exit $status
"""


def write(job: Job) -> Path:
    """Write the script to `RUN/slurm/job.sh`."""
    path = job.run / "slurm" / "job.sh"
    text = script(job)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
        path.chmod(0o755)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another --output") from None
    return path


def submit(path: Path) -> int:
    """Submit a script with sbatch; returns the job's number, which is also noted in `job.json` beside it.

    Raises:
        UserError: there is no SLURM here, or it refuses the job, in its own words.
    """
    if shutil.which("sbatch") is None:
        raise UserError(f"there is no sbatch on this machine; {path} is written: submit it where SLURM is")
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch refuses {path}: {' '.join(done.stderr.split())}")
    number = int(done.stdout.strip().split(";")[0])
    write_atomically(path.with_name("job.json"), json.dumps({"job": number}) + "\n")
    return number


def follow(run: Path, say: Callable[[str], None]) -> str:
    """Pass on the log of the run's job, and of those that follow it, until none is left.

    Returns:
        SLURM's word for how the last one ended, such as COMPLETED.
    """
    while True:
        number = current(run)
        state = _follow_one(number, run / "slurm" / f"{number}.log", say)
        if current(run) == number:
            return state


def current(run: Path) -> int:
    """The number of the run's newest job."""
    return int(json.loads((run / "slurm" / "job.json").read_text())["job"])


def _follow_one(number: int, log: Path, say: Callable[[str], None]) -> str:
    read, state, last = 0, "PENDING", ""
    while True:
        state = _state(number) or state
        if state != last:
            say(f"job {number}: {state}")
            last = state
        if log.exists():
            with open(log, "rb") as file:
                file.seek(read)
                chunk = file.read()
            whole = chunk[: chunk.rfind(b"\n") + 1]
            read += len(whole)
            for line in whole.decode(errors="replace").splitlines():
                say(line)
        if state in _ENDED:
            return state
        time.sleep(_POLL_SECONDS)


_ENDED = frozenset(
    ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED", "GONE")
)


def _state(number: int) -> str | None:
    """The job's state; GONE when the controller no longer knows it, None while it does not answer."""
    done = subprocess.run(["scontrol", "show", "job", "-o", str(number)], capture_output=True, text=True)
    if done.returncode:
        return "GONE" if "Invalid job id" in done.stderr else None
    found = re.search(r"JobState=(\w+)", done.stdout)
    return found.group(1) if found else None


def _check(job: Job) -> None:
    for name, value in {"--nodes": job.nodes, "--processes": job.processes, "--cpus": job.cpus}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: at least 1 is needed")
    for name, value in {"--gpus": job.gpus, "--lead": job.lead, "--failures": job.failures}.items():
        if value < 0:
            raise UserError(f"{name} {value} is below 0")
    if not TIME.fullmatch(job.time):
        raise UserError(f"--time {job.time!r} is no time limit; write [days-]hours:minutes:seconds, such as 24:00:00")
    if job.lead >= seconds_of(job.time):
        raise UserError(f"--lead {job.lead} seconds are no less than --time {job.time}; nothing would be trained")


def seconds_of(time: str) -> int:
    """Of a time limit that matches `TIME`, as sbatch reads it: with days, hours come first; alone, minutes do."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return 86400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds
