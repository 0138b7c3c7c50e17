"""Files for Kubernetes against its own schemas, and what holds them together."""

from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="manifests: pip install '.[manifests]'")
validate = pytest.importorskip("kubernetes_validate", reason="manifests: pip install '.[manifests]'").validate

ROOT = Path(__file__).resolve().parents[2]
VERSION = "1.30"

# MPIJob v2beta1 as its definition (CRD) has it, without its status: written down from the definition's fields.
_INTEGER, _STRING, _BOOLEAN = {"type": "integer"}, {"type": "string"}, {"type": "boolean"}
REPLICA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["template"],
    "properties": {
        "replicas": {"type": "integer", "minimum": 0},
        "restartPolicy": {"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
        "template": {"type": "object"},
    },
}
MPIJOB = {
    "type": "object",
    "additionalProperties": False,
    "required": ["mpiReplicaSpecs"],
    "properties": {
        "launcherCreationPolicy": {"enum": ["AtStartup", "WaitForWorkersReady"]},
        "mpiImplementation": {"enum": ["OpenMPI", "Intel", "MPICH"]},
        "mpiReplicaSpecs": {
            "type": "object",
            "additionalProperties": False,
            "required": ["Launcher", "Worker"],
            "properties": {"Launcher": REPLICA, "Worker": REPLICA},
        },
        "runLauncherAsWorker": _BOOLEAN,
        "runPolicy": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "activeDeadlineSeconds": _INTEGER,
                "backoffLimit": _INTEGER,
                "cleanPodPolicy": {"enum": ["None", "Running", "All"]},
                "managedBy": _STRING,
                "schedulingPolicy": {"type": "object"},
                "suspend": _BOOLEAN,
                "ttlSecondsAfterFinished": _INTEGER,
            },
        },
        "slotsPerWorker": _INTEGER,
        "sshAuthMountPath": _STRING,
    },
}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "launch" / name).read_text()))


def pod(template: dict[str, Any]) -> dict[str, Any]:
    """A template as the pod that is made of it."""
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}


def checked(document: dict[str, Any]) -> None:
    """Raise where a document is not what its kind may be."""
    import jsonschema

    if document["kind"] != "MPIJob":
        validate(document, VERSION, strict=True)
        return
    assert document["apiVersion"] == "kubeflow.org/v2beta1"
    jsonschema.validate(document["spec"], MPIJOB)
    for replica in document["spec"]["mpiReplicaSpecs"].values():
        validate(pod(replica["template"]), VERSION, strict=True)


@pytest.mark.parametrize("name", ["job.yaml", "mpijob.yaml"])
def test_manifests_are_what_their_kinds_may_be(name: str) -> None:
    found = documents(name)
    for document in found:
        checked(document)
    # Each claim and configuration that a pod names is there.
    made = {(document["kind"], document["metadata"]["name"]) for document in found}
    for template in templates(found):
        for volume in template["spec"]["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in made
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in made
        known = {volume["name"] for volume in template["spec"]["volumes"]}
        for container in template["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= known


def templates(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    one = [document["spec"]["template"] for document in found if document["kind"] == "StatefulSet"]
    jobs = [document["spec"]["mpiReplicaSpecs"] for document in found if document["kind"] == "MPIJob"]
    return one + [replica["template"] for job in jobs for replica in job.values()]


def test_what_is_misspelt_is_found() -> None:
    job = next(document for document in documents("mpijob.yaml") if document["kind"] == "MPIJob")
    job["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["comand"] = ["x"]
    with pytest.raises(Exception, match="comand"):
        checked(job)
    job = next(document for document in documents("mpijob.yaml") if document["kind"] == "MPIJob")
    job["spec"]["slotPerWorker"] = 1
    with pytest.raises(Exception, match="slotPerWorker"):
        checked(job)
    known = next(document for document in documents("job.yaml") if document["kind"] == "StatefulSet")
    known["spec"]["replicas"] = "three"
    with pytest.raises(Exception, match="three"):
        checked(known)


@pytest.mark.parametrize("name", ["docker-compose.yml", "docker-compose.more.yml"])
def test_only_loopback_is_published_and_nobody_has_rights(name: str) -> None:
    for service in yaml.safe_load((ROOT / name).read_text())["services"].values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
        assert not service.get("privileged")
