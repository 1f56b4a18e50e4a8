from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.box_head import BoxHead
from model.config import BoxHeadConfig, NormConfig, NormKind
from model.norm import RowBatchNorm


def make_head(norm: NormKind, channels: int = 16) -> BoxHead:
    torch.manual_seed(0)
    return BoxHead(4, 3, BoxHeadConfig(channels=channels, norm=norm), NormConfig())


def test_equals_the_convolutions_it_is_described_by() -> None:
    head = make_head("none")
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.1)
    regions = torch.randn(5, 4, 7, 7)
    first, second = head.convolutions
    hidden = torch.relu(second(torch.relu(first(regions))))
    assert hidden.shape == (5, 16, 1, 1)
    hidden = hidden[:, :, 0, 0]
    logits, deltas = head(regions)
    torch.testing.assert_close(logits, head.class_logits(hidden))
    torch.testing.assert_close(deltas.flatten(1), head.box_deltas(hidden))
    assert deltas.shape == (5, 3, 4)


def test_deltas_of_a_class_lie_together() -> None:
    head = make_head("none")
    nn.init.zeros_(head.box_deltas.weight)
    with torch.no_grad():
        head.box_deltas.bias.copy_(torch.arange(12.0))
    _, deltas = head(torch.randn(2, 4, 7, 7))
    torch.testing.assert_close(deltas, torch.arange(12.0).reshape(3, 4).expand(2, 3, 4))


@pytest.mark.parametrize("norm", ["none", "group", "frozen"])
def test_alone_equals_batched(norm: NormKind) -> None:
    head = make_head(norm)
    regions = torch.randn(3, 4, 7, 7)
    together = head(regions)
    for row in range(3):
        torch.testing.assert_close(
            head(regions[row : row + 1]), (together[0][row : row + 1], together[1][row : row + 1])
        )


@pytest.mark.parametrize("norm", ["none", "group", "frozen", "batch"])
def test_no_regions_still_give_every_parameter_a_gradient(norm: NormKind) -> None:
    head = make_head(norm).train()
    logits, deltas = head(torch.zeros(0, 4, 7, 7))
    assert logits.shape == (0, 3)
    assert deltas.shape == (0, 3, 4)
    torch.autograd.backward(logits.sum() + deltas.sum())
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_padded_rows_stay_out_of_the_statistics() -> None:
    padded, compact = make_head("batch").train(), make_head("batch").train()
    regions = torch.randn(6, 4, 7, 7)
    valid = torch.tensor([True, False, True, True, False, True])
    logits, deltas = padded(regions, valid)
    expected = compact(regions[valid])
    torch.testing.assert_close((logits[valid], deltas[valid]), expected)
    assert len(padded.norms) == 2
    for a, b in zip(padded.norms, compact.norms, strict=True):
        assert isinstance(a, RowBatchNorm)
        assert isinstance(b, RowBatchNorm)
        torch.testing.assert_close(a.running_mean, b.running_mean)
        torch.testing.assert_close(a.running_var, b.running_var)
        assert a.running_mean is not None
        assert a.running_mean.any()


Kind = Literal["conv7x7", "fc2", "conv4fc1"]


def head_of(kind: Kind, norm: NormKind = "none", has_bias: bool = False, pool_size: int = 7) -> BoxHead:
    torch.manual_seed(0)
    config = BoxHeadConfig(kind=kind, channels=16, convolution_channels=8, norm=norm, pool_size=pool_size)
    head = BoxHead(4, 3, config, NormConfig(epsilon=0.25, convolution_bias=has_bias))
    for tensor in head.state_dict().values():
        if tensor.dim() > 0:
            tensor.normal_(std=0.2) if tensor.dim() > 1 else tensor.uniform_(0.5, 1.5)
    return head


def test_two_fully_connected_layers() -> None:
    head = head_of("fc2")
    regions = torch.randn(5, 4, 7, 7)
    first, second = head.fully_connected
    assert first.weight.shape == (16, 4 * 7 * 7)
    assert second.weight.shape == (16, 16)
    hidden = torch.relu(second(torch.relu(first(regions.permute(0, 2, 3, 1).flatten(1)))))
    logits, deltas = head(regions)
    torch.testing.assert_close(logits, head.class_logits(hidden))
    torch.testing.assert_close(deltas.flatten(1), head.box_deltas(hidden))
    assert {name.split(".")[0] for name, _ in head.named_parameters()} == {
        "fully_connected",
        "class_logits",
        "box_deltas",
    }


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("pool_size", [7, 3])  # with 3, a kernel is as large as the region, but not 'valid'
def test_four_convolutions_and_a_fully_connected_layer(norm: NormKind, pool_size: int) -> None:
    head = head_of("conv4fc1", norm, pool_size=pool_size).eval()
    x = regions = torch.randn(5, 4, pool_size, pool_size)
    assert len(head.convolutions) == len(head.norms) == 4
    for convolution, layer in zip(head.convolutions, head.norms, strict=True):
        assert isinstance(convolution, nn.Conv2d)
        assert convolution.weight.shape[2:] == (3, 3)
        x = F.conv2d(x, convolution.weight, convolution.bias, padding=1)
        if norm == "batch":
            assert layer.eps == 0.25
            x = layer(x)
        x = torch.relu(x)
    assert x.shape == (5, 8, pool_size, pool_size)
    (linear,) = head.fully_connected
    hidden = torch.relu(linear(x.permute(0, 2, 3, 1).flatten(1)))
    logits, deltas = head(regions)
    torch.testing.assert_close(logits, head.class_logits(hidden))
    torch.testing.assert_close(deltas.flatten(1), head.box_deltas(hidden))


@pytest.mark.parametrize("kind", ["conv7x7", "conv4fc1"])
@pytest.mark.parametrize(("norm", "has_bias"), [("batch", False), ("batch", True), ("none", False)])
def test_a_convolution_has_a_bias_without_norm_or_on_request(kind: Kind, norm: NormKind, has_bias: bool) -> None:
    head = head_of(kind, norm, has_bias)
    assert len(head.convolutions) == {"conv7x7": 2, "conv4fc1": 4}[kind]
    for convolution in head.convolutions:
        assert isinstance(convolution, nn.Conv2d)
        assert (convolution.bias is not None) is (norm == "none" or has_bias)
    regions = torch.randn(2, 4, 7, 7)
    if has_bias and kind == "conv7x7":  # as one matrix product, too
        first = head.convolutions[0]
        assert isinstance(first, nn.Conv2d)
        hidden = torch.relu(head.norms[0].eval()(F.conv2d(regions, first.weight, first.bias)))
        second = head.convolutions[1]
        hidden = torch.relu(head.norms[1].eval()(second(hidden))).flatten(1)
        torch.testing.assert_close(head.eval()(regions)[0], head.class_logits(hidden))


@pytest.mark.parametrize("kind", ["fc2", "conv4fc1"])
@pytest.mark.parametrize("norm", ["none", "batch", "frozen_statistics"])
def test_no_regions_in_a_head_of_any_kind(kind: Kind, norm: NormKind) -> None:
    head = head_of(kind, norm).train()
    logits, deltas = head(torch.zeros(0, 4, 7, 7), torch.zeros(0, dtype=torch.bool))
    assert logits.shape == (0, 3)
    assert deltas.shape == (0, 3, 4)
    torch.autograd.backward(logits.sum() + deltas.sum())
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
