"""Numbers that the original implementation computed, where its definition is ours.

The original writes boxes as (y1, x1, y2, x2) and deltas as (dy, dx, dh, dw): adapted here, not in the model.
"""

import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

from model import losses
from model.anchors import level_anchors, pyramid_anchors
from model.boxes import clip_boxes, decode_boxes, encode_boxes, pairwise_iou
from model.config import AnchorConfig, ModelConfig, RoiConfig, RpnConfig
from model.proposals import propose
from model.targets import match_anchors, sample_regions
from tests.model.factories import box_batch

Array = npt.NDArray[Any]

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[2].parent / "shared" / "golden"))
UNIT = (1.0, 1.0, 1.0, 1.0)
SCALE = (0.1, 0.1, 0.2, 0.2)

pytestmark = pytest.mark.skipif(
    not (FOLDER / "pure.npz").is_file(), reason="no golden vectors; name their folder in GOLDEN_DIR"
)


@cache
def archive(name: str) -> dict[str, Array]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def case(name: str, prefix: str) -> dict[str, Array]:
    """Arrays of one case by the name of the argument."""
    values = {key.split("__", 1)[1]: value for key, value in archive(name).items() if key.startswith(f"{prefix}__")}
    assert values, f"{name}.npz has no case {prefix}"
    return values


def swapped(values: Array) -> Tensor:
    """(y1, x1, y2, x2) to (x1, y1, x2, y2), and (dy, dx, dh, dw) to (dx, dy, dw, dh)."""
    return torch.from_numpy(values[..., [1, 0, 3, 2]])


class TestAnchors:
    @pytest.mark.parametrize("name", ["anchors_level", "anchors_level_stride2", "anchors_level_multi"])
    def test_level(self, name: str) -> None:
        golden = case("pure", name)
        height, width = golden["shape"].tolist()
        anchors = level_anchors(
            golden["scales"].tolist(),
            golden["ratios"].tolist(),
            (height, width),
            float(golden["feature_stride"]),
            int(golden["anchor_stride"]),
        )
        torch.testing.assert_close(anchors, swapped(golden["out"]).float())

    @pytest.mark.parametrize("name", ["128", "512_small", "512", "256x320"])
    def test_pyramid(self, name: str) -> None:
        golden = case("pure", f"anchors_pyramid_{name}")
        assert golden["strides"].tolist() == [4, 8, 16, 32, 64]
        sizes = [(int(h), int(w)) for h, w in golden["backbone_shapes"]]
        anchors = pyramid_anchors(AnchorConfig(scales=tuple(golden["scales"].tolist())), sizes)
        assert len(anchors) == int(golden["count"])
        torch.testing.assert_close(anchors[:: int(golden["step"])], swapped(golden["px"]).float())
        torch.testing.assert_close(anchors.double().sum(dim=0), swapped(golden["px_sum"]), rtol=1e-6, atol=0.1)


