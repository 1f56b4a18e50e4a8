"""What anchors and regions are trained towards."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from model.boxes import encode_boxes, last_pixel_outside
from model.config import ModelConfig, RoiConfig
from model.mask_targets import crop_mask_targets
from model.structures import Batch
from model.targets import match_anchors, sample_regions
from tests.model.factories import box_batch
from tests.model.golden import Array, Case, cases, delta_scale, needs_golden, original_config, to_normalised, to_pixels

pytestmark = needs_golden

SIDE = 128  # of the canvas that normalised boxes are taken to be of


def with_masks(batch: Batch, masks: Array, boxes: Tensor) -> Batch:
    """The batch of one image with these masks (h, w, G), each covering its box (G, 4) in input pixels."""
    height, width, number = masks.shape
    bits = [np.packbits(masks[:, :, index]) for index in range(number)]
    slots = batch.classes.shape[1]
    offsets = torch.zeros(1, slots, dtype=torch.int64)
    offsets[0, :number] = torch.tensor(np.cumsum([0] + [len(part) for part in bits])[:-1])
    sizes = torch.zeros(1, slots, 2, dtype=torch.int64)
    sizes[0, :number] = torch.tensor([height, width])
    covered = torch.zeros(1, slots, 4, dtype=boxes.dtype)
    covered[0, :number] = boxes
    return replace(
        batch,
        mask_boxes=covered,
        mask_sizes=sizes,
        mask_offsets=offsets,
        mask_bits=torch.from_numpy(np.concatenate(bits)),
        image_sizes=torch.tensor([[SIDE, SIDE]]),
    )


@pytest.mark.parametrize("name", sorted(set(cases("targets", "rpn_"))))
def test_anchors(name: str) -> None:
    golden = Case("targets", name)
    anchors = Case("targets", "rpn").boxes("anchors")
    classes = golden["gt_class_ids"]
    batch = box_batch([golden.boxes("gt_boxes").tolist()], [np.abs(classes).tolist()], [(classes < 0).tolist()])
    batch = replace(batch, boxes=batch.boxes.double())  # which anchors tie is a matter of the last bit
    positive, negative, matched = match_anchors(anchors, batch, ModelConfig())
    match = golden.tensor("rpn_match")
    torch.testing.assert_close(positive[0], match == 1)
    torch.testing.assert_close(negative[0], match == -1)
    assert (match == 1).any()

    deltas = encode_boxes(batch.boxes[0, matched[0]], anchors, delta_scale("RPN_BBOX_STD_DEV"))[positive[0]]
    packed = golden.boxes("rpn_bbox")
    torch.testing.assert_close(deltas, packed[: len(deltas)], rtol=0, atol=1e-5)
    assert not packed[len(deltas) :].any()


@pytest.mark.parametrize("name", cases("targets", "det_"))
def test_regions(name: str) -> None:
    golden = Case("targets", name)
    # In float64: a float32 pixel has lost bits that the normalised number still has, and a mask's edge hangs on them.
    proposals = to_pixels(golden.boxes("proposals").double(), SIDE, SIDE)
    gt_boxes = to_pixels(golden.boxes("gt_boxes").double(), SIDE, SIDE)
    classes = golden["gt_class_ids"]
    batch = box_batch([gt_boxes.tolist()], [np.abs(classes).tolist()], [(classes < 0).tolist()])
    batch = replace(
        batch, boxes=torch.cat([gt_boxes, gt_boxes.new_zeros(batch.boxes.shape[1] - len(gt_boxes), 4)])[None]
    )
    masks = golden["gt_masks"]
    whole = torch.tensor([0.0, 0.0, SIDE, SIDE]).double().expand(len(classes), 4)
    covered = last_pixel_outside(gt_boxes) if bool(golden["use_mini_mask"]) else whole
    batch = with_masks(batch, masks, covered)
    rois = golden.boxes("rois")
    config = ModelConfig(
        roi=RoiConfig(
            rois_per_image=len(rois),
            positive_fraction=original_config()["ROI_POSITIVE_RATIO"],
            add_ground_truth=False,
            fixed_ratio=True,
        )
    )
    valid = proposals.any(dim=1)  # zero rows are padding
    targets = sample_regions(proposals[None], valid[None], batch, config)
    num_positive, num_negative = int(golden["num_positive"]), int(golden["num_negative"])
    is_positive = targets.classes[0] > 0
    assert int(is_positive.sum()) == num_positive
    assert int((targets.valid[0] & ~is_positive).sum()) == num_negative

    # The original draws rows in random order, and so do we: both are brought into the order of the proposals.
    source = golden.tensor("source_index")
    assert len(source) == num_positive + num_negative

    def slot_of(row: Tensor) -> int:
        slots = torch.nonzero(targets.valid[0] & (targets.boxes[0] == proposals[row]).all(dim=1)).flatten()
        assert len(slots) == 1
        return int(slots[0])

    slots = torch.tensor([slot_of(row) for row in source], dtype=torch.int64)
    sampled = to_normalised(targets.boxes[0, slots], SIDE, SIDE)
    torch.testing.assert_close(sampled.float(), rois[: len(source)], rtol=0, atol=1e-6)
    assert not rois[len(source) :].any()
    expected_classes = golden.tensor("target_class_ids").long()
    torch.testing.assert_close(targets.classes[0, slots], expected_classes[: len(source)])
    assert not expected_classes[len(source) :].any()

    positives = slots[:num_positive]
    gt_index = targets.matched_gt_index[0, positives]
    expected_deltas = golden.boxes("target_deltas")
    deltas = encode_boxes(batch.boxes[0, gt_index], targets.boxes[0, positives], delta_scale("BBOX_STD_DEV"))
    torch.testing.assert_close(deltas.float(), expected_deltas[:num_positive], rtol=0, atol=1e-5)
    assert not expected_deltas[num_positive:].any()

    expected_masks = golden.tensor("target_masks").float()
    target_masks = crop_mask_targets(
        batch,
        torch.tensor([[0.0, 0.0, SIDE, SIDE]]),
        torch.zeros_like(gt_index),
        gt_index,
        targets.boxes[0, positives],
        expected_masks.shape[-1],
        "crop_and_resize",
    )
    torch.testing.assert_close(target_masks, expected_masks[:num_positive])
    assert not expected_masks[num_positive:].any()
