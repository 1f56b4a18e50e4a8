import torch

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
