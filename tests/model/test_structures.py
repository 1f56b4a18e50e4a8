from dataclasses import fields

import torch

from model.structures import Batch, Detections
from tests.model.factories import Thing, make_batch, painted_scene, rectangle


def test_moving_a_batch_moves_every_tensor() -> None:
    batch = make_batch([painted_scene([Thing(rectangle((4, 4, 30, 30), 64, 64))])])
    moved = batch.to("meta")
    visited = 0
    for field in fields(Batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        assert after.device.type == "meta"
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        visited += 1
    assert visited == 11
    assert batch.num_images == 1


def test_length_of_detections_is_their_number() -> None:
    for number in (0, 3):
        found = Detections(
            torch.zeros(number, 4), torch.zeros(number), torch.ones(number).long(), torch.zeros(number, 28, 28)
        )
        assert len(found) == number
