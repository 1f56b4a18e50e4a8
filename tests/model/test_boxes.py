import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou

from model.boxes import (
    box_area,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    generalized_iou,
    last_pixel_inside,
    last_pixel_outside,
    pairwise_iou,
)

UNIT = (1.0, 1.0, 1.0, 1.0)
SCALE = (0.1, 0.1, 0.2, 0.2)


def random_boxes(num: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(num, 2, generator=generator) * 100
    return torch.cat([corner, corner + 1 + torch.rand(num, 2, generator=generator) * 60], dim=1)


coordinate = st.floats(-200, 200, width=32)
side = st.floats(0.125, 500, width=32)
box = st.builds(lambda x, y, w, h: [x, y, x + w, y + h], coordinate, coordinate, side, side)


def test_box_area_by_hand() -> None:
    boxes = torch.tensor([[1.0, 2, 5, 5], [0, 0, 0, 9], [4, 0, 1, 2], [4, 4, 1, 1]])
    torch.testing.assert_close(box_area(boxes), torch.tensor([12.0, 0, 0, 0]))


def test_pairwise_iou_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]])
    others = torch.tensor(
        [
            [0.0, 0, 10, 10],  # itself
            [5, 0, 15, 10],  # half of each: 50 / 150
            [2, 2, 4, 4],  # inside: 4 / 100
            [10, 0, 20, 10],  # touches
            [3, 3, 3, 3],  # no area
            [8, 8, 2, 2],  # inside out
        ]
    )
    torch.testing.assert_close(pairwise_iou(boxes, others), torch.tensor([[1, 1 / 3, 0.04, 0, 0, 0]]))


def test_pairwise_iou_equals_torchvision_alone_and_batched() -> None:
    boxes = random_boxes(24, 0).reshape(2, 12, 4)
    others = random_boxes(18, 1).reshape(2, 9, 4)
    expected = torch.stack([box_iou(boxes[0], others[0]), box_iou(boxes[1], others[1])])
    assert (expected > 0).any()
    torch.testing.assert_close(pairwise_iou(boxes, others), expected)


def test_pairwise_iou_of_two_empty_boxes_is_zero() -> None:
    empty = torch.zeros(2, 4)
    torch.testing.assert_close(pairwise_iou(empty, empty), torch.zeros(2, 2))


@settings(max_examples=50, deadline=None)
@given(st.lists(box, min_size=1, max_size=5))
def test_iou_is_symmetric_at_most_one_and_one_with_itself(rows: list[list[float]]) -> None:
    boxes = torch.tensor(rows, dtype=torch.float64)
    iou = pairwise_iou(boxes, boxes)
    torch.testing.assert_close(iou, iou.T)
    torch.testing.assert_close(iou.diagonal(), torch.ones(len(rows), dtype=torch.float64))
    assert ((iou >= 0) & (iou <= 1 + 1e-12)).all()


def test_encode_by_hand() -> None:
    reference = torch.tensor([[10.0, 20, 30, 60]])  # 20 wide, 40 high, centre (20, 40)
    target = torch.tensor([[20.0, 40, 60, 60]])  # 40 wide, 20 high, centre (40, 50)
    expected = torch.tensor([[1.0, 0.25, math.log(2), -math.log(2)]])
    torch.testing.assert_close(encode_boxes(target, reference, UNIT), expected)
    torch.testing.assert_close(encode_boxes(target, reference, SCALE), expected / torch.tensor([0.1, 0.1, 0.2, 0.2]))


def test_decode_by_hand() -> None:
    reference = torch.tensor([[10.0, 20, 30, 60]])
    # Shift by one width and a quarter of the height, twice as wide, half as high.
    deltas = torch.tensor([[10.0, 2.5, 5 * math.log(2), -5 * math.log(2)]])
    torch.testing.assert_close(decode_boxes(deltas, reference, SCALE), torch.tensor([[20.0, 40, 60, 60]]))


@settings(max_examples=50, deadline=None)
@given(box, box, st.sampled_from([UNIT, SCALE]))
def test_decode_inverts_encode(target: list[float], reference: list[float], scale: tuple[float, ...]) -> None:
    b, r = torch.tensor([target], dtype=torch.float64), torch.tensor([reference], dtype=torch.float64)
    sizes = (b[:, 2:] - b[:, :2]) / (r[:, 2:] - r[:, :2])
    deltas = encode_boxes(b, r, scale)
    if bool((sizes <= 1000 / 16).all()):
        torch.testing.assert_close(decode_boxes(deltas, r, scale), b, rtol=1e-9, atol=1e-6)
    else:  # the growth limit applies
        decoded = decode_boxes(deltas, r, scale)
        torch.testing.assert_close(decoded[:, 2:] - decoded[:, :2], (r[:, 2:] - r[:, :2]) * sizes.clamp(max=1000 / 16))


