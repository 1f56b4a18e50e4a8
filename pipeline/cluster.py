"""Ray: connect or start, and find out whether what a run asks for can ever be had."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import allocator
from pipeline.config import ScalingSettings
from pipeline.errors import UserError

# Ray on Linux takes the machine's outside address and listens to the network, and so does gloo; so set, both take the
# loopback.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "GLOO_SOCKET_IFNAME": "lo"}
MIN_CPUS_FOR_DATA = 1
MIN_LOCAL_WORKERS = 2
GROUP_START_SECONDS = 15
"""How long Ray Train waits for room for all workers before it looks again how many there is room for."""
HEALTH_CHECKS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
"""Environment of a head node that notices a lost node after seconds; Ray's own settings take about fifteen."""
_connected_here = threading.Event()
"""Set while this process is in a cluster by `connect`, and not by a Ray that somebody else has started in it."""


@dataclass(frozen=True)
class Placement:
    """What every worker gets."""

    use_gpu: bool
    resources_per_worker: dict[str, float]
    cpus_for_data: float
    """CPUs left for Ray Data; with none it would wait for ever, without an error."""

    def options(self) -> dict[str, Any]:
        """Of a Ray task or actor that computes with a model."""
        return {
            "num_cpus": self.resources_per_worker["CPU"],
            "num_gpus": self.resources_per_worker.get("GPU", 0),
            "runtime_env": allocator.runtime_environment(),
        }


@dataclass(frozen=True)
class Capacity:
    """What a cluster has, and may come to have."""

    nodes: list[dict[str, float]]
    """Resources of every node that is alive."""
    autoscaler: bool
    """Whether something may add nodes."""
    most: dict[str, float] | None
    """The largest resources that the autoscaler may bring, None where it does not tell."""

    def num_that_fit(self, resources: dict[str, float]) -> int:
        """Workers that the nodes can hold at once; a worker never spans nodes."""
        return _num_that_fit(self.nodes, resources)

    def total(self, name: str) -> float:
        """Of a resource, over all nodes."""
        return sum(node.get(name, 0.0) for node in self.nodes)


def capacity() -> Capacity:
    """Of the cluster that Ray runs on."""
    return Capacity(_nodes(), _has_autoscaler(), _most_that_autoscaler_brings())


def connect(debug: bool, reads_data: bool = True, concurrent_trials: int = 1, dashboard: bool = False) -> None:
    """Join the cluster of RAY_ADDRESS (set in a submitted job), or start Ray on this machine.

    A local Ray counts one CPU more than there are: reading data takes little, and workers would leave it none.

    Args:
        debug: show Ray's own messages and those of the workers.
        reads_data: whether Ray Data, whose import takes seconds, will be used.
        concurrent_trials: of a sweep; each reads data of its own.
        dashboard: start it with a local Ray; without it Ray Train does not clean up after a trial that was killed.
    """
    root = str(Path(__file__).resolve().parents[1])
    # Read when Ray starts or by Ray Train in the driver, so set before the import.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.update(LOOPBACK_ONLY)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{GROUP_START_SECONDS}")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    import ray

    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {} if debug else {"log_to_driver": False, "logging_level": "ERROR"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        num_cpus = local_cpus() + (concurrent_trials - 1) * MIN_CPUS_FOR_DATA
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=dashboard, **quiet)
    _connected_here.set()
    if not debug and reads_data:
        _quiet_data()


def leave() -> None:
    """Leave the cluster that `connect` has joined or started; nothing where it did not, or found Ray running."""
    if _connected_here.is_set():
        import ray

        ray.shutdown()
        _connected_here.clear()


def local_cpus() -> int:
    """CPUs that a Ray of our own on this machine counts: one more than there are, and enough for two workers."""
    import ray

    there: int = ray._private.utils.get_num_cpus()  # minds a container's quota
    return max(there, MIN_LOCAL_WORKERS) + MIN_CPUS_FOR_DATA


def _quiet_data() -> None:
    """Our own progress replaces that of Ray Data."""
    import logging

    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


def place_workers(scaling: ScalingSettings, say: Callable[[str], None]) -> Placement:
    """Decide between CPU and GPU, and wait for nodes that an autoscaler may bring.

    Raises:
        UserError: the cluster cannot hold the workers and one CPU for Ray Data, now and ever; or not in time.
    """
    use_gpu = scaling.accelerator == "gpu"
    if scaling.accelerator == "auto":
        num_gpus = _num_that_fit(_nodes(), {"GPU": 1.0})
        use_gpu = num_gpus >= scaling.num_workers
        if 0 < num_gpus < scaling.num_workers:
            say(
                f"cluster: {num_gpus} GPUs for {scaling.num_workers} workers, so all train on CPUs; "
                "see --scaling.accelerator"
            )
    resources = {"CPU": float(scaling.cpus_per_worker), **({"GPU": 1.0} if use_gpu else {})}
    least = scaling.min_workers or scaling.num_workers
    shortage = _shortage(least, resources)
    if shortage is not None:
        _wait_for_nodes(scaling.model_copy(update={"num_workers": least}), resources, shortage, say)
    workers = min(scaling.num_workers, max(least, _num_that_fit(_nodes(), resources)))
    return Placement(use_gpu, resources, max(MIN_CPUS_FOR_DATA, cpus_beside(workers * resources["CPU"])))


