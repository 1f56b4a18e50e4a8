"""The Kubernetes manifests: right for KubeRay, safe, every key explained; a mistake in each is named."""

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from pipeline.rayjob_file import OPTIONS, entrypoint_problems, pod_problems, quantity, rayjob_problems

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = Path(os.environ.get("RAYJOB_SCHEMA", ROOT.parent / "shared" / "k8s" / "rayjob-v1.schema.json.gz"))
JOBS = {name: f"configs/kuberay/rayjob-{name}.yaml" for name in ("train", "tune", "predict")}
MLFLOW = ROOT / "configs/kuberay/mlflow.yaml"
Content = dict[str, Any]


def load(name: str) -> Content:
    content: Content = yaml.safe_load((ROOT / JOBS[name]).read_text())
    return content


def schema_problems(job: Content) -> list[str]:
    """What KubeRay's own schema refuses."""
    if not SCHEMA.exists():
        pytest.skip("KubeRay's schema is not here; RAYJOB_SCHEMA names it")
    validator = jsonschema.Draft7Validator(json.loads(gzip.decompress(SCHEMA.read_bytes())))
    return [error.message for error in validator.iter_errors(job)]


@pytest.mark.parametrize("name", JOBS)
def test_our_rules_hold(name: str) -> None:
    assert rayjob_problems(load(name)) == []


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
GPU_CONTAINER = (*GPU_POD, "containers", 0)
SHARED_MEMORY = (*GPU_POD, "volumes", 0, "emptyDir")
TOLERATION = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


