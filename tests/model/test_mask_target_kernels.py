"""The Triton kernel of mask targets, on a CPU through Triton's interpreter."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from model.canvas import image_windows
from model.mask_targets import crop_mask_targets
from tests.model.factories import Scene, Thing, ellipse, make_batch, noise_image
from tests.model.interpreted import interpreted

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return interpreted("mask_target_kernels")


@pytest.mark.parametrize("centred", [False, True])
def test_covered_shares_equal_the_operator(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, centred: bool) -> None:
    """Regions inside the object, around it, beyond the image, and without area; masks of half the resolution."""
    bitmap = ellipse((2, 1, 20, 16), 24, 32) & (np.random.default_rng(0).random((24, 32)) < 0.8)
    whole = ellipse((-8, -8, 40, 30), 24, 32)
    batch = make_batch([Scene(noise_image(48, 64), (Thing(bitmap), Thing(whole)))])
    windows = image_windows(batch.image_sizes, (64, 64), "centre" if centred else "top_left")
    regions = torch.tensor([[0.0, 0, 64, 48], [1.3, 2.7, 50.2, 47.9], [20, 20, 20, 20]])
    image, slot = torch.zeros(6, dtype=torch.int64), torch.arange(2).repeat_interleave(3)
    arguments = (batch, windows, image, slot, regions.repeat(2, 1), 14, "soft")
    expected = crop_mask_targets(*arguments)
    monkeypatch.setattr("model.mask_targets.has_kernels", lambda _: True)
    monkeypatch.setitem(sys.modules, "model.mask_target_kernels", kernels)
    torch.testing.assert_close(crop_mask_targets(*arguments), expected)
    assert 0 < float(expected.mean()) < 1
