import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from model.anchors import level_anchors, pyramid_anchors
from model.config import AnchorConfig


def test_one_ratio_by_hand() -> None:
    anchors = level_anchors([32], [1.0], (2, 2), stride=(8, 8), anchor_stride=1)
    # Centres at cell index * stride, rows first.
    expected = torch.tensor([[-16.0, -16, 16, 16], [-8, -16, 24, 16], [-16, -8, 16, 24], [-8, -8, 24, 24]])
    torch.testing.assert_close(anchors, expected)


def test_ratio_is_width_over_height() -> None:
    anchors = level_anchors([10], [4.0], (1, 1), stride=(8, 8), anchor_stride=1)
    torch.testing.assert_close(anchors, torch.tensor([[-10.0, -2.5, 10, 2.5]]))  # 20 wide, 5 high


def test_order_is_row_column_ratio_scale() -> None:
    anchors = level_anchors([8, 16], [0.25, 4.0], (2, 3), stride=(4, 4), anchor_stride=1).reshape(2, 3, 2, 2, 4)
    centre = (anchors[..., :2] + anchors[..., 2:]) / 2
    size = anchors[..., 2:] - anchors[..., :2]
    rows, columns = torch.arange(2.0) * 4, torch.arange(3.0) * 4
    torch.testing.assert_close(centre[..., 1], rows[:, None, None, None].expand(2, 3, 2, 2))
    torch.testing.assert_close(centre[..., 0], columns[None, :, None, None].expand(2, 3, 2, 2))
    # ratio 1/4: scale 8 is 4 wide and 16 high, scale 16 is 8 wide and 32 high; ratio 4 is the other way round
    shapes = torch.tensor([[[4.0, 16], [8, 32]], [[16, 4], [32, 8]]])
    torch.testing.assert_close(size, shapes.expand(2, 3, 2, 2, 2))


def test_every_second_cell() -> None:
    every = level_anchors([8], [1.0], (5, 3), stride=(4, 4), anchor_stride=1).reshape(5, 3, 4)
    second = level_anchors([8], [1.0], (5, 3), stride=(4, 4), anchor_stride=2).reshape(3, 2, 4)
    torch.testing.assert_close(second, every[::2, ::2])


def test_area_is_the_square_of_the_scale_for_every_ratio() -> None:
    anchors = level_anchors([32], [0.5, 1.0, 2.0], (1, 1), stride=(4, 4), anchor_stride=1)
    size = anchors[:, 2:] - anchors[:, :2]
    torch.testing.assert_close(size.prod(dim=1), torch.full((3,), 1024.0))
    torch.testing.assert_close(size[:, 0] / size[:, 1], torch.tensor([0.5, 1.0, 2.0]))


def test_pyramid_of_a_512_square_has_65472_anchors() -> None:
    levels = pyramid_anchors(AnchorConfig(), [(128, 128), (64, 64), (32, 32), (16, 16), (8, 8)], (512, 512))
    assert sum(len(level) for level in levels) == 65_472
    assert all(level.shape[1:] == (4,) and level.dtype == torch.float32 for level in levels)


def test_pyramid_is_its_levels() -> None:
    config = AnchorConfig(scales=(8, 16, 32, 64, 128), ratios=(0.5, 1.0, 2.0))
    sizes = [(8, 16), (4, 8), (2, 4), (1, 2), (1, 1)]
    strides = [4, 8, 16, 32, 64]
    levels = [
        level_anchors([scale], config.ratios, size, (stride, stride), 1)
        for scale, size, stride in zip(config.scales, sizes, strides, strict=True)
    ]
    torch.testing.assert_close(pyramid_anchors(config, sizes, (32, 64)), levels)


@pytest.mark.parametrize("canvas", [(800, 1344), (1344, 800), (512, 512), (256, 352), (64, 96)])
def test_rounded_anchors_are_those_of_torchvision(canvas: tuple[int, int]) -> None:
    sizes = [(canvas[0] // stride, canvas[1] // stride) for stride in (4, 8, 16, 32)]
    sizes.append(((sizes[3][0] + 1) // 2, (sizes[3][1] + 1) // 2))  # P6
    config = AnchorConfig(ratios=(2.0, 1.0, 0.5), rounded=True)  # torchvision counts height / width
    generator = AnchorGenerator(tuple((int(scale),) for scale in config.scales), ((0.5, 1.0, 2.0),) * 5)
    features = [torch.zeros(1, 1, *size) for size in sizes]
    expected = generator(ImageList(torch.zeros(1, 3, *canvas), [canvas]), features)[0]
    levels = pyramid_anchors(config, sizes, canvas)
    torch.testing.assert_close(torch.cat(levels), expected, rtol=0, atol=0)
    if canvas == (800, 1344):  # 13 rows of P6 on 800 pixels
        centres = (levels[4][:, 1] + levels[4][:, 3]) / 2
        assert sorted({int(y) for y in centres.tolist()})[:3] == [0, 61, 122]
