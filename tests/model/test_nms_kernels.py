"""The Triton kernels of the GPU, on a CPU through Triton's interpreter."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

from model.nms import kept_by_batched_nms
from tests.model.interpreted import interpreted

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return interpreted("nms_kernels")


def random_boxes(groups: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    corner = torch.rand(groups, number, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + torch.rand(groups, number, 2, generator=generator) * 40], dim=2)
    boxes[:, ::7] = 0  # without area
    return boxes


def kept_by_torchvision(boxes: Tensor, threshold: float) -> Tensor:
    kept = torch.zeros(len(boxes), dtype=torch.bool)
    kept[nms(boxes, -torch.arange(len(boxes)).float(), threshold)] = True
    return kept


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
@pytest.mark.parametrize("number", [0, 1, 32, 33, 70])
def test_every_group_keeps_what_torchvision_keeps(kernels: ModuleType, number: int) -> None:
    boxes = random_boxes(3, number)
    kept = kernels.kept_in_groups(boxes, 0.4)
    assert kept.shape == (3, number)
    for group in range(3):
        torch.testing.assert_close(kept[group], kept_by_torchvision(boxes[group], 0.4))
    assert number < 32 or 0 < int(kept.sum()) < kept.numel()


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
def test_groups_of_different_size_equal_the_operator(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, sizes = random_boxes(2, 50), [33, 1, 16]
    scores = torch.cat([torch.arange(size, 0, -1.0) for size in sizes]).expand(2, -1)
    expected = kept_by_batched_nms(boxes, scores, sizes, 0.4)
    monkeypatch.setattr("model.nms.has_kernels", lambda _: True)
    monkeypatch.setitem(sys.modules, "model.nms_kernels", kernels)
    torch.testing.assert_close(kept_by_batched_nms(boxes, scores, sizes, 0.4), expected)
