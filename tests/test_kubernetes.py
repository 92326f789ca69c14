"""Generated manifests are ones that Kubernetes, Kubeflow and SkyPilot take, judged by their own schemas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from data.errors import UserError
from launch.cli import main
from launch.kubernetes import KINDS, ClusterJob, Kind, manifests
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_pod_has_time_to_save_shared_memory_and_the_volume(kind: Any) -> None:
    tree = manifests(JOB, kind)[-1]
    if kind == "trainjob":
        pod, said = replicated()["spec"]["template"]["spec"], tree["spec"]["trainer"]
    else:
        pod = (tree["spec"] if kind == "job" else tree["spec"]["pytorchReplicaSpecs"]["Worker"])["template"]["spec"]
        said = pod["containers"][0]
    shutdown = int(said["env"][0]["value"])
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


def replicated() -> dict[str, Any]:
    """The Job template of the TrainJob's runtime."""
    found: dict[str, Any] = manifests(JOB, "trainjob")[0]["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]
    return found


def by_kubeflow_trainer(tree: dict[str, Any]) -> dict[str, Any]:
    """What Kubeflow Trainer's own model keeps of it: it checks types, and drops fields that it does not know."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    model = {"TrainJob": models.TrainerV1alpha1TrainJob, "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime}
    kept: dict[str, Any] = model[tree["kind"]].from_dict(tree).to_dict()
    return kept


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_trainjob_is_valid(nodes: int) -> None:
    runtime, job = manifests(replace(JOB, nodes=nodes), "trainjob")
    for tree in (runtime, job):
        assert by_kubeflow_trainer(tree) == tree
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["spec"]["trainer"]["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"] == nodes
    # The Job within is Kubernetes' own, once the trainer's settings are in its container.
    template = replicated()["spec"] | {"completions": nodes, "parallelism": nodes}
    template["template"]["spec"]["containers"][0]["command"] = job["spec"]["trainer"]["command"]
    validate({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": template})


def test_the_trainjobs_validator_can_fail() -> None:
    runtime, job = manifests(JOB, "trainjob")
    job["spec"]["trainer"]["nodes"] = 2
    assert by_kubeflow_trainer(job) != job
    runtime["spec"]["template"]["spec"]["failurePolicy"]["maxRestarts"] = "many"
    with pytest.raises(ValueError, match="maxRestarts"):
        by_kubeflow_trainer(runtime)


def test_the_trainjob_restarts_as_the_plain_job_does() -> None:
    plain = manifests(JOB)[-1]["spec"]
    job = replicated()["spec"]
    assert job["podFailurePolicy"] == plain["podFailurePolicy"]
    assert job["backoffLimit"] == plain["backoffLimit"] == JOB.restarts
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    labels = replicated()["metadata"]["labels"]
    assert labels == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}, "or the trainer finds no job to fill"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_printed_says_what_was_not_run(kind: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "kubernetes", "mae_cifar10", "data.train=shards", "--image", "x:1", "--kind", kind]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "ran it on no cluster" in printed
    job = ClusterJob("mae-cifar10", ["mae_cifar10", "data.train=shards", "--output", "runs/mae_cifar10"], "x:1", gpus=0)
    assert list(yaml.safe_load_all(printed)) == manifests(job, kind)


def test_nodes_meet_at_the_first() -> None:
    job = manifests(JOB)[-1]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert job[job.index("--main-address") + 1] == "mae-vit-b-0.mae-vit-b"
    train = manifests(JOB, "trainjob")[-1]["spec"]["trainer"]["command"]
    assert train[train.index("--main-address") + 1] == "mae-vit-b-node-0-0.mae-vit-b"
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


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Bad_Name"},
        {"nodes": 0},
        {"cpus": 0},
        {"claim": "A B"},
        {"memory": "lots"},
        {"mount": "here"},
        {"save_seconds": 0},
    ],
)
def test_what_a_cluster_would_refuse(change: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        manifests(replace(JOB, **change))
