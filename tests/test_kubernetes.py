"""Generated manifests are ones that Kubernetes, Kubeflow and SkyPilot take, judged by their own schemas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from data.errors import UserError
from launch.kubernetes import ClusterJob, manifests
from launch.skypilot import task

JOB = ClusterJob("mae-vit-b", ["mae_vit_base", "--output", "runs/a"], "registry.example/headwater:1", nodes=2)
VERSION = "1.31"


def validate(tree: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    validator.validate(tree, VERSION, strict=True)


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_indexed_job_is_valid(nodes: int) -> None:
    for tree in manifests(replace(JOB, nodes=nodes)):
        validate(tree)


def test_the_validator_can_fail() -> None:
    tree = manifests(JOB)[-1]
    tree["spec"]["podFailurePolicy"]["rules"][0]["action"] = 1
    validator = pytest.importorskip("kubernetes_validate")
    with pytest.raises(validator.ValidationError):
        validate(tree)


def test_a_pod_that_saved_does_not_count_as_a_failure() -> None:
    rules = manifests(JOB)[-1]["spec"]["podFailurePolicy"]["rules"]
    ignored = [rule for rule in rules if rule["action"] == "Ignore" and "onExitCodes" in rule]
    assert ignored[0]["onExitCodes"]["values"] == [75]
    failed = [rule for rule in rules if rule["action"] == "FailJob"]
    assert failed[0]["onExitCodes"]["values"] == [2], "bad input is not tried again"


@pytest.mark.parametrize("kind", ["job", "pytorchjob"])
def test_a_pod_has_time_to_save_shared_memory_and_the_volume(kind: Any) -> None:
    tree = manifests(JOB, kind)[-1]
    pod = (tree["spec"] if kind == "job" else tree["spec"]["pytorchReplicaSpecs"]["Worker"])["template"]["spec"]
    shutdown = int(pod["containers"][0]["env"][0]["value"])
    assert pod["terminationGracePeriodSeconds"] > shutdown >= JOB.save_seconds
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert volumes["work"]["persistentVolumeClaim"]["claimName"] == JOB.claim
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == set(volumes)


def test_the_pytorchjob_has_the_fields_of_kubeflows_own_model() -> None:
    models = pytest.importorskip("kubeflow.training.models")
    (tree,) = manifests(JOB, "pytorchjob")
    assert set(tree) <= set(models.KubeflowOrgV1PyTorchJob.attribute_map.values())
    assert set(tree["spec"]) <= set(models.KubeflowOrgV1PyTorchJobSpec.attribute_map.values())
    assert set(tree["spec"]["runPolicy"]) <= set(models.KubeflowOrgV1RunPolicy.attribute_map.values())
    for role in tree["spec"]["pytorchReplicaSpecs"].values():
        assert set(role) <= set(models.KubeflowOrgV1ReplicaSpec.attribute_map.values())
        # The pod template is Kubernetes' own.
        pod = role["template"]["spec"]
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod})
        assert pod["containers"][0]["name"] == "pytorch"


def test_nodes_meet_at_the_first() -> None:
    job = manifests(JOB)[-1]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert job[job.index("--main-address") + 1] == "mae-vit-b-0.mae-vit-b"
    assert "--main-address" not in manifests(replace(JOB, nodes=1))[-1]["spec"]["template"]["spec"]["containers"][0]


def test_the_skypilot_task_is_valid() -> None:
    schemas = pytest.importorskip("sky.utils.schemas", reason="skypilot is not installed")
    jsonschema = pytest.importorskip("jsonschema")
    tree = task(JOB, "H100", "s3://mine")
    jsonschema.validate(tree, schemas.get_task_schema())
    jsonschema.validate(tree["resources"], schemas.get_resources_schema())


def test_the_skypilot_task_recovers_a_run_that_saved() -> None:
    tree = task(JOB, "H100", "s3://mine")
    assert tree["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert '--main-address "$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"' in tree["run"]
    with pytest.raises(UserError, match="--bucket"):
        task(JOB, "H100")


@pytest.mark.parametrize("change", [{"name": "Bad_Name"}, {"nodes": 0}, {"cpus": 0}])
def test_what_a_cluster_would_refuse(change: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        manifests(replace(JOB, **change))
