import pytest
import torch
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
