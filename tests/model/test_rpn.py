import torch
from torch import nn

from model.anchors import level_anchors, pyramid_anchors
from model.config import AnchorConfig, RpnConfig
from model.rpn import RegionProposalNetwork

CONFIG = AnchorConfig(scales=(8, 16, 32, 64, 128), ratios=(0.5, 1.0, 2.0))
SIZES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]


def transparent_rpn(anchor_stride: int = 1) -> RegionProposalNetwork:
    """One channel; the logits and deltas of an anchor repeat the feature under it."""
    rpn = RegionProposalNetwork(1, RpnConfig(channels=1), 3, anchor_stride)
    with torch.no_grad():
        for layer in (*rpn.shared, rpn.class_logits, rpn.box_deltas):
            assert isinstance(layer, nn.Conv2d)
            layer.weight.zero_()
            side = layer.kernel_size[0] // 2
            layer.weight[:, :, side, side] = 1.0
    return rpn


def test_row_of_the_output_is_the_row_of_the_anchor() -> None:
    anchors = torch.cat(pyramid_anchors(CONFIG, SIZES, (32, 48)))
    rpn = transparent_rpn()
    visited = 0
    for level, (height, width) in enumerate(SIZES):
        for row, column in {(0, 0), (height - 1, 0), (0, width - 1), (height - 1, width // 2)}:
            pyramid = [torch.zeros(1, 1, *size) for size in SIZES]
            pyramid[level][0, 0, row, column] = 1.0
            logits, deltas = rpn(pyramid)
            hit = torch.nonzero(logits[0, :, 1]).flatten()
            assert len(hit) == 3
            torch.testing.assert_close(deltas[0, :, 0] > 0, logits[0, :, 1] > 0)
            stride = 4.0 * 2**level
            centre = (anchors[hit, :2] + anchors[hit, 2:]) / 2
            torch.testing.assert_close(centre, torch.tensor([[column * stride, row * stride]]).expand(3, 2))
            size = anchors[hit, 2:] - anchors[hit, :2]
            torch.testing.assert_close(size.prod(dim=1), torch.full((3,), CONFIG.scales[level] ** 2))
            visited += 1
    assert visited >= 13


def test_numbers_of_an_anchor_lie_together() -> None:
    rpn = transparent_rpn()
    with torch.no_grad():
        assert rpn.class_logits.bias is not None
        assert rpn.box_deltas.bias is not None
        rpn.class_logits.bias.copy_(torch.arange(6.0))
        rpn.box_deltas.bias.copy_(torch.arange(12.0))
    logits, deltas = rpn([torch.zeros(2, 1, *size) for size in SIZES])
    cells = sum(h * w for h, w in SIZES)
    assert logits.shape == (2, 3 * cells, 2)
    torch.testing.assert_close(logits, torch.arange(6.0).reshape(3, 2).repeat(2, cells, 1))
    torch.testing.assert_close(deltas, torch.arange(12.0).reshape(3, 4).repeat(2, cells, 1))


def test_anchor_stride_gives_as_many_outputs_as_anchors() -> None:
    rpn = transparent_rpn(anchor_stride=2)
    for size in [(5, 7), (4, 6), (1, 1)]:
        feature = torch.arange(1.0, size[0] * size[1] + 1).reshape(1, 1, *size)
        logits, _ = rpn([feature])
        anchors = level_anchors([8], CONFIG.ratios, size, stride=(4, 4), anchor_stride=2)
        assert logits.shape[1] == len(anchors)
        centre = ((anchors[:, :2] + anchors[:, 2:]) / 2 / 4).round().long()
        torch.testing.assert_close(logits[0, :, 1], feature[0, 0, centre[:, 1], centre[:, 0]])


def test_alone_equals_batched() -> None:
    torch.manual_seed(0)
    rpn = RegionProposalNetwork(4, RpnConfig(channels=8), 3, 1)
    layers = [*rpn.shared, rpn.class_logits, rpn.box_deltas]
    assert all(isinstance(layer, nn.Conv2d) for layer in layers)
    assert {id(p) for layer in layers for p in layer.parameters()} == {id(p) for p in rpn.parameters()}  # no norm
    pyramid = [torch.randn(2, 4, *size) for size in SIZES]
    logits, deltas = rpn(pyramid)
    for image in range(2):
        alone = rpn([level[image : image + 1] for level in pyramid])
        torch.testing.assert_close((logits[image : image + 1], deltas[image : image + 1]), alone)
