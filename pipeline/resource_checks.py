"""Whether what a job asks for fits into the cluster, with the arithmetic; what an autoscaler may bring counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.cluster import MIN_CPUS_FOR_DATA, Capacity
from pipeline.config import ExperimentConfig
from pipeline.findings import Finding, fix, well

WORKER_GIGABYTES = 2.0  # torch, a model and its batches in a process; large canvases on a CPU take more


def resource_findings(config: ExperimentConfig, capacity: Capacity, trials: int = 1) -> Iterator[Finding]:
    """What fits and what does not.

    Args:
        config: scaling, data.object_store_megabytes.
        capacity: of the cluster.
        trials: of a sweep, at once.
    """
    scaling = config.scaling
    gpus, gpus_to_come = capacity.total("GPU"), (capacity.most or {}).get("GPU", 0.0)
    on_gpus = scaling.accelerator == "gpu" or (scaling.accelerator == "auto" and gpus >= scaling.num_workers)
    if scaling.accelerator == "auto" and not on_gpus and gpus_to_come >= scaling.num_workers:
        yield fix(
            "accelerator",
            f"auto would train on CPUs: {gpus:g} GPUs are up now, the autoscaler may bring {gpus_to_come:g}; "
            "say --scaling.accelerator gpu",
        )
    worker = {"CPU": float(scaling.cpus_per_worker), **({"GPU": 1.0} if on_gpus else {})}
    yield _room(config, capacity, worker, trials)
    yield from _memory(config, capacity, worker, trials)


def _room(config: ExperimentConfig, capacity: Capacity, worker: dict[str, float], trials: int) -> Finding:
    """CPUs and GPUs for workers and for reading data; a trial itself only waits for its workers."""
    num_workers = config.scaling.min_workers or config.scaling.num_workers  # it begins with so many
    need = {name: trials * num_workers * amount for name, amount in worker.items()}
    need["CPU"] += trials * MIN_CPUS_FOR_DATA
    group = f"{num_workers} workers x ({_amounts(worker, worker, ' + ')}) + {MIN_CPUS_FOR_DATA} CPU for reading"
    total = group if trials == 1 else f"{trials} trials x ({group})"
    fit = capacity.num_that_fit(worker)
    have = {name: capacity.total(name) for name in need}
    text = f"{total} = {_amounts(need, need)}; {len(capacity.nodes)} nodes have {_amounts(have, need)}"
    if fit >= trials * num_workers and _covers(have, need):
        return well("resources", text)
    text += f", room for {fit} workers"
    if not capacity.autoscaler:
        return fix("resources", f"{text}, and no autoscaler adds nodes; {_what_fits(config, capacity, worker, trials)}")
    if capacity.most is None:
        return well("resources", f"{text}; the autoscaler brings more")
    text += f"; the autoscaler may bring {_amounts(capacity.most, need)}"
    if _covers(capacity.most, need):
        return well("resources", text)
    return fix("resources", f"{text}: raise its max_workers, or lower --scaling.num_workers")


def _amounts(amounts: Mapping[str, float], names: Mapping[str, float], between: str = " and ") -> str:
    return between.join(f"{amounts.get(name, 0):g} {name}" for name in names)


def _covers(have: Mapping[str, float], need: Mapping[str, float]) -> bool:
    return all(have.get(name, 0) >= amount for name, amount in need.items())


def _what_fits(config: ExperimentConfig, capacity: Capacity, worker: dict[str, float], trials: int) -> str:
    """What to change where nothing more will come."""
    fit, cpus = capacity.num_that_fit(worker), capacity.total("CPU")
    if trials > 1:
        per_trial = config.scaling.num_workers * worker["CPU"] + MIN_CPUS_FOR_DATA
        at_once = int(min(cpus // per_trial, fit // config.scaling.num_workers))
        if at_once > 0:
            return f"run {at_once} trials at once"
    most = min(fit, int((cpus - MIN_CPUS_FOR_DATA) // worker["CPU"]))
    return f"take --scaling.num_workers {most}" if most > 0 else "add nodes, or lower --scaling.cpus_per_worker"


def _memory(config: ExperimentConfig, capacity: Capacity, worker: dict[str, float], trials: int) -> Iterator[Finding]:
    """Of the object store, and of the nodes that would hold workers."""
    store = capacity.total("object_store_memory")
    asked = trials * config.data.object_store_megabytes
    if store and asked > store / 2**20:
        yield fix(
            "object store",
            f"{trials} x data.object_store_megabytes {config.data.object_store_megabytes} is more than the "
            f"{store / 2**20:.0f} MB of all nodes; lower it",
        )
    left, tight = trials * config.scaling.num_workers, []
    for node in capacity.nodes:
        holds = min(left, Capacity([node], False, None).num_that_fit(worker))
        left -= holds
        gigabytes = node.get("memory", 0.0) / 1e9
        if holds and gigabytes < holds * WORKER_GIGABYTES:
            tight.append(f"{gigabytes:.0f} GB for {holds} workers of about {WORKER_GIGABYTES:g} GB")
    if tight:
        yield fix("memory", f"a node has {'; another '.join(tight)}; take fewer workers a node, or larger nodes")
    else:
        memory = capacity.total("memory") / 1e9
        yield well(
            "memory",
            f"{memory:.0f} GB beside {store / 1e9:.0f} GB of object store; about {WORKER_GIGABYTES:g} GB a worker",
        )
