import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from model import losses
from model.boxes import decode_boxes

LOG_2 = math.log(2)


def test_names_of_the_losses() -> None:
    assert losses.LOSS_NAMES == (
        "rpn_class_loss",
        "rpn_bbox_loss",
        "mrcnn_class_loss",
        "mrcnn_bbox_loss",
        "mrcnn_mask_loss",
    )


class TestRpnClassLoss:
    def test_by_hand(self) -> None:
        # Softmax of (0, log 3) is (1/4, 3/4), that of (0, 0) is (1/2, 1/2).
        logits = torch.tensor([[[0.0, math.log(3)], [0, math.log(3)], [50, -50]], [[0, 0], [9, 9], [9, 9]]])
        positive = torch.tensor([[True, False, True], [False, True, True]])
        valid = torch.tensor([[True, True, False], [True, False, False]])
        # image 0: mean of -log(3/4) and -log(1/4); image 1: log 2
        expected = ((math.log(4 / 3) + math.log(4)) / 2 + LOG_2) / 2
        torch.testing.assert_close(losses.rpn_class_loss(logits, positive, valid), torch.tensor(expected))

    def test_without_samples_it_is_zero_with_zero_gradient(self) -> None:
        logits = torch.randn(2, 4, 2, requires_grad=True)
        nothing = torch.zeros(2, 4, dtype=torch.bool)
        loss = losses.rpn_class_loss(logits, nothing, nothing)
        torch.autograd.backward(loss)
        torch.testing.assert_close(loss, torch.tensor(0.0))
        torch.testing.assert_close(logits.grad, torch.zeros_like(logits))


class TestRpnBboxLoss:
    def test_by_hand(self) -> None:
        deltas = torch.zeros(2, 3, 4)
        target = torch.tensor(
            [[[0.5, 0, 0, 0], [3, -2, 0, 0], [9, 9, 9, 9]], [[1, 1, 1, 1], [7, 7, 7, 7], [0, 0, 0, 0]]]
        )
        positive = torch.tensor([[True, True, False], [True, True, False]])
        valid = torch.tensor([[True, True, True], [True, False, True]])
        # beta 1: 0.5^2 / 2 = 0.125; (3 - 0.5) + (2 - 0.5) = 4; image 0 has 3 samples, image 1 has 2 and loses 4 * 0.5
        expected = ((0.125 + 4) / 3 + 2 / 2) / 2
        torch.testing.assert_close(losses.rpn_bbox_loss(deltas, target, positive, valid, 1.0), torch.tensor(expected))

    def test_beta_moves_the_corner(self) -> None:
        deltas, target = torch.zeros(1, 1, 4), torch.tensor([[[0.5, 0, 0, 0]]])
        yes = torch.ones(1, 1, dtype=torch.bool)
        # beta 0.25: linear at 0.5, so 0.5 - 0.125
        torch.testing.assert_close(losses.rpn_bbox_loss(deltas, target, yes, yes, 0.25), torch.tensor(0.375))

    def test_negatives_have_no_gradient(self) -> None:
        deltas = torch.randn(1, 4, 4, requires_grad=True)
        positive = torch.tensor([[True, False, False, True]])
        valid = torch.tensor([[True, True, True, False]])
        torch.autograd.backward(losses.rpn_bbox_loss(deltas, torch.randn(1, 4, 4), positive, valid, 1.0))
        assert deltas.grad is not None
        assert deltas.grad[0, 0].any()
        assert not deltas.grad[0, 1:].any()


