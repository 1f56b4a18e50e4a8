"""What is wrong with a RayJob manifest, found without a cluster: our rules, beside KubeRay's schema.

KubeRay itself refuses misspelt keys and wrong types when the manifest is applied; what it lets through is found here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.cluster_file import LEAST_SHARED_MEMORY
from pipeline.command_line import ConfigurationError, parse
from pipeline.config import has_secret
from pipeline.form_checks import TEXT, form_problems, list_of, mapping
from pipeline.sweep_config import SweepConfig

Content = dict[str, Any]

CODE = "/home/ray/mask-rcnn"  # where the image has this repository
ROOT = Path(__file__).resolve().parents[1]
OPTIONS: dict[str, dict[str, Any]] = {
    "train": {"optional": {"register": ""}, "flags": {"smoke": ""}},
    "tune": {},
    "prepare": {},
    "predict": {"extra": {"checkpoint": "", "images": "", "output": ""}},
}
"""Options of each job beside the configuration's keys."""
NEEDED = (
    "entrypoint", "activeDeadlineSeconds", "preRunningDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished",
    "shutdownAfterJobFinishes", "submitterPodTemplate", "rayClusterSpec",
)  # fmt: skip
LONGEST = {"activeDeadlineSeconds": 30 * 86400, "preRunningDeadlineSeconds": 86400, "backoffLimit": 10,
           "ttlSecondsAfterFinished": 86400}  # fmt: skip
_RESOURCES = mapping({"limits": {"type": "object"}, "requests": {"type": "object"}})
_CONTAINER = mapping(
    {
        "name": TEXT, "image": TEXT, "resources": _RESOURCES, "securityContext": {"type": "object"},
        "env": list_of(mapping({"name": TEXT}, ["name"])), "ports": list_of({"type": "object"}),
        "volumeMounts": list_of(mapping({"name": TEXT, "mountPath": TEXT}, ["name", "mountPath"])),
    },
    ["name", "image"],
)  # fmt: skip
_POD = mapping(
    {
        "spec": mapping(
            {
                "containers": list_of(_CONTAINER, least=1), "initContainers": list_of(_CONTAINER),
                "securityContext": {"type": "object"}, "tolerations": list_of({"type": "object"}),
                "volumes": list_of(mapping({"name": TEXT, "emptyDir": {"type": "object"}}, ["name"])),
            },
            ["containers"],
        )
    },
    ["spec"],
)  # fmt: skip
_GROUP = mapping(
    {
        "groupName": TEXT, "template": _POD, "rayStartParams": {"type": "object"},
        **{name: {"type": "integer"} for name in ("replicas", "minReplicas", "maxReplicas")},
    },
    ["groupName", "template", "replicas", "minReplicas", "maxReplicas"],
)  # fmt: skip
FORM = mapping(
    {
        "metadata": mapping({"name": TEXT, "labels": {"type": "object"}}),
        "spec": mapping(
            {
                "entrypoint": TEXT,
                **{name: {"type": "integer"} for name in LONGEST},
                "submitterPodTemplate": _POD,
                "rayClusterSpec": mapping(
                    {
                        "rayVersion": TEXT,
                        "headGroupSpec": mapping(
                            {"template": _POD, "rayStartParams": {"type": "object"}, "headService": {"type": "object"}},
                            ["template", "rayStartParams"],
                        ),
                        "workerGroupSpecs": list_of(_GROUP, least=1),
                        "autoscalerOptions": mapping({"resources": _RESOURCES}),
                    },
                    ["headGroupSpec", "workerGroupSpecs"],
                ),
            }
        ),
    }
)
"""What the rules here rely on, where KubeRay's schema is not at hand."""
SUBMITTER = "submitter"  # the one pod that runs no Ray
GPU = "nvidia.com/gpu"
GPU_TOLERATION = {"key": GPU, "operator": "Exists", "effect": "NoSchedule"}
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def rayjob_problems(job: Content) -> list[str]:
    """Everything that is wrong with a RayJob, by our rules, a line each; empty where nothing is."""
    import ray

    if (job.get("apiVersion"), job.get("kind")) != ("ray.io/v1", "RayJob"):
        return ["not a RayJob of ray.io/v1"]
    if not (job.get("metadata") or {}).get("name"):
        return ["metadata lacks name"]
    if not isinstance(job.get("spec"), dict):
        return ["spec: has to be a mapping"]
    spec = job["spec"]
    missing = [key for key in NEEDED if not spec.get(key)]
    if missing:
        return [f"spec lacks {key}" for key in missing]
    form = list(form_problems("", job, FORM))  # what comes next relies on it
    if form:
        return form
    cluster = spec["rayClusterSpec"]
    head = cluster["headGroupSpec"]
    groups = cluster["workerGroupSpecs"]
    rules = {
        "a time or number beyond reason": all(0 < spec[key] <= most for key, most in LONGEST.items()),
        "it is suspended and would wait for ever": not spec.get("suspend") or _is_queued(job),
        "clusterSelector would take a cluster that is there": "clusterSelector" not in spec,
        "submitted otherwise than by a pod of its own": spec.get("submissionMode", "K8sJobMode") == "K8sJobMode",
        "runtimeEnvYAML: the image has it all": not spec.get("runtimeEnvYAML"),
        "the pod that submits has to end": spec["submitterPodTemplate"]["spec"].get("restartPolicy") == "Never",
        "another Ray than the image's": cluster.get("rayVersion") == ray.__version__,
        "no token wanted": cluster.get("authOptions") == {"mode": "token"},
        "nothing brings workers": cluster.get("enableInTreeAutoscaling") is True,
        "the autoscaler has no bounds": _are_bounds((cluster.get("autoscalerOptions") or {}).get("resources")),
        "the head trains": head["rayStartParams"].get("num-cpus") == "0"
        and "num-gpus" not in head["rayStartParams"]
        and all(GPU not in c.get("resources", {}).get("limits", {}) for c in head["template"]["spec"]["containers"]),
        "reached from outside": head.get("serviceType") == "ClusterIP"
        and not head.get("enableIngress")
        and (head.get("headService") or {}).get("spec", {}).get("type", "ClusterIP") == "ClusterIP",
        "workers that hide what they have": all(
            not {"num-cpus", "num-gpus"} & set(group.get("rayStartParams") or {}) for group in groups
        ),
        "groups of one name": len({group["groupName"] for group in groups}) == len(groups),
        "several images": len({c["image"] for _, pod in pods(job) for c in _containers(pod)}) == 1,
        "no GPUs": any(_gpus_of(group) for group in groups),
        "nothing for reading data": any(not _gpus_of(group) for group in groups),
        "replicas beyond the limits": all(
            0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in groups
        )
        and all(0 < group["maxReplicas"] <= 100 for group in groups),
    }
    return [
        *[name for name, holds in rules.items() if not holds],
        *entrypoint_problems(spec["entrypoint"], sum(_gpus_of(group) * group["maxReplicas"] for group in groups)),
        *[problem for name, pod in pods(job) for problem in pod_problems(name, pod)],
        *[problem for name, pod in pods(job) if name != SUBMITTER for problem in _shared_memory_problems(name, pod)],
    ]


