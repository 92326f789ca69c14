"""A SkyPilot task of a run, for `sky jobs launch`: spot machines that vanish, and a run that goes on."""

from __future__ import annotations

import shlex
from typing import Any

from data.errors import UserError
from launch.kubernetes import ClusterJob, check, command
from pretrain.exits import REQUEUE


def task(job: ClusterJob, accelerator: str, bucket: str | None = None, spot: bool = True) -> dict[str, Any]:
    """The task, as a tree to write as YAML.

    Args:
        job: `image` may be empty: headwater is then installed from the folder that is synced.
        accelerator: SkyPilot's name of the GPU, such as H100; each node gets `job.gpus`.
        bucket: URL of the bucket that is mounted at `job.mount`, and outlives the machines.
        spot: whether to ask for machines that may be taken away.

    Raises:
        UserError: without GPUs or a bucket: a recovered job would find nothing to go on from.
    """
    check(job)
    if not bucket:
        raise UserError("a recovered job starts on new machines: name a bucket that holds shards and runs (--bucket)")
    if job.gpus < 1:
        raise UserError("SkyPilot tasks are made for GPUs: give --gpus")
    line = shlex.join(command(job, "MAIN")).replace(" MAIN ", ' "$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" ')
    resources: dict[str, Any] = {
        "accelerators": {accelerator: job.gpus},
        "use_spot": spot,
        "job_recovery": {"max_restarts_on_errors": min(job.restarts, 10), "recover_on_exit_codes": [REQUEUE]},
    }
    if job.image:
        resources["image_id"] = f"docker:{job.image}"
    whole: dict[str, Any] = {
        "name": job.name,
        "num_nodes": job.nodes,
        "resources": resources,
        "file_mounts": {job.mount: {"source": bucket, "mode": "MOUNT_CACHED"}},
        "run": f"cd {shlex.quote(job.mount)}\n{line}\n",
    }
    if not job.image:
        whole |= {"workdir": ".", "setup": "pip install --quiet .\n"}
    return whole
