"""Many kills at random moments: workers, nodes, the tracker, the driver, the MLflow server; as if nothing had been."""

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import NODE, sharing
from tests.faults.processes import (
    Job,
    assert_each_step_once,
    assert_same_weights,
    kill_one,
    pids_on,
    steps_done,
    wait_until,
)
from tests.faults.test_tracker_away import Server
from tests.jobs.running import run_job

pytestmark = [pytest.mark.faults, pytest.mark.cluster]

KILLS = int(os.environ.get("CHAOS_KILLS", "20"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))
VICTIMS = ("worker", "node", "driver", "tracker", "server")
EVERY_STEPS = 20


def wait_for_a_moment(job: Job, run_folder: Path, step: float, draws: random.Random) -> None:
    """Until the job has come as far as is wanted, and further than it was; then for any part of a second more."""
    progress = steps_done(run_folder)

    def has_come_so_far() -> bool:
        assert job.is_running, Path(f"{job.log}.errors").read_text()
        return steps_done(run_folder) > max(progress, step)

    wait_until(has_come_so_far, f"more than {step:.0f} steps")
    moment = time.monotonic() + draws.random()  # of a step, an exchange, a checkpoint
    wait_until(lambda: time.monotonic() > moment, "the moment")


def test_kills_at_random_moments(config: str, folder: Path, tmp_path: Path, cluster: Any) -> None:
    epochs = max(10, 3 * KILLS)  # six steps each: a kill every fifteen steps or so
    options = (
        *("--train.epochs", str(epochs), "--checkpoints.every_steps", str(EVERY_STEPS), "--run.max_failures", "1000"),
        *(*sharing(2), "--run.max_preemptions", "1000"),
        *("--train.evaluate_every_epochs", str(epochs), "--checkpoints.every_epochs", str(epochs)),
    )
    calm = run_job("train", "--config", config, "--run.name", f"calm-chaos-{KILLS}", *options)
    assert calm.exit_code == 0, calm.errors
    last_step = calm.last_line["steps"]
    server = Server(tmp_path)
    server.start()
    draws = random.Random(SEED)
    run_folder = folder / "runs" / "chaos"
    command = ("--config", config, "--run.name", "chaos", "--run.mlflow_uri", server.uri, *options)

    def start(number: int) -> Job:
        return Job(tmp_path / f"chaos-{number}.log", "train", *command, RAY_ADDRESS=cluster.address)

    job = start(0)
    began, killed = time.monotonic(), dict.fromkeys(VICTIMS, 0)
    try:
        while sum(killed.values()) < KILLS:
            share = (sum(killed.values()) + draws.random()) / KILLS
            wait_for_a_moment(job, run_folder, 0.85 * share * last_step, draws)
            victim = draws.choice(VICTIMS)
            nodes = [cluster.head_node, *cluster.trainers]
            title = {"worker": "RayTrainWorker", "tracker": "RunActor"}.get(victim)
            pids = [pid for node in nodes for pid in pids_on(node, title)] if title else []
            if title and kill_one(pids, draws.randrange(2)) is None:
                continue
            if victim == "node":
                lost = cluster.trainers.pop(draws.randrange(2))
                cluster.remove_node(lost, allow_graceful=False)
                cluster.trainers.append(cluster.add_node(**NODE))
            if victim == "driver":
                job.kill_everything()
                job = start(sum(killed.values()) + 1)
            if victim == "server":
                server.kill()
                server.start(wait=False)  # which the training does not do either
            killed[victim] += 1
        outcome = job.end()
        assert outcome.exit_code == 0, outcome.errors
        assert outcome.last_line["steps"] == last_step
        assert_same_weights(run_folder, folder / "runs" / f"calm-chaos-{KILLS}")
        assert_each_step_once(server.uri, outcome.last_line["mlflow_run_id"], last_step)
        minutes = (time.monotonic() - began) / 60
        print(f"{killed} in {last_step} steps, {minutes:.1f} minutes")  # noqa: T201
    finally:
        job.kill_everything()
        server.kill()
