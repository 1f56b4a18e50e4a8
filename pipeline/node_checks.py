"""What every node of a cluster is and sees, asked by a task on each of them, and what of it does not go together."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config import ExperimentConfig
from pipeline.findings import Finding, fix, well

PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "numpy")
ANSWER_SECONDS = 20.0
MARK = b"written by the doctor"
MIN_FREE_GIGABYTES = 10.0
MAX_USED_FRACTION = 0.95  # where Ray stops to spill objects
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}  # of NVIDIA, by CUDA's major version (CUDA Compatibility, table 1)


@dataclass(frozen=True)
class NodeReport:
    """What a node says of itself."""

    name: str
    versions: dict[str, str]
    """Python and `PACKAGES`."""
    cuda: str | None
    """What torch was built for; None for a CPU build."""
    driver: str | None
    """NVIDIA driver; None where no GPU answers."""
    gpus: tuple[str, ...]
    shared_memory_bytes: int
    """Size of /dev/shm; 0 where there is none."""
    disk_free_bytes: int
    disk_used_fraction: float
    unseen: dict[str, str]
    """Paths that the node cannot read, with the reason."""
    resources: dict[str, float] = field(default_factory=dict)
    """What Ray hands out on it."""


def needed_paths(config: ExperimentConfig) -> dict[str, str]:
    """Files and folders that have to be there before a job begins, by the key that names them."""
    from pipeline import prepare  # which loads more than a node needs that is only asked

    if config.data.synthetic is not None or prepare.shards_alone(config) is not None:
        return {}
    paths = {}
    for key, source in config.data.sources_to_read().items():
        for name in ("annotations", "images"):
            paths[f"data.{key}.{name}"] = storage.absolute(getattr(source, name), config.data.root)
    return paths


def shared_folders(config: ExperimentConfig) -> dict[str, str]:
    """Folders that one node writes and all read, by the key that names them."""
    folders = {"run.storage_path": storage.absolute(config.run.storage_path)}
    if config.data.synthetic is not None:
        folders["data.root"] = storage.absolute(config.data.root)
    if config.data.shards is not None:
        folders["data.shards"] = storage.absolute(config.data.shards)
    return folders


def ask_nodes(config: ExperimentConfig | None) -> tuple[list[NodeReport], list[Finding]]:
    """Reports of all nodes that answer in time, and what went wrong in asking; Ray has to be running.

    A file is written from here into every shared folder, looked for from all nodes, and removed again.

    Args:
        config: what they have to see; None where only they themselves matter.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    marks, findings = _write_marks(config) if config is not None else ({}, [])
    paths = needed_paths(config) if config is not None else {}
    try:
        asked = {}
        for node in (node for node in ray.nodes() if node["Alive"]):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(_look).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            asked[task.remote(_name(node), marks, paths, node["Resources"])] = _name(node)
        done, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
        reports = []
        for answer in done:
            try:
                reports.append(ray.get(answer))
            except ray.exceptions.RayError as error:
                findings.append(fix("nodes", f"{asked[answer]} cannot run a task ({_one_line(error)})"))
        for answer in late:
            ray.cancel(answer, force=True)
            text = f"{asked[answer]} does not answer within {ANSWER_SECONDS:g} seconds; see `ray status`"
            findings.append(fix("nodes", text))
    finally:
        for mark in marks.values():
            with contextlib.suppress(Exception):
                storage.delete_file(mark)
    return sorted(reports, key=lambda report: report.name), findings


def _write_marks(config: ExperimentConfig) -> tuple[dict[str, str], list[Finding]]:
    """A small file in every shared folder, and the folders where that failed."""
    marks, findings = {}, []
    for key, folder in shared_folders(config).items():
        mark = storage.join(folder, f".doctor-{uuid.uuid4().hex}")
        try:
            storage.write_bytes(mark, MARK)
            marks[key] = mark
        except Exception as error:  # file systems and buckets raise many kinds
            text = f"{folder} cannot be written ({_one_line(error)}); see to rights and credentials"
            findings.append(fix(key, text))
    return marks, findings


def _name(node: dict[str, Any]) -> str:
    head = " (head)" if "node:__internal_head__" in node["Resources"] else ""
    return f"node {node['NodeManagerAddress']}{head}"


def _look(name: str, marks: dict[str, str], needed: dict[str, str], resources: dict[str, float]) -> NodeReport:
    """Ray task: what this node is and sees."""
    unseen = {}
    for key, path in (marks | needed).items():
        try:
            there = storage.read_bytes(path) == MARK if key in marks else storage.exists(path)
            if not there:
                unseen[key] = f"{path} is not there"
        except FileNotFoundError:
            unseen[key] = f"{path} is not there"
        except Exception as error:  # file systems and buckets raise many kinds
            unseen[key] = f"{path}: {_one_line(error)}"
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    driver, gpus = _gpus()
    disk = shutil.disk_usage(os.environ.get("TMPDIR", "/tmp"))
    shared_memory = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    return NodeReport(
        name,
        versions,
        _cuda_of_torch(),
        driver,
        gpus,
        shared_memory,
        disk.free,
        disk.used / disk.total,
        unseen,
        resources,
    )


def _gpus() -> tuple[str | None, tuple[str, ...]]:
    """Driver version and names of the GPUs, as nvidia-smi tells them."""
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None, ()
    rows = [line.split(", ", 1) for line in answer.strip().splitlines() if ", " in line]
    return (rows[0][0] if rows else None), tuple(row[1] for row in rows)


