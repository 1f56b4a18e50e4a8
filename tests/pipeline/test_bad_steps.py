"""A bad step is recorded with the images that were seen, and stops the training or is counted."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.bad_steps import BadSteps, check_scale
from pipeline.batches import collate, table_rows
from pipeline.nonfinite import planned_step
from pipeline.shards import ShardSet
from pipeline.stream import LoadBlock, StreamPlan, planned_blocks
from pipeline.training import NonFiniteLossError, gradient_scaler
from tests.pipeline.factories import Prepared
from tests.pipeline.small import small_config

BAD = [math.nan, 1.0, 2.0, 3.0, 4.0, 5.0, math.inf]


def bad_steps(monkeypatch: pytest.MonkeyPatch, **train: Any) -> BadSteps:
    """Without the recording."""
    monkeypatch.setattr(BadSteps, "_record", lambda *_: None)
    nothing: Any = None
    config = small_config(train=train)
    return BadSteps(config, nothing, nothing, nothing, "/runs/mine", 100, 0, 1, 1, None, None)


def take(steps: BadSteps, step: int) -> str:
    return steps.take(step, BAD, torch.nn.Linear(1, 1), gradient_scaler(None, "cpu"), step + 1)  # type: ignore[arg-type]


def test_stop_names_the_step_the_numbers_and_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NonFiniteLossError) as caught:
        take(bad_steps(monkeypatch), 12)
    told = str(caught.value)
    assert told.startswith("step 12: loss = nan, gradient_norm = inf; ")
    assert "python jobs/replay.py --step_file /runs/mine/nonfinite/step-12.json" in told


def test_skip_goes_on_so_often_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = bad_steps(monkeypatch, nonfinite="skip", nonfinite_skips=2)
    assert take(steps, 12).endswith("left out, number 1 of at most 2")
    assert take(steps, 30).endswith("left out, number 2 of at most 2")
    with pytest.raises(NonFiniteLossError, match=r"^step 31: "):
        take(steps, 31)
    resumed = bad_steps(monkeypatch, nonfinite="skip", nonfinite_skips=2)
    resumed.skipped = 2  # from its checkpoint
    with pytest.raises(NonFiniteLossError, match=r"^step 31: "):
        take(resumed, 31)


def test_a_scale_that_nothing_is_learned_with_is_noticed() -> None:
    check_scale(gradient_scaler(None, "cpu"), 5)
    scaler = gradient_scaler(torch.float16, "cpu")
    for scale, is_fine in ((2.0**16, True), (2.0**-8, True), (2.0**-9, False)):
        scaler.load_state_dict({**scaler.state_dict(), "scale": scale})
        if is_fine:
            check_scale(scaler, 5)
        else:
            with pytest.raises(NonFiniteLossError, match=r"step 5: the loss scale of fp16 has fallen to 0\.00195"):
                check_scale(scaler, 5)


@pytest.mark.cluster
@pytest.mark.parametrize(("num_workers", "passes"), [(1, 1), (2, 1), (2, 2)])
def test_the_images_of_a_step_are_those_of_the_stream(prepared: Prepared, num_workers: int, passes: int) -> None:
    """Made again from the plan: the same bytes that the workers were sent."""
    shards = ShardSet(prepared.data.training)
    manifest, step = shards.manifest, 5
    plan = StreamPlan(manifest.row_canvases(), 4, 2, 4, seed=3)
    load = LoadBlock(prepared.data.training, manifest.digest, prepared.config.augment, 3)
    for worker in range(num_workers):
        found = planned_step(plan, load, shards, step, worker, num_workers, passes)
        block = load(planned_blocks(plan, step, step + 1, num_workers, 1)[worker])
        rows = table_rows(block)
        assert [image["row"] for image in found.images] == [row["row"] for row in rows]
        assert [image["image_id"] for image in found.images] == [
            shards.read_row(row["row"])["image_id"] for row in rows
        ]
        for image, row in zip(found.images, rows, strict=True):
            np.testing.assert_array_equal(np.array(image["boxes"]).reshape(-1, 4), row["boxes"].reshape(-1, 4))
        size = len(rows) // passes
        assert len(found.batches) == passes
        for index, batch in enumerate(found.batches):
            expected = collate(rows[index * size : (index + 1) * size], manifest.active_classes())
            for name, tensor in vars(expected).items():
                assert torch.equal(getattr(batch, name), tensor), name
