"""Trainings that are harmed for real end as those that nobody harmed, to the bit."""

import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoint import MODEL_FILE
from pipeline.mlflow_runs import default_uri
from tests.faults.conftest import room_for, sharing
from tests.faults.processes import (
    Job,
    assert_each_step_once,
    assert_same_weights,
    status_of,
    steps_done,
    wait_for_more_steps,
    wait_for_step,
    wait_until,
    write_whole,
)
from tests.jobs.running import run_job

pytestmark = [pytest.mark.faults, pytest.mark.cluster]

LAST_STEP = 12  # two epochs
INJECTED = Path(__file__).parent / "injected"
Start = Callable[..., Job]
Undisturbed = Callable[[int], Path]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_killed_at_three_steps(num_workers: int, start: Start, undisturbed: Undisturbed, folder: Path) -> None:
    """In the middle of the first epoch, after it, and in the middle of the second."""
    calm = undisturbed(num_workers)
    name = f"killed-{num_workers}"
    run_folder = folder / "runs" / name
    job = start(name, *sharing(num_workers), "--run.max_failures", "5", **room_for(num_workers))
    for index, step in enumerate((3, 6, 9)):
        wait_for_step(job, run_folder, step)
        wait_until(lambda: job.pids("RayTrainWorker"), "the workers are there")
        reached, began = steps_done(run_folder), time.monotonic()
        assert job.kill("RayTrainWorker", which=index) is not None
        wait_for_more_steps(job, run_folder, reached + 1)
        print(f"went on {time.monotonic() - began:.1f} s after a worker was killed")  # noqa: T201
    outcome = job.end()
    assert outcome.exit_code == 0, outcome.errors
    assert outcome.last_line["steps"] == LAST_STEP
    assert_same_weights(run_folder, calm)
    assert_each_step_once(default_uri(str(folder / "runs")), outcome.last_line["mlflow_run_id"], LAST_STEP)


@pytest.mark.parametrize("order", ["exit", "raise"])
def test_a_worker_that_ends_by_itself(
    order: str, start: Start, undisturbed: Undisturbed, folder: Path, tmp_path: Path
) -> None:
    """`os._exit` in the middle of a step, and an exception there: started again, it ends with the same bits."""
    calm = undisturbed(2)
    run_folder = folder / "runs" / f"by-itself-{order}"
    inside = {"PYTHONPATH": str(INJECTED), "FAULTS_ORDERS": str(tmp_path)}
    job = start(run_folder.name, *sharing(2), "--run.max_failures", "1", **inside)
    wait_for_step(job, run_folder, 3)
    reached, began = steps_done(run_folder), time.monotonic()
    pid, _ = job.pids("RayTrainWorker")
    write_whole(tmp_path / str(pid), order)
    wait_until(lambda: not job.is_running or pid not in job.pids("RayTrainWorker"), "the worker is gone")
    wait_for_more_steps(job, run_folder, reached + 2)
    print(f"went on {time.monotonic() - began:.1f} s after the worker's {order}")  # noqa: T201
    outcome = job.end()
    assert outcome.exit_code == 0, outcome.errors
    assert_same_weights(run_folder, calm)
    assert_each_step_once(default_uri(str(folder / "runs")), outcome.last_line["mlflow_run_id"], LAST_STEP)


def test_the_head_is_gone(start: Start, undisturbed: Undisturbed, folder: Path) -> None:
    """Ray's control service is killed: the job ends with an exit code of its own, the same command goes on."""
    calm = undisturbed(2)
    run_folder = folder / "runs" / "headless"
    job = start("headless", *sharing(2))
    wait_for_step(job, run_folder, 3)
    for which in range(2):  # so that they are not at the end before anybody has noticed
        assert job.kill("RayTrainWorker", which, signal.SIGSTOP) is not None
    began = time.monotonic()
    assert job.kill("gcs_server") is not None
    wait_until(lambda: not job.is_running, "the job ends", 180)
    print(f"ended {time.monotonic() - began:.1f} s after the head was gone")  # noqa: T201
    outcome = job.end()
    assert outcome.exit_code not in (0, None)
    outcome = start("headless", *sharing(2)).end()
    assert outcome.exit_code == 0, outcome.errors
    assert_each_step_once(default_uri(str(folder / "runs")), outcome.last_line["mlflow_run_id"], LAST_STEP)
    assert_same_weights(run_folder, calm)


