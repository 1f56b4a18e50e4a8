"""The Triton kernel of mask targets, on a CPU through Triton's interpreter."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

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
    """Regions around the object, inside it, beyond the image, and without area; masks of half the resolution."""
    bitmap = ellipse((1, 1, 7, 9), 8, 10) & (np.random.default_rng(0).random((8, 10)) < 0.8)
    whole = ellipse((-3, -3, 14, 12), 8, 10)
    batch = make_batch([Scene(noise_image(16, 20), (Thing(bitmap), Thing(whole)))])
    windows = image_windows(batch.image_sizes, (32, 32), "centre" if centred else "top_left")
    regions = torch.tensor([[0.0, 0, 32, 32], [6.3, 4.7, 15.2, 14.9], [9, 9, 9, 9]])
    image, slot = torch.zeros(3, dtype=torch.int64), torch.tensor([1, 0, 1])

    def targets() -> Tensor:
        return crop_mask_targets(batch, windows, image, slot, regions, 6, "soft")

    expected = targets()
    monkeypatch.setattr("model.mask_targets.has_kernels", lambda _: True)
    monkeypatch.setitem(sys.modules, "model.mask_target_kernels", kernels)
    torch.testing.assert_close(targets(), expected)
    assert 0 < float(expected.mean()) < 1
