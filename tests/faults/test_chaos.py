"""Many kills at random moments: workers, the tracker, the driver, the MLflow server; it ends as if nothing had been."""

import os
import random
import time
from pathlib import Path

import pytest

from tests.faults.processes import (
    Job,
    assert_each_step_once,
    assert_same_weights,
    steps_done,
    wait_until,
)
from tests.faults.test_tracker_away import Server
from tests.jobs.running import run_job

pytestmark = [pytest.mark.faults, pytest.mark.cluster]

KILLS = int(os.environ.get("CHAOS_KILLS", "20"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))
VICTIMS = ("worker", "driver", "tracker", "server")
EVERY_STEPS = 20


def wait_for_a_moment(job: Job, run_folder: Path, step: float) -> None:
    """Until the job has come as far as is wanted, and further than it was."""
    progress = steps_done(run_folder)

    def has_come_so_far() -> bool:
        assert job.is_running, Path(f"{job.log}.errors").read_text()
        return steps_done(run_folder) > max(progress, step)

    wait_until(has_come_so_far, f"more than {step:.0f} steps")


def test_kills_at_random_moments(config: str, folder: Path, tmp_path: Path) -> None:
    epochs = max(10, 4 * KILLS)  # six steps each: long enough to be killed so often
    options = (
        *("--train.epochs", str(epochs), "--checkpoints.every_steps", str(EVERY_STEPS), "--run.max_failures", "1000"),
        *("--scaling.num_workers", "2", "--train.batch_size_per_worker", "3"),
        *("--train.evaluate_every_epochs", str(epochs), "--checkpoints.every_epochs", str(epochs)),
    )
    calm = run_job("train", "--config", config, "--run.name", "calm-chaos", *options)
    assert calm.exit_code == 0, calm.errors
    last_step = calm.last_line["steps"]
    server = Server(tmp_path)
    server.start()
    draws = random.Random(SEED)
    run_folder = folder / "runs" / "chaos"
    command = ("--config", config, "--run.name", "chaos", "--run.mlflow_uri", server.uri, *options)
    job = Job(tmp_path / "chaos-0.log", "train", *command)
    began, killed = time.monotonic(), dict.fromkeys(VICTIMS, 0)
    try:
        while sum(killed.values()) < KILLS:
            share = (sum(killed.values()) + draws.random()) / KILLS
            wait_for_a_moment(job, run_folder, 0.85 * share * last_step)
            time.sleep(draws.random())  # any moment of a step, an exchange, a checkpoint
            victim = draws.choice(VICTIMS)
            if victim == "worker" and job.kill("RayTrainWorker", draws.randrange(2)) is None:
                continue
            if victim == "tracker" and job.kill("RunActor") is None:
                continue
            if victim == "driver":
                job.kill_everything()
                job = Job(tmp_path / f"chaos-{sum(killed.values()) + 1}.log", "train", *command)
            if victim == "server":
                server.kill()
                server.start()
            killed[victim] += 1
        outcome = job.end()
        assert outcome.exit_code == 0, outcome.errors
        assert outcome.last_line["steps"] == last_step
        assert_same_weights(run_folder, folder / "runs" / "calm-chaos")
        assert_each_step_once(server.uri, outcome.last_line["mlflow_run_id"], last_step)
        minutes = (time.monotonic() - began) / 60
        print(f"{killed} in {last_step} steps, {minutes:.1f} minutes")  # noqa: T201
    finally:
        job.kill_everything()
        server.kill()
