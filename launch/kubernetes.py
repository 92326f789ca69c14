"""Kubernetes manifests of a run: a plain Indexed Job, or Kubeflow's PyTorchJob or TrainJob."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data.errors import UserError
from pretrain.exits import REQUEUE

Kind = Literal["job", "pytorchjob", "trainjob"]
KINDS: tuple[Kind, ...] = ("job", "pytorchjob", "trainjob")
_PORT = 29400
_SHUTDOWN_SECONDS = 60
"""What the launcher and the watchdog may need besides the save."""
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?([kMGTP]|[KMGTP]i)?")
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?")


@dataclass(frozen=True)
class ClusterJob:
    """What is asked of a cluster that runs containers."""

    name: str
    """Of the job: lower-case letters, digits and hyphens."""
    words: Sequence[str]
    """What follows `headwater pretrain`: the recipe, its settings, `--output`."""
    image: str
    """Container image with headwater installed."""
    nodes: int = 1
    gpus: int = 8
    """GPUs of each node, with one process each; 0 for a single CPU process."""
    cpus: int = 16
    memory: str = "64Gi"
    """Main memory of each node."""
    shared_memory: str = "16Gi"
    """Size of /dev/shm: workers pass batches through it, and the container default of 64 MiB is too small."""
    claim: str = "headwater"
    """Persistent volume claim (ReadWriteMany for several nodes) that holds shards and runs."""
    mount: str = "/mnt/headwater"
    """Where it is mounted; paths in `words` lie below it."""
    save_seconds: int = 240
    """The longest that a step and a save may take after the signal to stop."""
    restarts: int = 100
    """How often failed pods are started again before the job is given up."""


def manifests(job: ClusterJob, kind: Kind = "job") -> list[dict[str, Any]]:
    """The objects to apply.

    `job` needs nothing but Kubernetes (1.26 or newer): an Indexed Job, whose first pod is found through a
    headless service, and in which a pod that saved and ended with status 75 is replaced without counting
    as a failure. `pytorchjob` needs Kubeflow's training operator (v1). `trainjob` needs Kubeflow Trainer (v2):
    a TrainJob beside a TrainingRuntime of its own, which holds what a TrainJob cannot say (volumes, restarts).

    Raises:
        UserError: a name that Kubernetes does not take, or a number that makes no sense.
    """
    check(job)
    return {"job": _indexed, "pytorchjob": _pytorch, "trainjob": _train}[kind](job)


def preface(kind: Kind) -> str:
    """YAML comments that say how far manifests of this kind were tried, and what to do next."""
    schema, needs = {
        "job": ("Kubernetes 1.31's schema", "Kubernetes 1.26 or newer"),
        "pytorchjob": ("the fields of Kubeflow's Python models (kubeflow-training)", "Kubeflow training operator v1"),
        "trainjob": ("Kubeflow Trainer's Python models (kubeflow-trainer-api 2)", "Kubeflow Trainer v2"),
    }[kind]
    return (
        f"# Needs {needs}, and the volume claim. Headwater's tests checked this shape against {schema};\n"
        "# they ran it on no cluster. Next: kubectl apply --dry-run=server -f FILE, then kubectl apply -f FILE.\n"
    )


def check(job: ClusterJob) -> None:
    """Raises `UserError` where a cluster would refuse the job."""
    if not _NAME.fullmatch(job.name):
        raise UserError(f"job name {job.name!r} must be lower-case letters, digits and hyphens (--name)")
    if job.nodes < 1 or job.gpus < 0 or job.cpus < 1:
        raise UserError(f"{job.nodes} nodes of {job.gpus} GPUs and {job.cpus} CPUs: use at least 1 node and 1 CPU")
    if not _NAME.fullmatch(job.claim):
        raise UserError(f"volume claim {job.claim!r} must be lower-case letters, digits and hyphens (--claim)")
    if not _QUANTITY.fullmatch(job.memory):
        raise UserError(f"memory {job.memory!r} is no amount that Kubernetes knows; write one such as 64Gi (--memory)")
    if not job.mount.startswith("/"):
        raise UserError(f"mount {job.mount!r} must begin with / (--mount)")
    if job.save_seconds < 1:
        raise UserError(f"--save-seconds {job.save_seconds}: at least 1 is needed")


def command(job: ClusterJob, main: str) -> list[str]:
    """What a node runs, `main` being the address of the first."""
    words = ["headwater", "pretrain", *job.words, "--processes", str(max(1, job.gpus))]
    if job.nodes > 1:
        words += ["--nodes", str(job.nodes), "--main-address", main, "--main-port", str(_PORT)]
    return words


def _indexed(job: ClusterJob) -> list[dict[str, Any]]:
    labels = {"app": job.name}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name, "labels": labels},
        # Pods find each other while they are starting, so names must not wait for readiness.
        "spec": {"clusterIP": "None", "selector": labels, "publishNotReadyAddresses": True},
    }
    pod = _pod(job, command(job, f"{job.name}-0.{job.name}"))
    pod["subdomain"] = job.name
    template = {"metadata": {"labels": labels}, "spec": pod}
    spec = {"completions": job.nodes, "parallelism": job.nodes} | _restarting(job, template)
    whole = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name, "labels": labels},
        "spec": spec,
    }
    return [service, whole] if job.nodes > 1 else [whole]


def _restarting(job: ClusterJob, template: dict[str, Any]) -> dict[str, Any]:
    """The part of a Job's spec that starts failed pods again, but not those that were given bad input."""
    template["spec"]["restartPolicy"] = "Never"  # the policy needs it; the Job makes new pods
    return {
        "completionMode": "Indexed",
        "backoffLimit": job.restarts,
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [REQUEUE]}},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}},
            ]
        },
        "template": template,
    }


