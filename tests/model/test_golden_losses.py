"""The five losses and their gradients against the original's."""

import pytest
import torch
from torch import Tensor

from model import losses
from tests.model.golden import Case, cases, needs_golden

pytestmark = needs_golden


def assert_loss(loss: Tensor, source: Tensor, golden: Case, gradient_rtol: float = 1e-4) -> None:
    torch.testing.assert_close(loss, golden.tensor("loss"), rtol=1e-5, atol=1e-7)
    torch.autograd.backward(loss)
    name = next(
        name
        for name in ("rpn_class_logits", "rpn_bbox", "pred_class_logits", "pred_bbox", "pred_masks")
        if name in golden
    )
    torch.testing.assert_close(source.grad, golden.tensor(f"d_{name}"), rtol=gradient_rtol, atol=1e-6)


@pytest.mark.parametrize("name", cases("losses", "rpn_class_"))
def test_rpn_class(name: str) -> None:
    golden = Case("losses", name)
    match = golden.tensor("rpn_match")[..., 0]
    logits = golden.tensor("rpn_class_logits").requires_grad_()
    assert_loss(losses.rpn_class_loss(logits, match == 1, match != 0, "positives"), logits, golden)


@pytest.mark.parametrize("name", cases("losses", "rpn_bbox_"))
def test_rpn_bbox(name: str) -> None:
    golden = Case("losses", name)
    match = golden.tensor("rpn_match")[..., 0]
    target = torch.zeros(*match.shape, 4)
    for image in range(len(match)):  # the first rows belong to the positive anchors
        rows = torch.nonzero(match[image] == 1).flatten()
        target[image, rows] = golden.tensor("target_bbox")[image, : len(rows)]
    deltas = golden.tensor("rpn_bbox").requires_grad_()
    loss = losses.rpn_bbox_loss(deltas, target, match == 1, match != 0, 1.0, "positives")
    assert_loss(loss, deltas, golden)


@pytest.mark.parametrize("name", cases("losses", "mrcnn_class_"))
def test_mrcnn_class(name: str) -> None:
    golden = Case("losses", name)
    active = golden.tensor("active_class_ids").bool()
    active = active[:1].expand_as(active)  # the original's defect: the first image's flags for all
    target = golden.tensor("target_class_ids").long()
    logits = golden.tensor("pred_class_logits").requires_grad_()
    classes = target.flatten()
    index = torch.arange(len(target)).repeat_interleave(target.shape[1])
    loss = losses.mrcnn_class_loss(
        logits.flatten(0, 1), classes, torch.ones_like(classes).bool(), index, active, "positives", "by_prediction"
    )
    assert_loss(loss, logits, golden)


@pytest.mark.parametrize("name", cases("losses", "mrcnn_bbox_"))
def test_mrcnn_bbox(name: str) -> None:
    golden = Case("losses", name)
    target = golden.tensor("target_class_ids").long()
    classes, valid = target.flatten(), torch.ones_like(target.flatten()).bool()
    index = torch.arange(len(target)).repeat_interleave(target.shape[1])
    deltas = golden.tensor("pred_bbox").requires_grad_()
    target_deltas = golden.tensor("target_bbox").flatten(0, 1)
    loss = losses.mrcnn_bbox_loss(
        deltas.flatten(0, 1), target_deltas, classes, valid, index, len(target), 1.0, "positives"
    )
    assert_loss(loss, deltas, golden)


@pytest.mark.parametrize("name", cases("losses", "mrcnn_mask_"))
def test_mrcnn_mask(name: str) -> None:
    golden = Case("losses", name)
    target = golden.tensor("target_class_ids").long()
    classes = target.flatten()
    index = torch.arange(len(target)).repeat_interleave(target.shape[1])
    probabilities = golden.tensor("pred_masks").requires_grad_()
    logits = probabilities.logit().flatten(0, 1)  # the original's loss is on probabilities
    of_class = logits[torch.arange(len(classes)), :, :, classes]
    target_masks = golden.tensor("target_masks").flatten(0, 1)
    loss = losses.mrcnn_mask_loss(of_class, target_masks, classes > 0, index, len(target), "positives")
    # The original adds 1e-7 to a probability inside the logarithm, which is 1e-3 of the smallest ones here.
    assert_loss(loss, probabilities, golden, gradient_rtol=1e-3)


def test_smooth_l1() -> None:
    golden = Case("losses", "smooth_l1")
    x = golden.tensor("x")
    yes = torch.ones(1, 1, dtype=torch.bool)
    for value, expected in zip(x, golden.tensor("out"), strict=True):
        deltas = torch.tensor([[[float(value), 0, 0, 0]]])
        torch.testing.assert_close(losses.rpn_bbox_loss(deltas, torch.zeros(1, 1, 4), yes, yes, 1.0), expected)
