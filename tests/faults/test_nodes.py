"""A node that is lost, and one that is to be taken back: two nodes beside a head, on this machine."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.mlflow_runs import default_uri
from tests.faults.conftest import NODE, sharing
from tests.faults.processes import (
    Job,
    assert_each_step_once,
    pids_on,
    steps_done,
    wait_for_more_steps,
    wait_for_step,
    wait_until,
)

pytestmark = [pytest.mark.faults, pytest.mark.cluster]

LAST_STEP = 12
OUTAGE_SECONDS = 72.0  # what Ray's own settings gave


@pytest.mark.parametrize("cluster", [0], indirect=True, ids=["idle-head"])  # so each node has one of the two workers
def test_a_lost_node_costs_seconds_and_no_step(cluster: Any, start: Callable[..., Job], folder: Path) -> None:
    """With as few as one worker allowed the training goes on without the node, its global batch the same."""
    run_folder = folder / "runs" / "node"
    options = ("--scaling.min_workers", "1", "--run.max_failures", "5", "--train.epochs", "4")
    job = start("node", *sharing(2), *options, RAY_ADDRESS=cluster.address)
    wait_for_step(job, run_folder, 3)
    reached = steps_done(run_folder)
    began = time.monotonic()
    cluster.remove_node(cluster.trainers[0], allow_graceful=False)
    wait_for_more_steps(job, run_folder, reached + 2)
    outage = time.monotonic() - began
    outcome = job.end()
    assert outcome.exit_code == 0, outcome.errors
    assert outcome.last_line["steps"] == 2 * LAST_STEP
    assert_each_step_once(default_uri(str(folder / "runs")), outcome.last_line["mlflow_run_id"], 2 * LAST_STEP)
    print(f"went on {outage:.1f} s after the node was lost")  # noqa: T201
    assert outage < OUTAGE_SECONDS


@pytest.mark.parametrize("cluster", [0], indirect=True, ids=["idle-head"])
def test_a_node_that_comes_back_is_used_again(cluster: Any, start: Callable[..., Job], folder: Path) -> None:
    """Lost, then replaced: the training goes on with one worker, and with two again as soon as there is room."""
    run_folder = folder / "runs" / "back"
    options = ("--scaling.min_workers", "1", "--run.max_failures", "5", "--scaling.grow_minutes", "0.2")
    job = start("back", *sharing(2), *options, "--train.epochs", "1000", RAY_ADDRESS=cluster.address)
    wait_for_step(job, run_folder, 3)
    lost, other = cluster.trainers
    assert len(pids_on(lost, "RayTrainWorker")) == len(pids_on(other, "RayTrainWorker")) == 1
    reached = steps_done(run_folder)
    cluster.remove_node(lost, allow_graceful=False)
    wait_for_more_steps(job, run_folder, reached + 2)
    began = time.monotonic()
    node = cluster.add_node(**NODE)
    wait_until(lambda: pids_on(node, "RayTrainWorker") or not job.is_running, "the new node gets a worker")
    reached = steps_done(run_folder)
    wait_for_more_steps(job, run_folder, reached + 2)
    print(f"two workers again {time.monotonic() - began:.1f} s after the node was back")  # noqa: T201
    assert job.is_running, Path(f"{job.log}.errors").read_text()
    assert len(pids_on(node, "RayTrainWorker")) == len(pids_on(other, "RayTrainWorker")) == 1
    job.process.send_signal(signal.SIGTERM)
    outcome = job.end()
    assert outcome.exit_code == 143
    run_id = json.loads((run_folder / "tracking" / "mark.json").read_text())["run_id"]
    steps = MlflowClient(default_uri(str(folder / "runs"))).get_metric_history(run_id, "loss")
    assert_each_step_once(default_uri(str(folder / "runs")), run_id, max(metric.step for metric in steps))


def test_a_node_to_be_taken_back_is_saved_for(cluster: Any, start: Callable[..., Job], folder: Path) -> None:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    run_folder = folder / "runs" / "notice"
    options = (
        *("--checkpoints.every_steps", "1000", "--train.epochs", "4"),
        *("--checkpoints.every_epochs", "4", "--train.evaluate_every_epochs", "4"),
    )
    job = start("notice", *sharing(2), *options, RAY_ADDRESS=cluster.address)
    wait_for_step(job, run_folder, 2)
    assert not list(run_folder.glob("checkpoint-*"))
    workers = {node.node_id for node in cluster.trainers}
    client = GcsClient(address=cluster.address)
    deadline = int((time.time() + 120) * 1000)
    for node_id in workers:
        accepted, why_not = client.drain_node(node_id, 2, "taken back", deadline)  # 2: preemption
        assert accepted, why_not
    wait_until(lambda: list(run_folder.glob("checkpoint-*")), "a checkpoint for the notice")
    content = json.loads((min(run_folder.glob("checkpoint-*")) / "checkpoint.json").read_text())
    assert content["step"] < 2 * LAST_STEP
    outcome = job.end()
    assert outcome.exit_code == 0, outcome.errors
    assert "a node is about to be taken back; the state of step" in outcome.output
