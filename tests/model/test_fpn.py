import torch
import torch.nn.functional as F
from torch import nn

from model.config import FpnConfig, NormConfig
from model.fpn import FeaturePyramid


def transparent_pyramid() -> FeaturePyramid:
    """One channel in and out, 1x1 and 3x3 convolutions that change nothing."""
    fpn = FeaturePyramid([1, 1, 1, 1], FpnConfig(channels=1), NormConfig())
    with torch.no_grad():
        for module in fpn.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.zero_()
                side = module.kernel_size[0] // 2
                module.weight[0, 0, side, side] = 1.0
    return fpn


def test_top_down_sum_by_hand() -> None:
    features = [torch.randn(2, 1, side, 2 * side) for side in (16, 8, 4, 2)]
    pyramid = transparent_pyramid()(features)

    def double(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    p5 = features[3]
    p4 = features[2] + double(p5)
    p3 = features[1] + double(p4)
    p2 = features[0] + double(p3)
    torch.testing.assert_close(pyramid, [p2, p3, p4, p5, p5[:, :, ::2, ::2]])


def test_the_3x3_convolution_is_outside_of_the_top_down_path() -> None:
    fpn = transparent_pyramid()
    features = [torch.randn(1, 1, side, side) for side in (16, 8, 4, 2)]
    before = fpn(features)
    smoothing = fpn.smoothing[3]
    assert isinstance(smoothing, nn.Conv2d)
    nn.init.zeros_(smoothing.weight)
    after = fpn(features)
    torch.testing.assert_close(after[:3], before[:3])
    torch.testing.assert_close(after[3], torch.zeros_like(before[3]))
    torch.testing.assert_close(after[4], torch.zeros_like(before[4]))


def test_p6_of_an_odd_p5() -> None:
    features = [torch.randn(1, 1, 3 * side, 5 * side) for side in (8, 4, 2, 1)]
    pyramid = transparent_pyramid()(features)
    assert pyramid[4].shape[2:] == (2, 3)
    torch.testing.assert_close(pyramid[4], pyramid[3][:, :, ::2, ::2])


def test_channels_of_every_level() -> None:
    fpn = FeaturePyramid([4, 8, 16, 32], FpnConfig(channels=12), NormConfig())
    pyramid = fpn([torch.randn(2, c, s, s) for c, s in ((4, 16), (8, 8), (16, 4), (32, 2))])
    assert [tuple(p.shape) for p in pyramid] == [(2, 12, s, s) for s in (16, 8, 4, 2, 1)]
    # The bias of the laterals is zero at the start, so silence stays silence.
    assert all(not p.any() for p in fpn([torch.zeros(1, c, s, s) for c, s in ((4, 16), (8, 8), (16, 4), (32, 2))]))
    assert F.relu(pyramid[0]).any()