def _cuda_of_torch() -> str | None:
    """From torch's file of versions: importing torch would take seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        return None
    text = Path(found.submodule_search_locations[0], "version.py").read_text(encoding="utf-8")
    match = re.search(r"^cuda\b.*?=\s*'([\d.]+)'", text, flags=re.MULTILINE)
    return match[1] if match else None


def version_findings(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    """Nodes that run other versions than the rest."""
    names = dict.fromkeys(name for report in reports for name in report.versions)
    told = []
    differs = False
    for package in names:
        nodes_of = defaultdict(list)
        for report in reports:
            nodes_of[report.versions.get(package, "none")].append(report.name)
        told.append(f"{package} {', '.join(nodes_of)}")
        if len(nodes_of) > 1:
            differs = True
            by_version = "; ".join(f"{version} on {', '.join(nodes)}" for version, nodes in nodes_of.items())
            yield fix("versions", f"{package} differs: {by_version}; give all nodes one image")
    if not differs:
        yield well("versions", f"{', '.join(told)} on {_nodes(len(reports))}")


def sight_findings(
    reports: Sequence[NodeReport], config: ExperimentConfig, unwritten: Collection[str] = ()
) -> Iterator[Finding]:
    """Shared folders and data that some node does not see.

    Args:
        reports: of the nodes.
        config: what was asked for.
        unwritten: keys of shared folders that could not be written, of which nothing can be said.
    """
    shared, needed = shared_folders(config), needed_paths(config)
    for key, path in (shared | needed).items():
        if key in unwritten:
            continue
        blind = {report.name: report.unseen[key] for report in reports if key in report.unseen}
        if not blind:
            if key in shared:
                yield well(key, f"{path}: written here, read on {_nodes(len(reports))}")
            continue
        who = f"{', '.join(blind)} ({next(iter(blind.values()))})"
        if key in shared:
            yield fix(
                key, f"what is written here is not seen by {who}; take a folder that all nodes mount, or a bucket"
            )
        else:
            yield fix(key, f"not seen by {who}; bring it there, or take a folder that all nodes mount, or a bucket")
    if needed and not any(key in report.unseen for key in needed for report in reports):
        yield well("data", f"annotations and images below {config.data.root} are reached from {_nodes(len(reports))}")


def machine_findings(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    """Shared memory, disks and GPU drivers."""
    small = [
        f"{report.name}: /dev/shm has {report.shared_memory_bytes / 1e9:.1f} GB for an object store of "
        f"{report.resources.get('object_store_memory', 0) / 1e9:.1f} GB"
        for report in reports
        if report.shared_memory_bytes < report.resources.get("object_store_memory", 0)
    ]
    if small:
        yield fix(
            "shared memory", f"{'; '.join(small)}; start containers with --shm-size, pods with memory at /dev/shm"
        )
    else:
        yield well("shared memory", f"/dev/shm holds the object store on {_nodes(len(reports))}")
    full = [
        f"{report.name}: {report.disk_free_bytes / 1e9:.0f} GB free, {report.disk_used_fraction:.0%} used"
        for report in reports
        if report.disk_free_bytes < MIN_FREE_GIGABYTES * 1e9 or report.disk_used_fraction > MAX_USED_FRACTION
    ]
    if full:
        yield fix("disk", f"{'; '.join(full)}; Ray needs {MIN_FREE_GIGABYTES:g} GB and stops spilling at 95 % used")
    else:
        free = min(report.disk_free_bytes for report in reports)
        yield well("disk", f"at least {free / 1e9:.0f} GB free for temporary files on {_nodes(len(reports))}")
    yield from _gpu_findings(reports)


def _gpu_findings(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    with_gpus = [report for report in reports if report.resources.get("GPU", 0) > 0]
    if not with_gpus:
        return
    wrong = False
    for report in with_gpus:
        wanted = int(report.resources["GPU"])
        if report.driver is None or len(report.gpus) < wanted:
            wrong = True
            yield fix(
                "GPUs",
                f"{report.name} offers {wanted}, nvidia-smi shows {len(report.gpus)}; "
                "install the driver, and run the container with the NVIDIA runtime",
            )
        elif report.cuda is None:
            wrong = True
            yield fix(
                "GPUs", f"{report.name}: its torch is built for CPUs; install the CUDA build of requirements.lock"
            )
        elif (oldest := OLDEST_DRIVERS.get(int(report.cuda.split(".")[0]), 0)) > int(report.driver.split(".")[0]):
            wrong = True
            yield fix(
                "GPUs", f"{report.name}: driver {report.driver} is too old for CUDA {report.cuda}, which needs {oldest}"
            )
    drivers = {report.driver for report in with_gpus}
    if len(drivers) > 1:
        wrong = True
        by_node = ", ".join(f"{report.driver} on {report.name}" for report in with_gpus)
        yield fix("GPUs", f"drivers differ: {by_node}; give all GPU nodes one machine image")
    if not wrong:
        kinds = sorted({gpu for report in with_gpus for gpu in report.gpus})
        count = sum(int(report.resources["GPU"]) for report in with_gpus)
        yield well("GPUs", f"{count} x {', '.join(kinds)}, driver {with_gpus[0].driver}, CUDA {with_gpus[0].cuda}")


def _nodes(number: int) -> str:
    return "the node" if number == 1 else f"all {number} nodes"


def _one_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None)
    lines = str(cause or error).strip().splitlines()
    return lines[-1].strip()[:200] if lines else type(error).__name__
