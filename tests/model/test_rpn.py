from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.anchors import level_anchors, pyramid_anchors
from model.cell_matrix import CellMatrix
from model.config import AnchorConfig, RpnConfig
from model.losses import rpn_class_loss
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


def test_one_logit_an_anchor_is_objectness_against_a_background_of_zero() -> None:
    torch.manual_seed(0)
    rpn = RegionProposalNetwork(4, RpnConfig(channels=8, objectness="sigmoid"), 3, 1)
    nn.init.normal_(rpn.class_logits.weight)
    pyramid = [torch.randn(2, 4, *size) for size in SIZES]
    logits, deltas = rpn(pyramid)
    assert rpn.class_logits.out_channels == 3
    assert deltas.shape == (2, logits.shape[1], 4)
    one = torch.cat(
        [rpn.class_logits(torch.relu(rpn.shared[0](level))).permute(0, 2, 3, 1).reshape(2, -1) for level in pyramid],
        dim=1,
    )
    torch.testing.assert_close(logits, torch.stack([torch.zeros_like(one), one], dim=2))
    torch.testing.assert_close(logits.softmax(dim=2)[..., 1], one.sigmoid())

    # The loss and its gradient are those of binary cross entropy.
    positive = torch.rand(one.shape) < 0.3
    loss = rpn_class_loss(logits, positive, torch.ones_like(positive), "batch")
    expected = F.binary_cross_entropy_with_logits(one, positive.float())
    torch.testing.assert_close(loss, expected)
    weight = rpn.class_logits.weight
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], torch.autograd.grad(expected, weight)[0])


def test_two_convolutions_one_after_the_other() -> None:
    torch.manual_seed(0)
    rpn = RegionProposalNetwork(4, RpnConfig(channels=8, num_convolutions=2), 3, 2)
    for layer in rpn.shared:
        assert isinstance(layer, nn.Conv2d)
        nn.init.normal_(layer.weight)
    feature = torch.randn(1, 4, 7, 9)
    first, second = rpn.shared
    hidden = torch.relu(second(torch.relu(first(feature))))
    assert hidden.shape == (1, 8, 4, 5)  # the stride of the anchors once
    logits, deltas = rpn([feature])
    torch.testing.assert_close(logits, rpn.class_logits(hidden).permute(0, 2, 3, 1).reshape(1, -1, 2))
    torch.testing.assert_close(deltas, rpn.box_deltas(hidden).permute(0, 2, 3, 1).reshape(1, -1, 4))


@pytest.mark.parametrize("anchor_stride", [1, 2])
@pytest.mark.parametrize("objectness", ["softmax", "sigmoid"])
def test_some_anchors_are_the_same_rows_with_the_same_gradient(
    anchor_stride: int, objectness: Literal["softmax", "sigmoid"]
) -> None:
    torch.manual_seed(0)
    rpn = RegionProposalNetwork(4, RpnConfig(channels=8, objectness=objectness), 3, anchor_stride).double()
    for parameter in rpn.parameters():
        nn.init.normal_(parameter)
    pyramid = [torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True) for size in SIZES]
    logits, deltas = rpn(pyramid)
    # Every anchor once, in another order for each image: corners, borders and the inside of every level, one cell too.
    index = torch.stack([torch.randperm(logits.shape[1]) for _ in range(2)])
    expected = (
        logits.gather(1, index[..., None].expand(-1, -1, 2)),
        deltas.gather(1, index[..., None].expand(-1, -1, 4)),
    )
    found = rpn.at_anchors(matrix_of(pyramid), index)
    torch.testing.assert_close(found, expected)

    leaves = [*pyramid, *rpn.parameters()]
    shares = torch.randn(logits.shape, dtype=torch.float64), torch.randn(deltas.shape, dtype=torch.float64)
    gradients = [
        torch.autograd.grad(sum((part * share).sum() for part, share in zip(parts, shares, strict=True)), leaves)
        for parts in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_anchors_are_sampled_where_that_leaves_most_cells_out() -> None:
    matrix = matrix_of([torch.zeros(2, 4, *size) for size in SIZES])  # 129 cells an image
    one, two = (RegionProposalNetwork(4, RpnConfig(channels=8, num_convolutions=number), 3, 1) for number in (1, 2))
    assert one.can_sample(matrix, torch.zeros(2, 64, dtype=torch.int64))
    assert not one.can_sample(matrix, torch.zeros(2, 65, dtype=torch.int64))
    assert not two.can_sample(matrix, torch.zeros(2, 1, dtype=torch.int64))
    wide = RegionProposalNetwork(4, RpnConfig(channels=8), 3, anchor_stride=2)  # 4 * 6 + 2 * 3 + 1 * 2 + 1 + 1 = 34
    assert wide.can_sample(matrix, torch.zeros(2, 17, dtype=torch.int64))
    assert not wide.can_sample(matrix, torch.zeros(2, 18, dtype=torch.int64))


def matrix_of(pyramid: list[Tensor]) -> CellMatrix:
    """In the type of the pyramid, where `cell_matrix` gives float32."""
    cells = [level.permute(0, 2, 3, 1).reshape(-1, level.shape[1]) for level in pyramid]
    return CellMatrix(torch.cat(cells), len(pyramid[0]), tuple((level.shape[2], level.shape[3]) for level in pyramid))
