import math
from typing import Literal

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from model.config import RoiConfig
from model.roi_align import pyramid_levels, pyramid_roi_align
from model.weighted_cells import compressed, has_sparse_product, united_weights

STRIDES = (4, 8, 16, 32)
CANVAS = (128, 128)


def sized(canonical_size: float, pooling: Literal["aligned", "unaligned", "crop_and_resize"] = "aligned") -> RoiConfig:
    return RoiConfig(canonical_size=canonical_size, pooling=pooling)


@pytest.fixture(params=["product with a sparse matrix", "without one"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms have to do the same; without the product ROIAlign is torchvision's operator."""
    if request.param == "without one":
        monkeypatch.setattr("model.roi_align.has_sparse_product", lambda _: False)
        monkeypatch.setattr("model.weighted_cells.has_sparse_product", lambda _: False)
    elif not has_sparse_product(torch.device("cpu")):
        pytest.skip("this build of torch does not multiply sparse matrices")


def random_pyramid(images: int = 2, channels: int = 3, canvas: int = 128) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(images, channels, canvas // s, canvas // s, generator=generator) for s in STRIDES]


@pytest.mark.parametrize(
    ("width", "height", "level"),
    [
        (224, 224, 2),  # the canonical size belongs to P4
        (223, 223, 1),
        (448, 448, 3),
        (447, 447, 2),
        (112, 112, 1),
        (111, 111, 0),
        (448, 112, 2),  # the area counts: 224 squared
        (56, 56, 0),
        (1, 1, 0),  # clamped to P2
        (4000, 4000, 3),  # clamped to P5
        (0, 500, 0),  # no area
    ],
)
def test_level_of_a_box_by_hand(width: float, height: float, level: int) -> None:
    box = torch.tensor([[10.0, 20, 10 + width, 20 + height]])
    torch.testing.assert_close(pyramid_levels(box, sized(224.0), CANVAS), torch.tensor([level]))
    torch.testing.assert_close(pyramid_levels(box / 7, sized(32.0), CANVAS), torch.tensor([level]))


def test_rounding_does_not_move_a_box_on_the_border_of_two_levels() -> None:
    # 112 px wide and high, but float32 makes 111.99994 of some of them.
    corner = torch.arange(1, 200) * 4.1
    boxes = torch.stack([corner, corner, corner + 112, corner + 112], dim=1)
    assert ((boxes[:, 2] - boxes[:, 0]) < 112).any()
    torch.testing.assert_close(pyramid_levels(boxes, sized(224.0), CANVAS), torch.ones(199, dtype=torch.int64))


def test_every_box_is_cut_from_its_level_and_image() -> None:
    pyramid = random_pyramid()
    boxes = torch.tensor(
        [[4.0, 4, 12, 20], [10, 10, 50, 42], [0, 0, 100, 90], [0, 0, 128, 128], [3, 3, 9, 9], [30, 30, 31, 90]]
    )
    image_index = torch.tensor([0, 1, 1, 0, 1, 0])
    canonical_size = 64.0
    levels = pyramid_levels(boxes, sized(canonical_size), CANVAS)
    assert levels.tolist() == [0, 1, 2, 3, 0, 0]
    pooled = pyramid_roi_align(pyramid, boxes, image_index, 5, sized(canonical_size), CANVAS)
    for row, level in enumerate(levels.tolist()):
        features = pyramid[level][image_index[row]][None]
        expected = roi_align(features, [boxes[row : row + 1]], 5, 1 / STRIDES[level], 2, aligned=True)
        torch.testing.assert_close(pooled[row : row + 1], expected)


@pytest.mark.parametrize("pooling", ["aligned", "unaligned"])
def test_values_and_gradients_equal_those_of_torchvision(pooling: Literal["aligned", "unaligned"]) -> None:
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(30, 2, 2, generator=generator) * 150 - 10  # some leave the canvas
    boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    boxes[:2] = torch.tensor([0.0, 0, 128, 128])
    boxes[2:4] = torch.tensor([[50.3, 40.1, 51.0, 90], [60, 60, 60, 60]])  # narrower than a cell
    image_index = torch.arange(30) % 2
    ours = [level.requires_grad_() for level in random_pyramid()]
    theirs = [level.requires_grad_() for level in random_pyramid()]
    pooled = pyramid_roi_align(ours, boxes, image_index, 4, sized(64.0, pooling), CANVAS)
    levels = pyramid_levels(boxes, sized(64.0), CANVAS)
    assert set(levels.tolist()) == {0, 1, 2, 3}
    expected = torch.cat(
        [
            roi_align(
                theirs[level],
                torch.cat([image[None], box])[None],
                4,
                1 / STRIDES[level],
                2,
                aligned=pooling == "aligned",
            )
            for level, image, box in zip(levels.tolist(), image_index.float(), boxes, strict=True)
        ]
    )
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(pooled.shape, generator=generator)
    torch.autograd.backward((pooled * weights).sum())
    torch.autograd.backward((expected * weights).sum())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_a_ramp_gives_the_position_of_every_cell() -> None:
    # Where a feature holds the x (or y) of its cell's centre in input pixels, the pooled value is that of the bin.
    pyramid = []
    for stride in STRIDES:
        centre = (torch.arange(128 // stride) + 0.5) * stride
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        pyramid.append(torch.stack([x, y])[None])
    boxes = torch.tensor([[20.0, 30, 34, 38], [18, 20, 66, 50], [20, 20, 100, 110], [16, 16, 112, 112]])
    assert pyramid_levels(boxes, sized(48.0), CANVAS).tolist() == [0, 1, 2, 3]
    pooled = pyramid_roi_align(pyramid, boxes, torch.zeros(4, dtype=torch.int64), 4, sized(48.0), CANVAS)
    steps = (torch.arange(4) + 0.5) / 4
    x = boxes[:, 0:1] + steps * (boxes[:, 2:3] - boxes[:, 0:1])
    y = boxes[:, 1:2] + steps * (boxes[:, 3:4] - boxes[:, 1:2])
    expected = torch.stack([x[:, None, :].expand(4, 4, 4), y[:, :, None].expand(4, 4, 4)], dim=1)
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-4)


def test_order_of_the_boxes_is_kept() -> None:
    pyramid = random_pyramid()
    boxes = torch.tensor([[0.0, 0, 128, 128], [4, 4, 12, 20], [0, 0, 100, 90], [10, 10, 50, 42]])
    image_index = torch.tensor([0, 1, 0, 1])
    pooled = pyramid_roi_align(pyramid, boxes, image_index, 3, sized(64.0), CANVAS)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        pyramid_roi_align(pyramid, boxes[order], image_index[order], 3, sized(64.0), CANVAS), pooled[order]
    )


@pytest.mark.parametrize("boxes", [torch.zeros(0, 4), torch.tensor([[4.0, 4, 12, 12]]), torch.zeros(3, 4)])
def test_every_level_is_part_of_the_graph(boxes: Tensor) -> None:
    pyramid = [level.requires_grad_() for level in random_pyramid()]
    pooled = pyramid_roi_align(pyramid, boxes, torch.zeros(len(boxes), dtype=torch.int64), 7, sized(64.0), CANVAS)
    assert pooled.shape == (len(boxes), 3, 7, 7)
    torch.autograd.backward(pooled.sum())
    for level in pyramid:
        assert level.grad is not None
        assert level.grad.isfinite().all()
    for level in pyramid[1:]:
        assert level.grad is not None
        assert not level.grad.any()


def test_regions_that_read_nothing_are_zero() -> None:
    pyramid = [level.requires_grad_() for level in random_pyramid()]
    boxes = torch.tensor([[500.0, 500, 540, 540], [-90, -80, -50, -40]])
    pooled = pyramid_roi_align(pyramid, boxes, torch.zeros(2, dtype=torch.int64), 7, sized(64.0), CANVAS)
    assert not pooled.any()
    torch.autograd.backward(pooled.sum())
    assert all(level.grad is not None and not level.grad.any() for level in pyramid)


def test_a_cell_read_twice_stands_once_with_both_weights_by_hand() -> None:
    cells = torch.tensor([[3, 4, 3, 4], [3, 4, 4, 5], [3, 4, 5, 6], [9, 9, 9, 9]])
    weights = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.5, 0.1, 0.2, 0.2], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
    united = united_weights(cells, weights)
    expected = [[0.7, 0.3, 0, 0], [0.5, 0.3, 0, 0.2], [0.1, 0.2, 0.3, 0.4], [1.0, 0, 0, 0]]
    torch.testing.assert_close(united, torch.tensor(expected))
    first, columns, kept = compressed(cells, united)
    assert first.tolist() == [0, 2, 5, 9, 10]
    assert columns.tolist() == [3, 4, 3, 4, 5, 3, 4, 5, 6, 9]
    torch.testing.assert_close(kept, torch.tensor([0.7, 0.3, 0.5, 0.3, 0.2, 0.1, 0.2, 0.3, 0.4, 1.0]))


def test_half_precision_features_come_out_in_float32() -> None:
    pyramid = [level.bfloat16() for level in random_pyramid()]
    boxes = torch.tensor([[4.0, 4, 12, 20], [0, 0, 100, 90]])
    index = torch.tensor([0, 1])
    pooled = pyramid_roi_align(pyramid, boxes, index, 3, sized(64.0), CANVAS)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(
        pooled, pyramid_roi_align([p.float() for p in pyramid], boxes, index, 3, sized(64.0), CANVAS)
    )


def crop_and_resize(features: Tensor, box: list[float], size: int) -> Tensor:
    """TensorFlow's operator, sample by sample; (C, H, W) features and a box in shares of H - 1 and W - 1."""
    height, width = features.shape[1:]
    x0, y0, x1, y1 = box
    rows = []
    for i in range(size):
        y = (y0 + (y1 - y0) * i / (size - 1)) * (height - 1)
        for j in range(size):
            x = (x0 + (x1 - x0) * j / (size - 1)) * (width - 1)
            if not (0 <= y <= height - 1 and 0 <= x <= width - 1):
                rows.append(features.new_zeros(features.shape[0]))
                continue
            top, left = math.floor(y), math.floor(x)
            bottom, right = math.ceil(y), math.ceil(x)
            above = features[:, top, left] * (1 - (x - left)) + features[:, top, right] * (x - left)
            below = features[:, bottom, left] * (1 - (x - left)) + features[:, bottom, right] * (x - left)
            rows.append(above * (1 - (y - top)) + below * (y - top))
    return torch.stack(rows, dim=1).reshape(-1, size, size)


def test_crop_and_resize_equals_a_loop_over_its_samples() -> None:
    generator = torch.Generator().manual_seed(2)
    canvas = (128, 96)
    pyramid = [torch.randn(2, 3, canvas[0] // s, canvas[1] // s, generator=generator) for s in STRIDES]
    corners = torch.rand(40, 2, 2, generator=generator) * torch.tensor([110.0, 150.0]) - 10  # some leave the canvas
    boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    boxes[0] = torch.tensor([0.0, 0, 95, 127])  # the whole canvas: the grid's corners on the corner cells
    boxes[1] = torch.tensor([-90.0, -90, -50, -50])  # outside
    image_index = torch.arange(40) % 2
    config = sized(48.0, "crop_and_resize")
    levels = pyramid_levels(boxes, config, canvas).tolist()
    assert set(levels) == {0, 1, 2, 3}
    ours, theirs = [p.clone().requires_grad_() for p in pyramid], [p.clone().requires_grad_() for p in pyramid]
    pooled = pyramid_roi_align(ours, boxes, image_index, 5, config, canvas)
    whole = torch.tensor([95.0, 127.0, 95.0, 127.0])
    expected = torch.stack(
        [
            crop_and_resize(theirs[level][image], (box / whole).tolist(), 5)
            for level, image, box in zip(levels, image_index.tolist(), boxes, strict=True)
        ]
    )
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pooled[0, :, ::4, ::4], pyramid[levels[0]][0][:, [0, -1]][:, :, [0, -1]])
    assert not pooled[1].any()
    partly = (expected == 0).flatten(1).any(dim=1) & (expected != 0).flatten(1).any(dim=1)
    assert partly.sum() > 5  # what lies outside is zero
    weights = torch.randn(pooled.shape, generator=generator)
    torch.autograd.backward((pooled * weights).sum())
    torch.autograd.backward((expected * weights).sum())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("width", "height", "level"),
    [
        (224, 224, 2),
        (316, 316, 2),  # log2(316 / 224) = 0.496: rounded to the nearest, not down
        (318, 318, 3),
        (158, 158, 1),
        (159, 159, 2),
        (448, 112, 2),
        (20, 20, 0),
        (1023, 1023, 3),
        (0, 500, 0),
    ],
)
def test_level_of_the_original_by_hand(width: float, height: float, level: int) -> None:
    # On a canvas of 1024 a side is counted as side / 1023 * 1024.
    box = torch.tensor([[0.0, 0, width, height]])
    found = pyramid_levels(box, sized(224.0, "crop_and_resize"), (1024, 1024))
    torch.testing.assert_close(found, torch.tensor([level]))
    # On a canvas half as high, the same share of its height is half as many pixels.
    half = torch.tensor([[0.0, 0, width, height / 1023 * 511]])
    found = pyramid_levels(half, sized(224.0 / 2**0.5, "crop_and_resize"), (512, 1024))
    torch.testing.assert_close(found, torch.tensor([level]))


@pytest.mark.parametrize("pooling", ["unaligned", "crop_and_resize"])
@pytest.mark.parametrize("boxes", [torch.zeros(0, 4), torch.tensor([[4.0, 4, 12, 12]])])
def test_every_pooling_keeps_every_level_in_the_graph(
    pooling: Literal["unaligned", "crop_and_resize"], boxes: Tensor
) -> None:
    pyramid = [level.requires_grad_() for level in random_pyramid()]
    index = torch.zeros(len(boxes), dtype=torch.int64)
    pooled = pyramid_roi_align(pyramid, boxes, index, 7, sized(64.0, pooling), CANVAS)
    assert pooled.shape == (len(boxes), 3, 7, 7)
    assert pooled.dtype == torch.float32
    torch.autograd.backward(pooled.sum())
    assert all(level.grad is not None and level.grad.isfinite().all() for level in pyramid)
