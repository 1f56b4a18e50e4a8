"""The actor beside the driver knows which images a worker hangs on, and ends it."""

import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from pipeline.run_actor import RunActor, RunActorSettings, _kill
from pipeline.shards import ShardSet
from pipeline.training_plan import make_plan
from pipeline.watchdog import Hang, first_beat
from tests.pipeline.factories import Prepared


def actor_of(prepared: Prepared, training: str) -> RunActor:
    """Without the tracker behind it."""
    actor = object.__new__(RunActor)
    actor._settings = RunActorSettings(("", "", "", "", None), None, {}, prepared.config, training)
    return actor


@pytest.mark.cluster
def test_images_are_those_of_the_workers_part_of_the_step(prepared: Prepared) -> None:
    shards = ShardSet(prepared.data.training)
    plan = make_plan(prepared.config, shards)
    assert plan.global_batch_size == 4
    actor = actor_of(prepared, prepared.data.training)
    for step in (0, 7):
        ((_, _, rows),) = plan.steps(step, step + 1)
        ids = [shards.read_row(int(row))["image_id"] for row in rows]
        for rank in (0, 1):
            hang = Hang(replace(first_beat("a", rank, 2, "node"), step=step), True, 60)
            assert actor._images(hang) == f"images {ids[2 * rank]}, {ids[2 * rank + 1]}"


@pytest.mark.cluster
def test_images_that_cannot_be_read_do_not_save_the_worker(prepared: Prepared) -> None:
    hang = Hang(first_beat("a", 0, 2, "node"), True, 60)
    assert actor_of(prepared, "/nowhere")._images(hang) == "images that cannot be told (UserError)"


def test_a_frozen_process_is_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    process.send_signal(signal.SIGSTOP)
    _kill(process.pid)
    assert process.wait(60) == -signal.SIGKILL
    _kill(process.pid)  # gone already
