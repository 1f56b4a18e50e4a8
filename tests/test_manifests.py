"""The Kubernetes manifests: right for KubeRay, safe, every key explained; a mistake in each is named."""

import copy
import gzip
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from pipeline.command_line import parse

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = Path(os.environ.get("RAYJOB_SCHEMA", ROOT.parent / "shared" / "k8s" / "rayjob-v1.schema.json.gz"))
JOBS = {name: f"configs/kuberay/rayjob-{name}.yaml" for name in ("train", "tune", "predict")}
MLFLOW = ROOT / "configs/kuberay/mlflow.yaml"
Content = dict[str, Any]


def load(name: str) -> Content:
    content: Content = yaml.safe_load((ROOT / JOBS[name]).read_text())
    return content


def pods(job: Content) -> Iterator[tuple[str, Content]]:
    """Spec of every kind of pod of a RayJob."""
    cluster = job["spec"]["rayClusterSpec"]
    yield "submitter", job["spec"]["submitterPodTemplate"]["spec"]
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


def pod_problems(name: str, pod: Content) -> Iterator[str]:
    """What a pod lacks: a user, bounds, room for the object store, GPUs that it may reach."""
    if not pod.get("securityContext", {}).get("runAsNonRoot"):
        yield f"{name}: may run as root"
    if pod.get("hostNetwork") or any("hostPath" in volume for volume in pod.get("volumes", [])):
        yield f"{name}: reaches into its node"
    for container in pod["containers"]:
        security = container.get("securityContext", {})
        if security.get("allowPrivilegeEscalation") is not False or security["capabilities"] != {"drop": ["ALL"]}:
            yield f"{name}: may gain rights"
        resources = container.get("resources", {})
        if not resources.get("limits") or resources.get("limits") != resources.get("requests"):
            yield f"{name}: requests are not limits"
        if not re.search(r":\d+(\.\d+)+$", container["image"]):
            yield f"{name}: image without a version"
        for variable in container.get("env", []):
            if re.search(r"(?i)password|secret|token|key", variable["name"]) and "value" in variable:
                yield f"{name}: secret in the manifest"
        if "nvidia.com/gpu" in resources.get("limits", {}) and not any(
            toleration.get("key") == "nvidia.com/gpu" for toleration in pod.get("tolerations", [])
        ):
            yield f"{name}: no toleration of GPU nodes"
        if name not in ("submitter", "postgresql", "mlflow"):
            mounts = [mount["name"] for mount in container.get("volumeMounts", []) if mount["mountPath"] == "/dev/shm"]
            volumes = {volume["name"]: volume.get("emptyDir", {}) for volume in pod.get("volumes", [])}
            if len(mounts) != 1 or volumes.get(mounts[0], {}).get("medium") != "Memory":
                yield f"{name}: no memory at /dev/shm"


def job_problems(job: Content) -> list[str]:
    """Everything that is wrong with a RayJob, by our rules."""
    if (job.get("apiVersion"), job.get("kind")) != ("ray.io/v1", "RayJob"):
        return ["not a RayJob of ray.io/v1"]
    spec = job["spec"]
    missing = [
        key
        for key in ("entrypoint", "activeDeadlineSeconds", "preRunningDeadlineSeconds", "backoffLimit",
                    "ttlSecondsAfterFinished", "shutdownAfterJobFinishes", "submitterPodTemplate", "rayClusterSpec")
        if not spec.get(key)
    ]  # fmt: skip
    if missing:
        return [f"spec lacks {key}" for key in missing]
    cluster = spec["rayClusterSpec"]
    head = cluster["headGroupSpec"]
    version = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    assert version
    rules = {
        "another Ray than the image's": cluster.get("rayVersion") == version[1],
        "no token wanted": cluster.get("authOptions") == {"mode": "token"},
        "the head trains": head["rayStartParams"].get("num-cpus") == "0",
        "reached from outside": head.get("serviceType") == "ClusterIP" and not head.get("enableIngress"),
        "several images": len({c["image"] for _, pod in pods(job) for c in pod["containers"]}) == 1,
        "no GPUs": any("nvidia.com/gpu" in str(pod) for _, pod in pods(job)),
        "nothing for reading data": any(group["groupName"] == "ingest" for group in cluster["workerGroupSpecs"]),
        "replicas beyond the limits": all(
            group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in cluster["workerGroupSpecs"]
        ),
        "no bucket": "--run.storage_path s3://" in spec["entrypoint"],
        "no MLflow server": "--run.mlflow_uri http" in spec["entrypoint"],
    }
    return [name for name, holds in rules.items() if not holds] + [
        problem for name, pod in pods(job) for problem in pod_problems(name, pod)
    ]


def schema_problems(job: Content) -> list[str]:
    """What KubeRay's own schema refuses."""
    if not SCHEMA.exists():
        pytest.skip("KubeRay's schema is not here; RAYJOB_SCHEMA names it")
    validator = jsonschema.Draft7Validator(json.loads(gzip.decompress(SCHEMA.read_bytes())))
    return [error.message for error in validator.iter_errors(job)]


@pytest.mark.parametrize("name", JOBS)
def test_our_rules_hold(name: str) -> None:
    assert job_problems(load(name)) == []


@pytest.mark.parametrize("name", JOBS)
def test_kuberay_takes_it(name: str) -> None:
    assert schema_problems(load(name)) == []


