import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from model.config import RoiConfig
from model.roi_align import pyramid_levels, pyramid_roi_align
from model.weighted_cells import has_sparse_product

STRIDES = (4, 8, 16, 32)
CANVAS = (128, 128)


def sized(canonical_size: float) -> RoiConfig:
    return RoiConfig(canonical_size=canonical_size)


@pytest.fixture(params=["product with a sparse matrix", "torchvision's operator"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms have to do the same."""
    if request.param == "torchvision's operator":
        monkeypatch.setattr("model.roi_align.has_sparse_product", lambda _: False)
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


def test_gradients_equal_those_of_torchvision() -> None:
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(30, 2, 2, generator=generator) * 150 - 10  # some leave the canvas
    boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    boxes[:2] = torch.tensor([0.0, 0, 128, 128])
    image_index = torch.arange(30) % 2
    ours = [level.requires_grad_() for level in random_pyramid()]
    theirs = [level.requires_grad_() for level in random_pyramid()]
    pooled = pyramid_roi_align(ours, boxes, image_index, 4, sized(64.0), CANVAS)
    levels = pyramid_levels(boxes, sized(64.0), CANVAS)
    assert set(levels.tolist()) == {0, 1, 2, 3}
    expected = torch.cat(
        [
            roi_align(theirs[level], torch.cat([image[None], box])[None], 4, 1 / STRIDES[level], 2, aligned=True)
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


def test_half_precision_features_come_out_in_float32() -> None:
    pyramid = [level.bfloat16() for level in random_pyramid()]
    boxes = torch.tensor([[4.0, 4, 12, 20], [0, 0, 100, 90]])
    index = torch.tensor([0, 1])
    pooled = pyramid_roi_align(pyramid, boxes, index, 3, sized(64.0), CANVAS)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(
        pooled, pyramid_roi_align([p.float() for p in pyramid], boxes, index, 3, sized(64.0), CANVAS)
    )