def test_driver_killed_and_the_newest_checkpoint_damaged(start: Start, undisturbed: Undisturbed, folder: Path) -> None:
    calm = undisturbed(2)
    run_folder = folder / "runs" / "damaged"
    job = start("damaged", *sharing(2))
    wait_until(lambda: (run_folder / "checkpoint-0000008").exists(), "the fourth checkpoint")
    job.kill_everything()
    newest = max(run_folder.glob("checkpoint-*"))
    content = bytearray((newest / MODEL_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / MODEL_FILE).write_bytes(content)
    reached, began = steps_done(run_folder), time.monotonic()
    job = start("damaged", *sharing(2))
    wait_for_more_steps(job, run_folder, reached)
    print(f"went on {time.monotonic() - began:.1f} s after the same command")  # noqa: T201
    outcome = job.end()
    assert outcome.exit_code == 0, outcome.errors
    assert f"warning: {newest} is refused: {newest}/{MODEL_FILE}: damaged (its SHA-256 is not" in outcome.output
    assert_same_weights(run_folder, calm)
    assert_each_step_once(default_uri(str(folder / "runs")), outcome.last_line["mlflow_run_id"], LAST_STEP)


def test_a_frozen_worker_is_named_and_ended(start: Start, undisturbed: Undisturbed, folder: Path) -> None:
    calm = undisturbed(2)
    run_folder = folder / "runs" / "frozen"
    job = start("frozen", *sharing(2), "--run.hang_minutes", "0.2")
    wait_for_step(job, run_folder, 3)
    reached, began = steps_done(run_folder), time.monotonic()
    pid = job.kill("RayTrainWorker", number=signal.SIGSTOP)
    wait_for_more_steps(job, run_folder, reached + 2)
    print(f"went on {time.monotonic() - began:.1f} s after a worker froze")  # noqa: T201
    outcome = job.end()
    assert outcome.exit_code == 0, outcome.errors
    told = [line for line in outcome.output.splitlines() if "gives no sign of life" in line]
    assert len(told) == 1, outcome.output
    assert f"(process {pid} on node" in told[0]
    assert ", on images " in told[0]
    assert_same_weights(run_folder, calm)


def test_terminated_it_ends_as_killed_and_goes_on(start: Start, undisturbed: Undisturbed, folder: Path) -> None:
    calm = undisturbed(2)
    run_folder = folder / "runs" / "terminated"
    job = start("terminated", *sharing(2))
    wait_for_step(job, run_folder, 5)
    began = time.monotonic()
    os.kill(job.process.pid, signal.SIGTERM)
    run_id = json.loads((run_folder / "tracking" / "mark.json").read_text())["run_id"]
    wait_until(lambda: status_of(folder / "runs", run_id) == "KILLED", "the run ends as killed", 30)
    seconds = time.monotonic() - began
    outcome = job.end()
    assert outcome.exit_code == 143
    assert "the same command goes on from the last checkpoint" in outcome.errors
    print(f"KILLED {seconds:.1f} s after SIGTERM")  # noqa: T201
    outcome = start("terminated", *sharing(2)).end()
    assert outcome.exit_code == 0, outcome.errors
    assert status_of(folder / "runs", run_id) == "FINISHED"
    assert outcome.last_line["mlflow_run_id"] == run_id
    assert_same_weights(run_folder, calm)
    assert_each_step_once(default_uri(str(folder / "runs")), run_id, LAST_STEP)


def test_numbers_that_are_not_finite_are_recorded_and_replayed(start: Start, folder: Path) -> None:
    """Steps so large that the second one cannot be computed any more."""
    options = ("--optim.name", "sgd", "--optim.learning_rate", "1e30", "--optim.gradient_clip_norm", "null")
    outcome = start("astray", *sharing(2), *options, "--optim.warmup_steps", "0").end()
    assert outcome.exit_code == 1
    assert "not be tried" not in outcome.errors
    (record,) = (folder / "runs" / "astray" / "nonfinite").glob("step-*.json")
    assert f"computed again by: python jobs/replay.py --step_file {record}" in outcome.errors
    content = json.loads(record.read_text())
    ids = [image["image_id"] for worker in content["workers"] for image in worker["images"]]
    assert len(set(ids)) == 6
    assert not all(math.isfinite(float(content[name])) for name in ("loss", "gradient_norm"))
    replayed = run_job("replay", "--step_file", str(record))
    assert replayed.exit_code == 0, replayed.errors
    assert replayed.last_line == {"step": content["step"], "is_finite": False, "same_losses": True}
    assert "<- not finite" in replayed.output
    run_id = json.loads((folder / "runs" / "astray" / "tracking" / "mark.json").read_text())["run_id"]
    assert status_of(folder / "runs", run_id) == "FAILED"