def pods(job: Content) -> Iterator[tuple[str, Content]]:
    """Spec of every kind of pod of a RayJob."""
    cluster = job["spec"]["rayClusterSpec"]
    yield SUBMITTER, job["spec"]["submitterPodTemplate"]["spec"]
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


def pod_problems(name: str, pod: Content) -> Iterator[str]:
    """What a pod lacks: a user, bounds, GPUs that it may reach."""
    if not all(_is_nobody({**pod.get("securityContext", {}), **own}) for own in _securities(pod)):
        yield f"{name}: may run as root"
    reaches = pod.get("hostNetwork") or pod.get("hostPID") or pod.get("hostIPC")
    if reaches or any("hostPath" in volume for volume in pod.get("volumes", [])):
        yield f"{name}: reaches into its node"
    for container in _containers(pod):
        security = container.get("securityContext", {})
        if (
            security.get("allowPrivilegeEscalation") is not False
            or security.get("capabilities") != {"drop": ["ALL"]}
            or security.get("privileged")
        ):
            yield f"{name}: may gain rights"
        resources = container.get("resources", {})
        if not _are_bounds(resources):
            yield f"{name}: requests are not limits"
        if not re.search(r":\d+(\.\d+)+$|@sha256:[0-9a-f]{64}$", container["image"]):
            yield f"{name}: image without a version"
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"{name}: opens a port of its node"
        for variable in container.get("env", []):
            is_named_so = re.search(r"(?i)password|secret|token|key", variable["name"]) is not None
            if "value" in variable and (is_named_so or has_secret(str(variable["value"]))):
                yield f"{name}: secret in the manifest"
            if variable["name"] == "RAY_AUTH_MODE" and variable.get("value") != "token":
                yield f"{name}: no token wanted"
        if GPU in resources.get("limits", {}) and GPU_TOLERATION not in pod.get("tolerations", []):
            yield f"{name}: no toleration of GPU nodes"