def more(arguments: str) -> Callable[[Content], None]:
    """Arguments at the end of the entrypoint, where the last one counts."""

    def change(content: Content) -> None:
        content["spec"]["entrypoint"] = f"{content['spec']['entrypoint'].strip()} {arguments}"

    return change


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
    job = json.loads(json.dumps(load(name)))  # nothing in it is one and the same thing any more
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
        (put({}, "metadata"), "metadata lacks name"),
        (put(-5, "spec", "activeDeadlineSeconds"), "a time or number beyond reason"),
        (put(1000, "spec", "backoffLimit"), "a time or number beyond reason"),
        (put(True, "spec", "suspend"), "it is suspended and would wait for ever"),
        (put({"a": "b"}, "spec", "clusterSelector"), "clusterSelector would take a cluster that is there"),
        (put("HTTPMode", "spec", "submissionMode"), "submitted otherwise than by a pod of its own"),
        (put("pip: [torch]", "spec", "runtimeEnvYAML"), "runtimeEnvYAML: the image has it all"),
        (put("OnFailur", "spec", "submitterPodTemplate", "spec", "restartPolicy"), "the pod that submits has to end"),
        (put(False, *CLUSTER, "enableInTreeAutoscaling"), "nothing brings workers"),
        (put(None, *CLUSTER, "autoscalerOptions", "resources"), "the autoscaler has no bounds"),
        (put("4", *CLUSTER, "headGroupSpec", "rayStartParams", "num-gpus"), "the head trains"),
        (put({"spec": {"type": "LoadBalancer"}}, *CLUSTER, "headGroupSpec", "headService"), "reached from outside"),
        (put({"num-gpus": "0"}, *GPU, "rayStartParams"), "workers that hide what they have"),
        (put("ingest", *GPU, "groupName"), "groups of one name"),
        (put(-1, *GPU, "minReplicas"), "replicas beyond the limits"),
        (put(800, *GPU, "maxReplicas"), "replicas beyond the limits"),
        (put([{**TOLERATION, "effect": "NoExecute"}], *GPU_POD, "tolerations"), "gpu: no toleration of GPU nodes"),
        (put([{**TOLERATION, "operator": "Exist"}], *GPU_POD, "tolerations"), "gpu: no toleration of GPU nodes"),
        (
            put("64Mi", *SHARED_MEMORY, "sizeLimit"),
            "gpu: /dev/shm has to have a gigabyte or more, and less than the pod",
        ),
        (put(None, *SHARED_MEMORY, "sizeLimit"), "gpu: /dev/shm has to have a gigabyte or more, and less than the pod"),
        (
            put("99Gi", *SHARED_MEMORY, "sizeLimit"),
            "gpu: /dev/shm has to have a gigabyte or more, and less than the pod",
        ),
        (put(True, *GPU_POD, "hostPID"), "gpu: reaches into its node"),
        (put(True, *GPU_CONTAINER, "securityContext", "privileged"), "gpu: may gain rights"),
        (put([{"containerPort": 1, "hostPort": 1}], *GPU_CONTAINER, "ports"), "gpu: opens a port of its node"),
        (put([{"name": "RAY_AUTH_MODE", "value": "disabled"}], *GPU_CONTAINER, "env"), "gpu: no token wanted"),
        (put("python jobs/train.py", "spec", "entrypoint"), "entrypoint: has to begin with python"),
        (put("python /home/ray/mask-rcnn/jobs/trian.py", "spec", "entrypoint"), "entrypoint: has to begin with python"),
        (put("python 'jobs/train.py", "spec", "entrypoint"), "entrypoint: No closing quotation"),
        (more("--register $(id)"), "entrypoint: $ is for a shell"),
        (more("--register a;id"), "entrypoint: ; is for a shell"),
        (put(0, *GPU_CONTAINER, "securityContext", "runAsUser"), "gpu: may run as root"),
        (put(False, *GPU_CONTAINER, "securityContext", "runAsNonRoot"), "gpu: may run as root"),
        (put(0, *GPU_POD, "securityContext", "runAsUser"), "gpu: may run as root"),
        (
            put([{"name": "MLFLOW_TRACKING_URI", "value": "http://me:a@mlflow"}], *GPU_CONTAINER, "env"),
            "gpu: secret in the manifest",
        ),
        (put("many", "spec", "activeDeadlineSeconds"), "spec.activeDeadlineSeconds: has to be integer, got 'many'"),
        (put("x", "spec"), "spec: has to be a mapping"),
        (put([], *CLUSTER, "workerGroupSpecs"), "spec.rayClusterSpec.workerGroupSpecs: "),
        *[
            (put(None, *GPU, key), f"spec.rayClusterSpec.workerGroupSpecs.0.{key}: is missing")
            for key in ("groupName", "template", "replicas", "minReplicas", "maxReplicas")
        ],
        *[
            (put(None, *GPU_CONTAINER, key), f"workerGroupSpecs.0.template.spec.containers.0.{key}: is missing")
            for key in ("name", "image")
        ],
        (put(3, *GPU_CONTAINER, "image"), "containers.0.image: has to be text, got 3"),
        (put([{"name": "a"}], *GPU_CONTAINER, "volumeMounts"), "volumeMounts.0.mountPath: is missing"),
        (put(None, *CLUSTER, "headGroupSpec"), "spec.rayClusterSpec.headGroupSpec: is missing"),
        (more("--run.storage_path /tmp/runs"), "entrypoint: run.storage_path /tmp/runs is no bucket"),
        (more("--run.mlflow_uri null"), "entrypoint: no MLflow server"),
        (more("--scaling.acelerator gpu"), "entrypoint: scaling.acelerator: no such key"),
        (more("--train.batch_size_per_worker many"), "entrypoint: train.batch_size_per_worker: "),
        (more("--config /home/ray/mask-rcnn/configs/none.yaml"), "none.yaml"),
        (more("--scaling.accelerator cpu"), "entrypoint: without --scaling.accelerator gpu"),
        (more("--run.mlflow_uri http://me:secret@mlflow"), "entrypoint: run.mlflow_uri has a password"),
    ],
)
def test_our_rules_name_a_mistake(name: str, change: Callable[[Content], None], expected: str) -> None:
    job = json.loads(json.dumps(load(name)))  # nothing in it is one and the same thing any more
    change(job)
    (problem,) = rayjob_problems(job)
    assert expected in problem
    assert "\n" not in problem
    assert "secret@" not in problem