class TestBoxes:
    def test_iou(self) -> None:
        golden = case("pure", "compute_overlaps")
        iou = pairwise_iou(swapped(golden["boxes1"]), swapped(golden["boxes2"]))
        torch.testing.assert_close(iou, torch.from_numpy(golden["out"]), rtol=1e-12, atol=1e-12)
        golden = case("pure", "compute_iou")
        iou = pairwise_iou(swapped(golden["box"])[None], swapped(golden["boxes"]))[0]
        torch.testing.assert_close(iou, torch.from_numpy(golden["out"]), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("name", ["box_refinement", "box_refinement_int"])
    def test_encode(self, name: str) -> None:
        golden = case("pure", name)
        deltas = encode_boxes(swapped(golden["gt_box"]).float(), swapped(golden["box"]).float(), UNIT)
        torch.testing.assert_close(deltas, swapped(golden["out"]), rtol=1e-5, atol=1e-4)

    def test_decode(self) -> None:
        golden = case("pure", "apply_box_deltas")
        boxes = decode_boxes(swapped(golden["deltas"]), swapped(golden["boxes"]), UNIT)
        torch.testing.assert_close(boxes, swapped(golden["out"]), rtol=1e-5, atol=1e-4)

    def test_clip(self) -> None:
        golden = case("pure", "clip_boxes")
        # Ours begin at zero: shift the window there and back.
        top, left, bottom, right = golden["window"].tolist()
        origin = torch.tensor([left, top, left, top])
        size = torch.tensor([bottom - top, right - left])
        clipped = clip_boxes(swapped(golden["boxes"]) - origin, size) + origin
        torch.testing.assert_close(clipped, swapped(golden["out"]), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", ["nms_3", "nms_5", "nms_7"])
    def test_nms(self, name: str) -> None:
        golden = case("pure", name)
        keep = nms(swapped(golden["boxes"]), torch.from_numpy(golden["scores"]), float(golden["threshold"]))
        assert keep.tolist() == golden["out"].tolist()


class TestLosses:
    """Means over the whole batch in the original, so all rows go in as one image."""

    @staticmethod
    def assert_loss(
        loss: Tensor, source: Tensor, golden: dict[str, Array], gradient: str, gradient_rtol: float = 1e-4
    ) -> None:
        torch.testing.assert_close(loss, torch.tensor(golden["loss"]), rtol=1e-5, atol=1e-7)
        torch.autograd.backward(loss)
        torch.testing.assert_close(source.grad, torch.from_numpy(golden[gradient]), rtol=gradient_rtol, atol=1e-6)

    @pytest.mark.parametrize("name", ["normal", "nopos", "neutral"])
    def test_rpn_class(self, name: str) -> None:
        golden = case("losses", f"rpn_class_{name}")
        match = torch.from_numpy(golden["rpn_match"]).reshape(1, -1)
        logits = torch.from_numpy(golden["rpn_class_logits"]).requires_grad_()
        loss = losses.rpn_class_loss(logits.reshape(1, -1, 2), match == 1, match != 0)
        self.assert_loss(loss, logits, golden, "d_rpn_class_logits")

    @pytest.mark.parametrize("name", ["normal", "nopos", "onesided"])
    def test_rpn_bbox(self, name: str) -> None:
        golden = case("losses", f"rpn_bbox_{name}")
        match = torch.from_numpy(golden["rpn_match"])[..., 0]
        target = torch.zeros(2, 50, 4)
        for image in range(2):  # the first rows belong to the positive anchors
            rows = torch.nonzero(match[image] == 1).flatten()
            target[image, rows] = torch.from_numpy(golden["target_bbox"])[image, : len(rows)]
        deltas = torch.from_numpy(golden["rpn_bbox"]).requires_grad_()
        positive = (match == 1).reshape(1, -1)
        # Ours is a sum over the four numbers and a mean over all samples; the original's mean is over positives alone.
        loss = losses.rpn_bbox_loss(deltas.reshape(1, -1, 4), target.reshape(1, -1, 4), positive, positive, 1.0) / 4
        self.assert_loss(loss, deltas, golden, "d_rpn_bbox")

    # Cases with inactive classes are left out: there the definitions differ by design.
    @pytest.mark.parametrize("name", ["all_active", "no_positive"])
    def test_mrcnn_class(self, name: str) -> None:
        golden = case("losses", f"mrcnn_class_{name}")
        active = torch.from_numpy(golden["active_class_ids"]).bool()
        assert active.all()
        classes = torch.from_numpy(golden["target_class_ids"]).flatten().long()
        logits = torch.from_numpy(golden["pred_class_logits"]).requires_grad_()
        index, valid = torch.zeros_like(classes), torch.ones_like(classes).bool()
        loss = losses.mrcnn_class_loss(logits.reshape(-1, 4), classes, valid, index, active[:1])
        self.assert_loss(loss, logits, golden, "d_pred_class_logits")

    @pytest.mark.parametrize("name", ["normal", "no_positive"])
    def test_mrcnn_bbox(self, name: str) -> None:
        golden = case("losses", f"mrcnn_bbox_{name}")
        classes = torch.from_numpy(golden["target_class_ids"]).flatten().long()
        deltas = torch.from_numpy(golden["pred_bbox"]).requires_grad_()
        target = torch.from_numpy(golden["target_bbox"]).reshape(-1, 4)
        index = torch.zeros_like(classes)
        # Means over positives and the four numbers in the original, see `test_rpn_bbox`.
        loss = losses.mrcnn_bbox_loss(deltas.reshape(-1, 4, 4), target, classes, classes > 0, index, 1, 1.0) / 4
        self.assert_loss(loss, deltas, golden, "d_pred_bbox")

    @pytest.mark.parametrize("name", ["normal", "no_positive"])
    def test_mrcnn_mask(self, name: str) -> None:
        golden = case("losses", f"mrcnn_mask_{name}")
        classes = torch.from_numpy(golden["target_class_ids"]).flatten().long()
        probabilities = torch.from_numpy(golden["pred_masks"]).requires_grad_()
        logits = probabilities.logit().reshape(-1, 28, 28, 4)  # the original's loss is on probabilities
        of_class = logits[torch.arange(len(classes)), :, :, classes]
        target = torch.from_numpy(golden["target_masks"]).reshape(-1, 28, 28)
        loss = losses.mrcnn_mask_loss(of_class, target, classes > 0, torch.zeros_like(classes), 1)
        # The original adds 1e-7 to a probability inside the logarithm, which is 1e-3 of the smallest ones here.
        self.assert_loss(loss, probabilities, golden, "d_pred_masks", gradient_rtol=1e-3)

    def test_smooth_l1(self) -> None:
        golden = case("losses", "smooth_l1")
        for x, expected in zip(golden["x"], golden["out"], strict=True):
            deltas = torch.tensor([[[float(x), 0, 0, 0]]])
            yes = torch.ones(1, 1, dtype=torch.bool)
            loss = losses.rpn_bbox_loss(deltas, torch.zeros(1, 1, 4), yes, yes, 1.0)
            torch.testing.assert_close(loss, torch.tensor(expected))


class TestTargets:
    @pytest.mark.parametrize("name", ["normal", "crowd", "tiny", "aligned", "one", "tie"])
    def test_rpn(self, name: str) -> None:
        golden = case("targets", f"rpn_{name}")
        anchors = swapped(case("targets", "rpn")["anchors"])
        classes = golden["gt_class_ids"]
        batch = box_batch([swapped(golden["gt_boxes"]).tolist()], [np.abs(classes).tolist()], [(classes < 0).tolist()])
        batch = replace(batch, boxes=batch.boxes.double())  # which anchors tie is a matter of the last bit
        positive, negative, matched = match_anchors(anchors, batch, ModelConfig())
        match = torch.from_numpy(golden["rpn_match"])
        torch.testing.assert_close(positive[0], match == 1)
        torch.testing.assert_close(negative[0], match == -1)
        assert (match == 1).any()

        deltas = encode_boxes(batch.boxes[0, matched[0]], anchors, SCALE)[positive[0]]
        packed = swapped(golden["rpn_bbox"])[: len(deltas)]
        torch.testing.assert_close(deltas, packed, rtol=1e-5, atol=1e-5)

    # Without positives the original draws no negatives, which is left out here.
    @pytest.mark.parametrize("name", ["mini", "full", "crowd"])
    def test_regions(self, name: str) -> None:
        golden = case("targets", f"det_{name}")
        side = 1024  # ours are pixels
        proposals = swapped(golden["proposals"]) * side
        classes = golden["gt_class_ids"]
        batch = box_batch(
            [(swapped(golden["gt_boxes"]) * side).tolist()], [np.abs(classes).tolist()], [(classes < 0).tolist()]
        )
        config = ModelConfig(roi=RoiConfig(rois_per_image=200, positive_fraction=0.33, add_ground_truth=False))
        valid = proposals.any(dim=1)  # zero rows are padding
        targets = sample_regions(proposals[None], valid[None], batch, config)

        num_positive, num_negative = int(golden["num_positive"]), int(golden["num_negative"])
        assert num_positive > 0
        assert num_negative > 0
        is_positive = targets.classes[0] > 0
        is_negative = targets.valid[0] & ~is_positive
        source = torch.from_numpy(golden["source_index"])

        def rows(boxes: Tensor) -> list[int]:
            return sorted(int((proposals == box).all(dim=1).nonzero()[0]) for box in boxes)

        assert rows(targets.boxes[0, is_positive]) == sorted(source[:num_positive].tolist())
        assert rows(targets.boxes[0, is_negative]) == sorted(source[num_positive:].tolist())

        order = torch.tensor([int((targets.boxes[0] == proposals[row]).all(dim=1).nonzero()[0]) for row in source])
        order = order[:num_positive]
        golden_classes = torch.from_numpy(golden["target_class_ids"][:num_positive]).long()
        torch.testing.assert_close(targets.classes[0, order], golden_classes)
        gt_boxes = batch.boxes[0, targets.matched_gt_index[0, order]]
        deltas = encode_boxes(gt_boxes, targets.boxes[0, order], SCALE)
        torch.testing.assert_close(deltas, swapped(golden["target_deltas"])[:num_positive], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("rois", "number"), [("rois_full", 40), ("rois_padded", 150)])
def test_proposals(rois: str, number: int) -> None:
    golden = case("stages", "proposal")
    # Proposals are ordered by the probability itself, as if the background's logit were zero.
    scores = torch.from_numpy(golden["rpn_class"])[..., 1]
    logits = torch.stack([torch.zeros_like(scores), scores], dim=-1)
    anchors, deltas, expected = (swapped(golden[name]) for name in ("anchors", "rpn_bbox", rois))
    config = RpnConfig(pre_nms_top_k=200, nms_threshold=0.7, delta_scale=SCALE)
    for image in range(2):  # each has its own anchors
        rows = slice(image, image + 1)
        # Normalised boxes are clipped to 1.
        proposals, valid = propose(logits[rows], deltas[rows], anchors[image], torch.ones(1, 2), config, number, 0.0)
        assert valid.sum() == expected[image].any(dim=1).sum()
        torch.testing.assert_close(proposals, expected[rows], rtol=0, atol=1e-6)