def _securities(pod: Content) -> list[Content]:
    """What each container says of its user and rights, which goes before what its pod says."""
    return [container.get("securityContext", {}) for container in _containers(pod)]


def _is_nobody(security: Content) -> bool:
    """Whether a process cannot be root."""
    return security.get("runAsNonRoot") is True and security.get("runAsUser", 1) != 0


def _shared_memory_problems(name: str, pod: Content) -> Iterator[str]:
    """Room for Ray's object store."""
    (container, *_) = pod["containers"]
    mounts = [mount["name"] for mount in container.get("volumeMounts", []) if mount["mountPath"] == "/dev/shm"]
    volumes = {volume["name"]: volume.get("emptyDir", {}) for volume in pod.get("volumes", [])}
    volume = volumes.get(mounts[0], {}) if len(mounts) == 1 else {}
    if volume.get("medium") != "Memory":
        yield f"{name}: no memory at /dev/shm"
        return
    size, memory = quantity(volume.get("sizeLimit")), quantity(container["resources"].get("limits", {}).get("memory"))
    if size is None or memory is None or not LEAST_SHARED_MEMORY <= size < memory:
        yield f"{name}: /dev/shm has to have a gigabyte or more, and less than the pod"


def _containers(pod: Content) -> list[Content]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def _gpus_of(group: Content) -> int:
    """GPUs of a pod of a group."""
    limits = [container.get("resources", {}).get("limits", {}) for container in group["template"]["spec"]["containers"]]
    return sum(int(entry.get(GPU, 0)) for entry in limits)


def _are_bounds(resources: Any) -> bool:
    """Whether CPU and memory are bounded, and what is asked for is what may be taken."""
    limits = (resources or {}).get("limits") or {}
    return {"cpu", "memory"} <= set(limits) and limits == resources.get("requests")


def _is_queued(job: Content) -> bool:
    """Whether Kueue begins it."""
    return "kueue.x-k8s.io/queue-name" in (job["metadata"].get("labels") or {})


def quantity(value: Any) -> float | None:
    """A quantity of Kubernetes (`30Gi`, `500m`) as a number; None of anything else."""
    match = re.fullmatch(r"([0-9.]+)(m|[kMGT]i?|)", str(value))
    if match is None:
        return None
    return float(match[1]) / 1000 if match[2] == "m" else float(match[1]) * UNITS[match[2]]


def entrypoint_problems(entrypoint: str, num_gpus: int) -> Iterator[str]:
    """Whether the command is one that its job takes, reads and writes buckets, and fits the GPUs.

    Args:
        entrypoint: of the manifest.
        num_gpus: that the groups may come to.
    """
    if shell := re.search(r"[$`;&|<>]", entrypoint):  # Ray runs it in a shell
        yield f"entrypoint: {shell[0]} is for a shell; leave it to the job's own options"
        return
    try:
        words = shlex.split(entrypoint)
    except ValueError as error:
        yield f"entrypoint: {error}"
        return
    match = re.fullmatch(rf"{CODE}/jobs/(\w+)\.py", words[1]) if len(words) > 1 and words[0] == "python" else None
    if match is None or match[1] not in OPTIONS or not (ROOT / "jobs" / f"{match[1]}.py").is_file():
        yield f"entrypoint: has to begin with python {CODE}/jobs/NAME.py"
        return
    job, arguments = match[1], [word.replace(CODE, str(ROOT)) for word in words[2:]]
    try:
        options = parse("", arguments, config_type=SweepConfig, **OPTIONS[job])
    except (ConfigurationError, SystemExit) as error:
        yield f"entrypoint: {error}"
        return
    config: SweepConfig = options.experiment
    places = {"run.storage_path": config.run.storage_path}
    if job == "predict":
        places |= {"images": options.images, "output": options.output}
    else:
        places["data.root"] = config.data.root
    yield from (f"entrypoint: {key} {value} is no bucket" for key, value in places.items() if "://" not in value)
    if not str(config.run.mlflow_uri).startswith(("http://", "https://")):
        yield "entrypoint: no MLflow server"
    if config.data.synthetic is not None and job != "predict":
        yield "entrypoint: data.synthetic would write a toy data set into the bucket"
    if config.scaling.accelerator == "gpu":
        wanted = {
            "train": config.scaling.num_workers,
            "tune": config.scaling.num_workers * (config.sweep.max_concurrent_trials or 1),
            "predict": config.predict.num_workers or 1,
        }.get(job, 0)
        if wanted > num_gpus:
            yield f"entrypoint: {wanted} workers for {num_gpus} GPUs"
    elif job != "prepare":
        yield "entrypoint: without --scaling.accelerator gpu it would not wait for GPUs"