def test_decode_keeps_a_wild_guess_finite() -> None:
    decoded = decode_boxes(torch.full((1, 4), 1e4), torch.tensor([[0.0, 0, 16, 16]]), SCALE)
    assert decoded.isfinite().all()
    torch.testing.assert_close(decoded[:, 2:] - decoded[:, :2], torch.tensor([[1000.0, 1000.0]]))


@pytest.mark.parametrize("empty_is_reference", [False, True])
def test_encode_of_empty_slots_is_finite(empty_is_reference: bool) -> None:
    empty, real = torch.zeros(1, 4), torch.tensor([[5.0, 5, 25, 45]])
    deltas = encode_boxes(real, empty, SCALE) if empty_is_reference else encode_boxes(empty, real, SCALE)
    assert deltas.isfinite().all()


def test_clip_by_hand() -> None:
    boxes = torch.tensor([[-5.0, -5, 10, 10], [15, 25, 50, 60], [60, 70, 80, 90]])
    # x is limited by 20, y by 30; the last box lies outside and loses its area.
    expected = torch.tensor([[0.0, 0, 10, 10], [15, 25, 20, 30], [20, 30, 20, 30]])
    torch.testing.assert_close(clip_boxes(boxes, torch.tensor([0, 0, 20, 30])), expected)
    moved = clip_boxes(boxes + 7, torch.tensor([7, 7, 27, 37]))
    torch.testing.assert_close(moved, expected + 7)


def test_clip_of_a_batch_equals_clip_of_each_image() -> None:
    boxes = random_boxes(10, 3).reshape(2, 5, 4)
    windows = torch.tensor([[0, 0, 90, 60], [10, 5, 30, 120]])
    expected = torch.stack([clip_boxes(boxes[0], windows[0]), clip_boxes(boxes[1], windows[1])])
    torch.testing.assert_close(clip_boxes(boxes, windows), expected)
    assert not torch.equal(expected, boxes)


def test_last_pixel_inside_and_back() -> None:
    boxes = random_boxes(6, 4).reshape(2, 3, 4)
    inside = last_pixel_inside(boxes)
    torch.testing.assert_close(inside - boxes, torch.tensor([0.0, 0, -1, -1]).expand(2, 3, 4))
    torch.testing.assert_close(last_pixel_outside(inside), boxes)
    # A single pixel has no area in this frame, two overlapping ones no IoU; this is the original's arithmetic.
    assert box_area(last_pixel_inside(torch.tensor([[4.0, 4, 5, 5]]))) == 0
    assert last_pixel_inside(torch.zeros(0, 4)).shape == last_pixel_outside(torch.zeros(0, 4)).shape == (0, 4)


def test_nothing_in_nothing_out() -> None:
    none, some = torch.zeros(0, 4), random_boxes(3, 0)
    assert box_area(none).shape == (0,)
    assert pairwise_iou(none, some).shape == (0, 3)
    assert pairwise_iou(some, none).shape == (3, 0)
    assert encode_boxes(none, none, SCALE).shape == (0, 4)
    assert decode_boxes(none, none, SCALE).shape == (0, 4)
    assert clip_boxes(none, torch.tensor([0, 0, 5, 5])).shape == (0, 4)
    assert clip_boxes(torch.zeros(2, 0, 4), torch.tensor([[0, 0, 5, 5], [0, 0, 6, 6]])).shape == (2, 0, 4)


def test_generalized_iou_by_hand_and_as_torchvision_has_it() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 1, 1]])
    others = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [0, 0, 4, 1], [3, 0, 4, 1]])
    # Equal; a quarter each of 1 in 7 with a hull of 9; 2 in 6 with a hull of 8; apart, 2 of a hull of 4.
    expected = torch.tensor([1.0, 1 / 7 - 2 / 9, 2 / 6 - 2 / 8, -2 / 4])
    torch.testing.assert_close(generalized_iou(boxes, others), expected)
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 50, 2, 2, generator=generator).sort(dim=2).values.flatten(2)
    torch.testing.assert_close(
        generalized_iou(*corners), torch.diagonal(generalized_box_iou(*corners)), rtol=1e-4, atol=1e-5
    )
    assert generalized_iou(boxes[:0], others[:0]).shape == (0,)
    assert generalized_iou(torch.zeros(1, 4), torch.zeros(1, 4)).isfinite().all()
