import pytest
import torch
from torch import nn

from model.config import MaskHeadConfig, NormConfig, NormKind
from model.mask_head import MaskHead


def make_head(norm: NormKind = "none") -> MaskHead:
    torch.manual_seed(0)
    return MaskHead(4, 3, MaskHeadConfig(channels=8, num_convolutions=2, norm=norm), NormConfig())


def test_a_mask_has_twice_the_side_of_the_grid() -> None:
    assert make_head()(torch.randn(5, 4, 14, 14), torch.zeros(5, dtype=torch.int64)).shape == (5, 28, 28)
    assert make_head()(torch.randn(5, 4, 6, 6), torch.zeros(5, dtype=torch.int64)).shape == (5, 12, 12)


def test_each_region_gets_the_mask_of_its_class() -> None:
    head = make_head()
    nn.init.zeros_(head.mask_logits.weight)
    assert head.mask_logits.bias is not None
    with torch.no_grad():
        head.mask_logits.bias.copy_(torch.tensor([5.0, 6, 7]))
    masks = head(torch.randn(4, 4, 3, 3), torch.tensor([2, 0, 1, 2]))
    torch.testing.assert_close(masks, torch.tensor([7.0, 5, 6, 7])[:, None, None].expand(4, 6, 6))


def test_only_the_class_of_a_region_is_trained() -> None:
    head = make_head()
    torch.autograd.backward(head(torch.randn(2, 4, 3, 3), torch.tensor([1, 1])).sum())
    gradient = head.mask_logits.weight.grad
    assert gradient is not None
    assert gradient.flatten(1).any(dim=1).tolist() == [False, True, False]


def test_rows_and_columns_keep_their_place() -> None:
    # 1x1 kernels in the middle, ones in the transposed convolution: the mask is the grid with every cell doubled.
    head = MaskHead(1, 2, MaskHeadConfig(channels=1, num_convolutions=1, norm="none"), NormConfig())
    with torch.no_grad():
        for layer in (*head.convolutions, head.mask_logits):
            assert isinstance(layer, nn.Conv2d)
            side = layer.kernel_size[0] // 2
            layer.weight.zero_()
            layer.weight[:, :, side, side] = 1
        head.upsampling.weight.fill_(1)
    grid = torch.arange(12.0).reshape(1, 1, 3, 4)
    expected = grid[0].repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    torch.testing.assert_close(head(grid, torch.tensor([1])), expected)


@pytest.mark.parametrize("norm", ["none", "group", "frozen"])
def test_alone_equals_batched(norm: NormKind) -> None:
    head = make_head(norm)
    regions, classes = torch.randn(3, 4, 5, 5), torch.tensor([1, 2, 0])
    together = head(regions, classes)
    for row in range(3):
        torch.testing.assert_close(head(regions[row : row + 1], classes[row : row + 1]), together[row : row + 1])


@pytest.mark.parametrize("norm", ["none", "group", "frozen", "batch"])
def test_no_regions_still_give_every_parameter_a_gradient(norm: NormKind) -> None:
    head = make_head(norm).train()
    masks = head(torch.zeros(0, 4, 14, 14), torch.zeros(0, dtype=torch.int64))
    assert masks.shape == (0, 28, 28)
    torch.autograd.backward(masks.sum())
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_padded_rows_stay_out_of_the_statistics() -> None:
    padded, compact = make_head("batch").train(), make_head("batch").train()
    regions, classes = torch.randn(5, 4, 5, 5), torch.tensor([1, 2, 0, 1, 1])
    valid = torch.tensor([True, False, False, True, True])
    masks = padded(regions, classes, valid)
    torch.testing.assert_close(masks[valid], compact(regions[valid], classes[valid]))
    statistics = {n: b for n, b in padded.named_buffers() if "running" in n}
    assert len(statistics) == 4
    torch.testing.assert_close(statistics, {n: b for n, b in compact.named_buffers() if "running" in n})