class TestMrcnnClassLoss:
    ALL = torch.ones(2, 3, dtype=torch.bool)

    def test_by_hand(self) -> None:
        # Softmax of (0, 0, log 2) is (1/4, 1/4, 1/2).
        logits = torch.tensor([[0, 0, LOG_2], [0, 0, LOG_2], [0, 0, LOG_2], [80, 0, 0]])
        classes = torch.tensor([2, 0, 1, 2])
        image_index = torch.tensor([0, 0, 1, 1])
        valid = torch.tensor([True, True, True, False])
        expected = ((LOG_2 + math.log(4)) / 2 + math.log(4)) / 2
        loss = losses.mrcnn_class_loss(logits, classes, valid, image_index, self.ALL)
        torch.testing.assert_close(loss, torch.tensor(expected))

    def test_inactive_classes_leave_the_softmax_of_their_image_alone(self) -> None:
        logits = torch.tensor([[0, 50, LOG_2], [0, 50.0, 0]])
        active = torch.tensor([[True, False, True], [True, True, True]])
        valid = torch.ones(2, dtype=torch.bool)
        # image 0 without class 1: softmax (1/3, -, 2/3); image 1: -log of e^-50
        loss = losses.mrcnn_class_loss(logits, torch.tensor([2, 0]), valid, torch.tensor([0, 1]), active)
        torch.testing.assert_close(loss, torch.tensor((math.log(1.5) + 50) / 2))

    def test_inactive_classes_get_exactly_no_gradient(self) -> None:
        logits = torch.randn(6, 4, requires_grad=True)
        image_index = torch.tensor([0, 0, 0, 1, 1, 1])
        active = torch.tensor([[True, False, True, False], [True, True, True, True]])
        classes = torch.tensor([0, 2, 2, 1, 3, 0])
        torch.autograd.backward(
            losses.mrcnn_class_loss(logits, classes, torch.ones(6, dtype=torch.bool), image_index, active)
        )
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad[:3, [1, 3]], torch.zeros(3, 2), rtol=0, atol=0)
        assert (logits.grad[:3, [0, 2]] != 0).all()
        assert (logits.grad[3:] != 0).all()

    def test_nothing_active_but_background(self) -> None:
        logits = torch.randn(3, 3, requires_grad=True)
        active = torch.tensor([[True, False, False]])
        classes, index = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
        loss = losses.mrcnn_class_loss(logits, classes, torch.ones(3, dtype=torch.bool), index, active)
        torch.autograd.backward(loss)
        torch.testing.assert_close(loss, torch.tensor(0.0))
        torch.testing.assert_close(logits.grad, torch.zeros(3, 3))


class TestMrcnnBboxLoss:
    def test_only_the_true_class_of_positives_counts(self) -> None:
        deltas = torch.zeros(4, 3, 4, requires_grad=True)
        targets = torch.tensor([[0.5, 0, 0, 0], [3, 0, 0, 0], [1, 1, 1, 1], [5, 5, 5, 5]])
        classes = torch.tensor([2, 0, 1, 1])
        valid = torch.tensor([True, True, True, False])
        image_index = torch.tensor([0, 0, 1, 1])
        loss = losses.mrcnn_bbox_loss(deltas, targets, classes, valid, image_index, 2, 1.0)
        # image 0: 0.125 over 2 regions (the negative counts below the line); image 1: 4 * 0.5 over 1
        torch.testing.assert_close(loss, torch.tensor((0.125 / 2 + 2) / 2))
        torch.autograd.backward(loss)
        assert deltas.grad is not None
        with_gradient = [tuple(row) for row in torch.nonzero(deltas.grad.any(dim=2)).tolist()]
        assert with_gradient == [(0, 2), (2, 1)]


class TestMrcnnMaskLoss:
    def test_by_hand(self) -> None:
        logits = torch.zeros(3, 2, 2)
        logits[1] = math.log(3)  # sigmoid 3/4
        targets = torch.tensor([1.0, 0, 1, 0]).reshape(2, 2).repeat(3, 1, 1)
        loss = losses.mrcnn_mask_loss(logits, targets, torch.tensor([True, True, False]), torch.tensor([0, 1, 1]), 2)
        # image 0: log 2; image 1: half of the cells -log(3/4), half -log(1/4)
        expected = (LOG_2 + (math.log(4 / 3) + math.log(4)) / 2) / 2
        torch.testing.assert_close(loss, torch.tensor(expected))

    def test_garbage_in_empty_slots_has_no_gradient(self) -> None:
        logits = torch.randn(3, 2, 2, requires_grad=True)
        targets = torch.ones(3, 2, 2)
        torch.autograd.backward(
            losses.mrcnn_mask_loss(logits, targets, torch.tensor([True, False, False]), torch.zeros(3).long(), 1)
        )
        assert logits.grad is not None
        assert logits.grad[0].any()
        assert not logits.grad[1:].any()