@pytest.mark.parametrize("name", JOBS)
def test_every_key_is_explained(name: str) -> None:
    lines = (ROOT / JOBS[name]).read_text().splitlines()
    keys = [line for line in lines if re.match(r"\s*(- )?[\w./-]+:( |$)", line) and not line.lstrip().startswith("#")]
    assert len(keys) > 90
    assert [line for line in keys if " # " not in line] == []


def test_there_are_as_many_gpus_as_the_jobs_ask_for() -> None:
    for name, number in (("train", 8), ("tune", 8), ("predict", 4)):
        entrypoint = load(name)["spec"]["entrypoint"]
        assert list(entrypoint_problems(entrypoint, number)) == []
        assert list(entrypoint_problems(entrypoint, number - 1)) == [
            f"entrypoint: {number} workers for {number - 1} GPUs"
        ]


def test_the_options_are_those_of_the_jobs() -> None:
    for job, options in OPTIONS.items():
        text = (ROOT / "jobs" / f"{job}.py").read_text()
        names = {name for group in options.values() for name in group}
        assert [name for name in sorted(names) if f'"{name}": ' not in text] == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [("30Gi", 30 * 2**30), ("500m", 0.5), ("4", 4), (2, 2), ("1k", 1000), (None, None), ("x", None)],
)
def test_quantities(value: Any, expected: float | None) -> None:
    assert quantity(value) == expected


def mlflow_documents() -> dict[tuple[str, str], Content]:
    documents = list(yaml.safe_load_all(MLFLOW.read_text()))
    return {(document["kind"], document["metadata"]["name"]): document for document in documents}


API = {
    "StatefulSet": "apps/v1",
    "Deployment": "apps/v1",
    "Service": "v1",
    "NetworkPolicy": "networking.k8s.io/v1",
}
PEERS = {
    "mlflow": [{"namespaceSelector": {"matchLabels": {"mlflow-client": "true"}}}],
    "mlflow-database": [{"podSelector": {"matchLabels": {"app": "mlflow"}}}],
}


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
        assert document["apiVersion"] == API[kind]
        if kind == "NetworkPolicy":
            (rule,) = document["spec"]["ingress"]
            assert rule["from"] == PEERS[name], f"{name} hears others"
            assert rule["ports"]
            assert document["spec"]["podSelector"] == {"matchLabels": {"app": name}}
            assert "Ingress" in document["spec"].get("policyTypes", ["Ingress"])
        if kind == "Service":
            assert document["spec"]["selector"] == {"app": name}
        if kind in ("StatefulSet", "Deployment"):
            assert document["spec"]["replicas"] == 1
            assert template["metadata"]["labels"] == {"app": name}
            secrets = [v["valueFrom"]["secretKeyRef"] for v in _variables(template) if "valueFrom" in v]
            assert secrets == [{"name": "mlflow-database", "key": "password"}]


def _variables(template: Content) -> list[Content]:
    variables: list[Content] = template["spec"]["containers"][0]["env"]
    return variables


def test_mlflow_takes_the_arguments_of_its_server() -> None:
    from mlflow.cli import cli

    (container,) = mlflow_documents()["Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["mlflow", "server"]
    text = CliRunner().invoke(cli, ["server", "--help"]).output
    options = {argument.partition("=")[0] for argument in container["args"]}
    assert len(options) == 6
    assert {option for option in options if not re.search(rf"{option}\b", text)} == set()
    values = dict(argument.split("=", 1) for argument in container["args"])
    assert values["--artifacts-destination"].startswith("s3://")
    assert "*" not in values["--allowed-hosts"]
    uri = values["--backend-store-uri"]
    assert uri.startswith("postgresql://")
    assert not re.search(r"://[^/@]*:[^/@]*@", uri), "a password in the address"