def put(value: Any, *keys: str | int) -> Callable[[Content], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        if value is None:
            del content[keys[-1]]
        else:
            content[keys[-1]] = value

    return change


CLUSTER = ("spec", "rayClusterSpec")
GPU = (*CLUSTER, "workerGroupSpecs", 0)
GPU_POD = (*GPU, "template", "spec")


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (put(3, "spec", "backofLimit"), "'backofLimit' was unexpected"),
        (put("2", "spec", "backoffLimit"), "'2' is not of type 'integer'"),
        (put({"mode": "tokens"}, *CLUSTER, "authOptions"), "'tokens' is not one of"),
        (put(None, *GPU, "groupName"), "'groupName' is a required property"),
        (put(None, *CLUSTER, "headGroupSpec"), "'headGroupSpec' is a required property"),
        (put("Exists", *GPU_POD, "toleration"), "'toleration' was unexpected"),
    ],
)
def test_kuberay_names_a_mistake(name: str, change: Callable[[Content], None], expected: str) -> None:
    job = copy.deepcopy(load(name))
    change(job)
    assert any(expected in problem for problem in schema_problems(job))


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (put("RayCluster", "kind"), "not a RayJob of ray.io/v1"),
        (put(None, "spec", "activeDeadlineSeconds"), "spec lacks activeDeadlineSeconds"),
        (put(False, "spec", "shutdownAfterJobFinishes"), "spec lacks shutdownAfterJobFinishes"),
        (put("2.59.0", *CLUSTER, "rayVersion"), "another Ray than the image's"),
        (put(None, *CLUSTER, "authOptions"), "no token wanted"),
        (put("LoadBalancer", *CLUSTER, "headGroupSpec", "serviceType"), "reached from outside"),
        (put({}, *CLUSTER, "headGroupSpec", "rayStartParams"), "the head trains"),
        (put(9, *GPU, "minReplicas"), "replicas beyond the limits"),
        (put([], *GPU_POD, "tolerations"), "gpu: no toleration of GPU nodes"),
        (put([], *GPU_POD, "volumes"), "gpu: no memory at /dev/shm"),
        (put({"cpu": "1"}, *GPU_POD, "containers", 0, "resources", "requests"), "gpu: requests are not limits"),
        (put({}, *GPU_POD, "securityContext"), "gpu: may run as root"),
        (put(True, *GPU_POD, "hostNetwork"), "gpu: reaches into its node"),
        (
            put([{"name": "AWS_SECRET_ACCESS_KEY", "value": "a"}], *GPU_POD, "containers", 0, "env"),
            "gpu: secret in the manifest",
        ),
        (put("python jobs/train.py --run.mlflow_uri http://a", "spec", "entrypoint"), "no bucket"),
    ],
)
def test_our_rules_name_a_mistake(name: str, change: Callable[[Content], None], expected: str) -> None:
    job = copy.deepcopy(load(name))
    change(job)
    assert job_problems(job) == [expected]


@pytest.mark.parametrize("name", JOBS)
def test_every_key_is_explained(name: str) -> None:
    lines = (ROOT / JOBS[name]).read_text().splitlines()
    keys = [line for line in lines if re.match(r"\s*(- )?[\w./-]+:( |$)", line) and not line.lstrip().startswith("#")]
    assert len(keys) > 90
    assert [line for line in keys if " # " not in line] == []


def test_the_training_is_a_command_that_its_job_takes() -> None:
    command = shlex.split(load("train")["spec"]["entrypoint"].replace("/home/ray/mask-rcnn", str(ROOT)))
    assert command[:2] == ["python", str(ROOT / "jobs/train.py")]
    assert Path(command[1]).exists()
    config = parse("", command[2:], optional={"register": ""}).experiment
    assert config.scaling.num_workers == 8
    (gpu,) = (
        group for group in load("train")["spec"]["rayClusterSpec"]["workerGroupSpecs"] if group["groupName"] == "gpu"
    )
    assert gpu["maxReplicas"] == config.scaling.num_workers
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["cpu"]) > config.scaling.cpus_per_worker  # some are left for reading


def mlflow_documents() -> dict[tuple[str, str], Content]:
    documents = list(yaml.safe_load_all(MLFLOW.read_text()))
    return {(document["kind"], document["metadata"]["name"]): document for document in documents}


def test_mlflow_has_a_database_a_bucket_and_no_open_door() -> None:
    documents = mlflow_documents()
    kinds = ("Service", "NetworkPolicy")
    assert set(documents) == {
        ("StatefulSet", "mlflow-database"), ("Deployment", "mlflow"),
        *((kind, name) for kind in kinds for name in ("mlflow", "mlflow-database")),
    }  # fmt: skip
    for (kind, name), document in documents.items():
        assert document["metadata"]["namespace"] == "mlflow"
        if kind == "Service":
            assert document["spec"]["type"] == "ClusterIP"
        if kind in ("StatefulSet", "Deployment"):
            template = document["spec"]["template"]
            assert template["metadata"]["labels"] == document["spec"]["selector"]["matchLabels"]
            container = template["spec"]["containers"][0]["name"]
            assert list(pod_problems(container, template["spec"])) == [], name
        if kind == "NetworkPolicy":
            (rule,) = document["spec"]["ingress"]
            assert rule["from"], f"{name} hears everybody"
            assert rule["ports"]


def test_mlflow_takes_the_arguments_of_its_server() -> None:
    from mlflow.cli import cli

    (container,) = mlflow_documents()["Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["mlflow", "server"]
    text = CliRunner().invoke(cli, ["server", "--help"]).output
    options = {argument.partition("=")[0] for argument in container["args"]}
    assert len(options) == 6
    assert {option for option in options if not re.search(rf"{option}\b", text)} == set()
    (uri,) = (argument for argument in container["args"] if argument.startswith("--backend-store-uri"))
    assert not re.search(r"://[^/@]*:[^/@]*@", uri), "a password in the address"