def _pytorch(job: ClusterJob) -> list[dict[str, Any]]:
    pod = _pod(job, command(job, f"{job.name}-master-0"))
    pod["containers"][0]["name"] = "pytorch"  # the operator looks for a container of this name
    pod["containers"][0]["ports"] = [{"name": "pytorchjob-port", "containerPort": _PORT}]

    def replicas(count: int) -> dict[str, Any]:
        # OnFailure, not ExitCode: the operator takes statuses below 128, and so our 75, for permanent.
        return {"replicas": count, "restartPolicy": "OnFailure", "template": {"spec": pod}}

    roles = {"Master": replicas(1)} | ({"Worker": replicas(job.nodes - 1)} if job.nodes > 1 else {})
    spec = {
        "runPolicy": {"backoffLimit": job.restarts, "cleanPodPolicy": "None"},
        "pytorchReplicaSpecs": roles,
    }
    return [{"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": job.name}, "spec": spec}]


def _train(job: ClusterJob) -> list[dict[str, Any]]:
    pod = _pod(job, command(job, f"{job.name}-node-0-0.{job.name}"))  # as JobSet names the pod of the first node
    container = pod["containers"][0]
    container["name"] = "node"  # the trainer's settings go to the job and the container of this name
    trainer = {"image": container["image"], "command": container.pop("command"), "numNodes": job.nodes}
    trainer |= {"env": container.pop("env"), "resourcesPerNode": container.pop("resources")}
    replicated = {
        "name": "node",
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": _restarting(job, {"spec": pod}),
        },
    }
    # No torch policy: `headwater pretrain` starts the processes, and torchrun's variables would only disturb it.
    runtime = {
        "mlPolicy": {"numNodes": job.nodes},
        "template": {
            "spec": {
                # The Job replaces its pods; a JobSet that starts over would hide that bad input was refused.
                "failurePolicy": {"maxRestarts": 0},
                "network": {"publishNotReadyAddresses": True},
                "replicatedJobs": [replicated],
            }
        },
    }
    group = "trainer.kubeflow.org"
    reference = {"apiGroup": group, "kind": "TrainingRuntime", "name": job.name}
    head = {"apiVersion": f"{group}/v1alpha1"}
    return [
        head | {"kind": "TrainingRuntime", "metadata": {"name": job.name}, "spec": runtime},
        head
        | {"kind": "TrainJob", "metadata": {"name": job.name}, "spec": {"runtimeRef": reference, "trainer": trainer}},
    ]


def _pod(job: ClusterJob, words: list[str]) -> dict[str, Any]:
    size: dict[str, Any] = {"cpu": str(job.cpus), "memory": job.memory}
    size |= {"nvidia.com/gpu": str(job.gpus)} if job.gpus else {}
    return {
        # Longer than what the launcher waits for its workers, which wait for the save.
        "terminationGracePeriodSeconds": job.save_seconds + _SHUTDOWN_SECONDS,
        "containers": [
            {
                "name": "headwater",
                "image": job.image,
                "command": words,
                "workingDir": job.mount,
                "env": [{"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(job.save_seconds)}],
                "resources": {"requests": size, "limits": size},
                "volumeMounts": [
                    {"name": "work", "mountPath": job.mount},
                    {"name": "shm", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": job.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": job.shared_memory}},
        ],
    }