def cpus_beside(taken: float) -> float:
    """CPUs of the nodes that are alive beside those that the workers of a training take; 0 where nodes are lost."""
    return max(0.0, sum(node.get("CPU", 0.0) for node in _nodes()) - taken)


def most_workers(scaling: ScalingSettings) -> int:
    """Workers that the cluster holds beside a CPU for data: on GPUs where it has some that it may use; at least 1."""
    cpus = {"CPU": float(scaling.cpus_per_worker)}
    on_gpus = workers_that_fit({**cpus, "GPU": 1.0}) if scaling.accelerator != "cpu" else 0
    return max(1, on_gpus or workers_that_fit(cpus))


def workers_that_fit(resources: dict[str, float]) -> int:
    """Workers that the nodes which are alive hold beside a CPU for data; perhaps 0."""
    nodes = _nodes()
    left = int((sum(node.get("CPU", 0.0) for node in nodes) - MIN_CPUS_FOR_DATA) // resources["CPU"])
    return max(0, min(_num_that_fit(nodes, resources), left))


def _wait_for_nodes(
    scaling: ScalingSettings, resources: dict[str, float], shortage: str, say: Callable[[str], None]
) -> None:
    """Have an autoscaler bring what is lacking, up to a deadline."""
    if not _has_autoscaler():
        raise UserError(f"{shortage}, and no autoscaler can add nodes; lower --scaling.num_workers")
    most = _most_that_autoscaler_brings()
    for name, amount in resources.items():
        if most is not None and amount * scaling.num_workers > most.get(name, 0):
            raise UserError(
                f"{scaling.num_workers} workers need {amount * scaling.num_workers:g} {name}, the autoscaler may "
                f"bring at most {most.get(name, 0):g}; lower --scaling.num_workers or raise its max_workers"
            )
    say(f"cluster: {shortage}; waiting up to {scaling.wait_for_nodes_minutes:g} minutes for the autoscaler")
    deadline = time.monotonic() + scaling.wait_for_nodes_minutes * 60
    _request([resources] * scaling.num_workers + [{"CPU": float(MIN_CPUS_FOR_DATA)}])
    try:
        while (lacking := _shortage(scaling.num_workers, resources)) is not None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{lacking} after {scaling.wait_for_nodes_minutes:g} minutes of waiting for the autoscaler; "
                    "look at `ray status`, or raise --scaling.wait_for_nodes_minutes"
                )
            time.sleep(2)
    finally:
        _request([])  # a request holds until it is replaced, and would keep the nodes after the run


def _nodes() -> list[dict[str, float]]:
    """Resources of every node that is alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _num_that_fit(nodes: list[dict[str, float]], resources: dict[str, float]) -> int:
    """Workers that the nodes can hold at once; a worker never spans nodes."""
    return sum(int(min(node.get(name, 0.0) / amount for name, amount in resources.items())) for node in nodes)


def _shortage(num_workers: int, resources: dict[str, float]) -> str | None:
    """What is lacking, in words; None where everything is there."""
    nodes = _nodes()
    fit = _num_that_fit(nodes, resources)
    wanted = " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
    if fit < num_workers:
        return f"{num_workers} workers of {wanted} each do not fit into the cluster, which holds {fit}"
    left = sum(node.get("CPU", 0.0) for node in nodes) - num_workers * resources["CPU"]
    if left < MIN_CPUS_FOR_DATA:
        return f"{num_workers} workers of {wanted} each leave no CPU for reading data"
    return None


def _has_autoscaler() -> bool:
    """Whether something may add nodes to the cluster that Ray runs on."""
    from ray.experimental.internal_kv import _internal_kv_get

    if _most_that_autoscaler_brings() is not None:
        return True
    # A cluster without an autoscaler still has its monitor, which then names every node's type "node_<id>".
    status = _internal_kv_get("__autoscaling_status")
    report = (json.loads(status) if status else {}).get("autoscaler_report") or {}
    types = [*(report.get("active_nodes") or {}), *(report.get("available_node_types") or {})]
    return any(not name.startswith("node_") for name in types)


def _most_that_autoscaler_brings() -> dict[str, float] | None:
    """Largest resources that the cluster's configuration allows, where the autoscaler tells them."""
    import ray

    most: dict[str, float] | None = ray._private.state.state.get_max_resources_from_cluster_config()
    return most


def _request(bundles: list[dict[str, float]]) -> None:
    """Ask the autoscaler for room for these, in place of what was asked for before."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)
