"""Fixtures of the fault tests."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster import HEALTH_CHECKS
from tests.faults.processes import Job
from tests.jobs.running import run_job, write_small_experiment

STORE = {"object_store_memory": 200 * 2**20}
NODE = {"num_cpus": 1, **STORE}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the data and all runs lie; in FAULTS_FOLDER the undisturbed ones are found again."""
    kept = os.environ.get("FAULTS_FOLDER")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("faults")
    for run in (folder / "runs").glob("*"):
        if run.is_dir() and not run.name.startswith(("calm-", "shards", "mlflow")):
            shutil.rmtree(run)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def config(folder: Path) -> str:
    """Two epochs of six steps, two images of three each a step, a checkpoint every two steps."""
    path = write_small_experiment(
        folder,
        train={"epochs": 2, "batch_size_per_worker": 6, "log_every_steps": 1, "precision": "fp32"},
        data={
            "root": str(folder / "shapes"),
            "synthetic": {"training_images": 36, "validation_images": 7, "seed": 0},
            "canvases": [[128, 128]],
            "rows_per_shard": 8,
        },
        checkpoints={"every_steps": 2},
        scaling={"num_workers": 1},
    )
    return str(path)


@pytest.fixture
def start(config: str, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Start a training that is to be harmed; whatever happens, nothing of it is left."""
    jobs: list[Job] = []

    def begin(name: str, *arguments: str, **variables: str) -> Job:
        log = tmp_path / f"{name}-{len(jobs)}.log"
        jobs.append(Job(log, "train", "--config", config, "--run.name", name, *arguments, **variables))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill_everything()


@pytest.fixture(scope="session")
def undisturbed(config: str, folder: Path) -> Callable[[int], Path]:
    """Folder of a run with so many workers that nobody harmed."""
    done: dict[int, Path] = {}

    def of_workers(num_workers: int) -> Path:
        if num_workers not in done:
            options = (*sharing(num_workers), "--run.name", f"calm-{num_workers}")
            outcome = run_job("train", "--config", config, *options, **room_for(num_workers))
            assert outcome.exit_code == 0, outcome.errors
            done[num_workers] = folder / "runs" / f"calm-{num_workers}"
        return done[num_workers]

    return of_workers


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A head with a CPU, or as many as the parameter says, and two nodes with one each, `cluster.trainers`."""
    from ray.cluster_utils import Cluster

    settings = {name.removeprefix("RAY_"): int(value) for name, value in HEALTH_CHECKS.items()}
    root = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": getattr(request, "param", 1),
            "include_dashboard": False,
            "_system_config": settings,
            **STORE,
        },
    )
    cluster.trainers = [cluster.add_node(**NODE) for _ in range(2)]
    yield cluster
    cluster.shutdown()


def sharing(num_workers: int) -> tuple[str, ...]:
    """Options that share the six images of a step out."""
    images = str(6 // num_workers)
    return ("--scaling.num_workers", str(num_workers), "--train.batch_size_per_worker", images)


def room_for(num_workers: int) -> dict[str, str]:
    """Environment in which Ray counts a CPU for each worker and one for reading, however few cores there are."""
    return {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": num_workers + 1})}