def test_no_regions_at_all() -> None:
    logits = torch.zeros(0, 3, requires_grad=True)
    deltas = torch.zeros(0, 3, 4, requires_grad=True)
    masks = torch.zeros(0, 28, 28, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    values = torch.stack(
        [
            losses.mrcnn_class_loss(logits, none, none.bool(), none, torch.ones(2, 3, dtype=torch.bool)),
            losses.mrcnn_bbox_loss(deltas, torch.zeros(0, 4), none, none.bool(), none, 2, 1.0),
            losses.mrcnn_mask_loss(masks, torch.zeros(0, 28, 28), none.bool(), none, 2),
        ]
    )
    torch.testing.assert_close(values, torch.zeros(3))
    torch.autograd.backward(values.sum())
    assert all(x.grad is not None for x in (logits, deltas, masks))


@pytest.mark.parametrize("owner", [[0, 0, 0, 0, 1, 1], [0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
def test_every_image_weighs_the_same(owner: list[int]) -> None:
    """An image with many regions weighs as much as one with few; one without weighs in as zero."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, generator=generator)
    deltas, masks = torch.randn(6, 3, 4, generator=generator), torch.randn(6, 4, 4, generator=generator)
    classes, image_index = torch.tensor([1, 2, 0, 1, 0, 2]), torch.tensor(owner)
    valid = torch.tensor([True, True, True, False, True, True])
    target_deltas, target_masks = torch.randn(6, 4, generator=generator), (masks > 0.3).float()
    active = torch.ones(2, 3, dtype=torch.bool)
    together = torch.stack(
        [
            losses.mrcnn_class_loss(logits, classes, valid, image_index, active),
            losses.mrcnn_bbox_loss(deltas, target_deltas, classes, valid, image_index, 2, 1.0),
            losses.mrcnn_mask_loss(masks, target_masks, valid, image_index, 2),
        ]
    )
    alone = []
    for image in range(2):
        rows = image_index == image
        index = torch.zeros(int(rows.sum()), dtype=torch.int64)
        alone.append(
            torch.stack(
                [
                    losses.mrcnn_class_loss(logits[rows], classes[rows], valid[rows], index, active[:1]),
                    losses.mrcnn_bbox_loss(
                        deltas[rows], target_deltas[rows], classes[rows], valid[rows], index, 1, 1.0
                    ),
                    losses.mrcnn_mask_loss(masks[rows], target_masks[rows], valid[rows], index, 1),
                ]
            )
        )
    torch.testing.assert_close(together, torch.stack(alone).mean(dim=0))


def test_one_image_equals_the_functions_of_torch() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, masks = torch.randn(5, 3, generator=generator), torch.randn(5, 4, 4, generator=generator)
    classes, index = torch.tensor([1, 2, 0, 1, 0]), torch.zeros(5, dtype=torch.int64)
    valid = torch.ones(5, dtype=torch.bool)
    active = torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(
        losses.mrcnn_class_loss(logits, classes, valid, index, active), F.cross_entropy(logits, classes)
    )
    target = (torch.rand(5, 4, 4, generator=generator) > 0.5).float()
    torch.testing.assert_close(
        losses.mrcnn_mask_loss(masks, target, valid, index, 1), F.binary_cross_entropy_with_logits(masks, target)
    )


class TestNormalizers:
    """Two images: three sampled rows of which one is positive, and one, which is positive."""

    VALID = torch.tensor([[True, True, True], [True, False, False]])
    POSITIVE = torch.tensor([[True, False, False], [True, True, False]])

    def test_rpn_class_loss_over_the_batch(self) -> None:
        logits = torch.tensor([[[0.0, math.log(3)], [0, math.log(3)], [0, 0]], [[0, 0], [9, 9], [9, 9]]])
        # -log(3/4), -log(1/4), log 2 and log 2
        expected = torch.tensor((math.log(4 / 3) + math.log(4) + LOG_2 + LOG_2) / 4)
        for normalizer in ("batch", "positives"):
            found = losses.rpn_class_loss(logits, self.POSITIVE, self.VALID, normalizer)
            torch.testing.assert_close(found, expected)
        assert not torch.isclose(losses.rpn_class_loss(logits, self.POSITIVE, self.VALID), expected)

    @pytest.mark.parametrize(
        ("normalizer", "expected"),
        [
            ("image", (3.5 / 3 + 2 / 1) / 2),
            ("batch", (3.5 + 2) / 4),  # sampled rows of both
            ("positives", (3.5 + 2) / (2 * 4)),  # positives of both, four numbers each
        ],
    )
    def test_bbox_losses_by_hand(self, normalizer: losses.Normalizer, expected: float) -> None:
        target = torch.zeros(2, 3, 4)
        target[0, 0, 0] = 4.0  # 4 - 0.5
        target[1, 0] = 1.0  # 4 * 0.5
        target[1, 1] = 9.0  # no row
        found = losses.rpn_bbox_loss(torch.zeros(2, 3, 4), target, self.POSITIVE, self.VALID, 1.0, normalizer)
        torch.testing.assert_close(found, torch.tensor(expected))
        classes, index = (self.POSITIVE.long() * 2).flatten(), torch.tensor([0, 0, 0, 1, 1, 1])
        found = losses.mrcnn_bbox_loss(
            torch.zeros(6, 3, 4), target.reshape(6, 4), classes, self.VALID.flatten(), index, 2, 1.0, normalizer
        )
        torch.testing.assert_close(found, torch.tensor(expected))

    @pytest.mark.parametrize("normalizer", ["batch", "positives"])
    def test_class_and_mask_losses_equal_the_functions_of_torch_on_all_rows(
        self, normalizer: losses.Normalizer
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        logits, masks = torch.randn(6, 3, generator=generator), torch.randn(6, 4, 4, generator=generator)
        classes, index = torch.tensor([1, 2, 0, 1, 0, 2]), torch.tensor([0, 1, 1, 1, 1, 1])
        valid = torch.tensor([True, True, True, False, True, True])
        active = torch.ones(2, 3, dtype=torch.bool)
        found = losses.mrcnn_class_loss(logits, classes, valid, index, active, normalizer)
        torch.testing.assert_close(found, F.cross_entropy(logits[valid], classes[valid]))
        targets = (masks > 0.3).float()
        found = losses.mrcnn_mask_loss(masks, targets, valid, index, 2, normalizer)
        torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(masks[valid], targets[valid]))

    @pytest.mark.parametrize("normalizer", ["image", "batch", "positives"])
    def test_nothing_to_divide_by_gives_zero_and_finite_gradients(self, normalizer: losses.Normalizer) -> None:
        nothing = torch.zeros(2, 3, dtype=torch.bool)
        deltas, logits = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 2, requires_grad=True)
        masks = torch.zeros(0, 4, 4, requires_grad=True)
        none = torch.zeros(0, dtype=torch.int64)
        values = torch.stack(
            [
                losses.rpn_class_loss(logits, nothing, nothing, normalizer),
                losses.rpn_bbox_loss(deltas, torch.randn(2, 3, 4), nothing, nothing, 1.0, normalizer),
                losses.mrcnn_mask_loss(masks, torch.zeros(0, 4, 4), none.bool(), none, 2, normalizer),
            ]
        )
        torch.testing.assert_close(values, torch.zeros(3))
        torch.autograd.backward(values.sum())
        for x in (deltas, logits, masks):
            assert x.grad is not None
            assert not x.grad.any()


class TestInactiveByPrediction:
    # Best classes: 1, 2, 0, 1.
    LOGITS = torch.tensor([[0.0, 3, 1], [0, 1, 3], [3, 0, 1], [0, 3, 1]])
    CLASSES = torch.tensor([1, 1, 2, 0])
    INDEX = torch.tensor([0, 0, 1, 1])
    ALL = torch.ones(4, dtype=torch.bool)

    def loss(self, active: list[list[bool]], normalizer: losses.Normalizer = "positives") -> Tensor:
        return losses.mrcnn_class_loss(
            self.LOGITS, self.CLASSES, self.ALL, self.INDEX, torch.tensor(active), normalizer, "by_prediction"
        )

    def test_each_image_has_its_own_flags(self) -> None:
        whole = F.cross_entropy(self.LOGITS, self.CLASSES, reduction="none")  # over all classes, active or not
        # In image 0 class 2 is not labelled: the second region does not count. In image 1 class 1: not the fourth.
        found = self.loss([[True, True, False], [True, False, True]])
        torch.testing.assert_close(found, (whole[0] + whole[2]) / 2)
        torch.testing.assert_close(self.loss([[True, True, True], [True, False, True]]), whole[:3].mean())
        found = self.loss([[True, True, False], [True, True, True]], "image")
        torch.testing.assert_close(found, (whole[0] + whole[2:].mean()) / 2)

    def test_none_active_is_zero_with_finite_gradients(self) -> None:
        logits = self.LOGITS[[0, 1, 3]].clone().requires_grad_()
        active = torch.tensor([[True, False, False]])
        index, valid = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)
        for normalizer in ("image", "batch", "positives"):
            loss = losses.mrcnn_class_loss(
                logits, torch.tensor([1, 2, 0]), valid, index, active, normalizer, "by_prediction"
            )
            torch.testing.assert_close(loss, torch.tensor(0.0))
            torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.zeros(3, 3))

    def test_a_region_that_counts_trains_every_logit(self) -> None:
        logits = self.LOGITS.clone().requires_grad_()
        active = torch.tensor([[True, True, False], [True, False, True]])
        loss = losses.mrcnn_class_loss(logits, self.CLASSES, self.ALL, self.INDEX, active, "positives", "by_prediction")
        gradient = torch.autograd.grad(loss, logits)[0]
        assert gradient.any(dim=1).tolist() == [True, False, True, False]
        assert (gradient[[0, 2]] != 0).all()


def test_without_a_beta_the_loss_is_plain_l1() -> None:
    deltas, targets = torch.tensor([[[1.0, -2, 0.25, 0]]]), torch.zeros(1, 1, 4)
    yes = torch.tensor([[True]])
    assert losses.rpn_bbox_loss(deltas, targets, yes, yes, beta=0.0).item() == 3.25


def test_giou_losses_are_torchvisions_on_the_decoded_boxes() -> None:
    """The losses see deltas only; any reference box gives the same GIoU."""
    generator = torch.Generator().manual_seed(2)
    scale = (0.1, 0.1, 0.2, 0.2)
    references = torch.rand(2, 6, 2, generator=generator) * 50
    references = torch.cat([references, references + 5 + 40 * torch.rand(2, 6, 2, generator=generator)], dim=-1)
    deltas, targets = torch.randn(2, 2, 6, 4, generator=generator)
    deltas.requires_grad_()
    positive = torch.tensor([[True, True, False, False, False, False], [True] * 5 + [False]])
    valid = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    found = losses.rpn_bbox_loss(deltas, targets, positive, valid, beta=1.0, giou_delta_scale=scale)
    boxes, gt_boxes = (decode_boxes(values, references, scale) for values in (deltas, targets))
    each = generalized_box_iou_loss(boxes, gt_boxes)  # (2, 6)
    expected = (each[0, :2].sum() / 4 + each[1, :5].sum() / 6) / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(found, deltas)
    assert gradient[positive].abs().sum(dim=-1).gt(0).all()
    assert gradient[~positive].eq(0).all()

    found = losses.rpn_bbox_loss(deltas, targets, positive, valid, 1.0, "positives", giou_delta_scale=scale)
    torch.testing.assert_close(found, each[positive & valid].mean(), rtol=1e-4, atol=1e-5)  # one number a box, not four

    classes = torch.tensor([2, 0, 1])
    per_class = torch.randn(3, 3, 4, generator=generator)
    image_index = torch.tensor([0, 0, 1])
    everything = torch.ones(3, dtype=torch.bool)
    found = losses.mrcnn_bbox_loss(
        per_class, targets[0, :3], classes, everything, image_index, 2, 1.0, giou_delta_scale=scale
    )
    boxes = decode_boxes(per_class[[0, 2], [2, 1]], references[0, [0, 2]], scale)
    each = generalized_box_iou_loss(boxes, decode_boxes(targets[0, [0, 2]], references[0, [0, 2]], scale))
    torch.testing.assert_close(found, (each[0] / 2 + each[1]) / 2, rtol=1e-4, atol=1e-5)
    found = losses.mrcnn_bbox_loss(
        per_class, targets[0, :3], classes, everything, image_index, 2, 1.0, "positives", giou_delta_scale=scale
    )
    torch.testing.assert_close(found, each.mean(), rtol=1e-4, atol=1e-5)
