import pytest
import torch
from torch import Tensor, nn

from model.config import NormKind
from model.norm import FrozenNorm, RowBatchNorm, apply_norm, make_norm

CHANNELS = 6


def pair_of_norms() -> tuple[RowBatchNorm, nn.BatchNorm2d]:
    """Ours and the stock layer, with the same weights and statistics."""
    torch.manual_seed(0)
    stock = nn.BatchNorm2d(CHANNELS)
    nn.init.uniform_(stock.weight, 0.5, 2)
    nn.init.uniform_(stock.bias)
    assert stock.running_mean is not None
    assert stock.running_var is not None
    stock.running_mean.normal_()
    stock.running_var.uniform_(0.5, 2)
    ours = RowBatchNorm(CHANNELS)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def assert_same_state(ours: nn.BatchNorm2d, stock: nn.BatchNorm2d) -> None:
    torch.testing.assert_close(ours.running_mean, stock.running_mean)
    torch.testing.assert_close(ours.running_var, stock.running_var)


def test_padded_rows_stay_out_of_output_statistics_and_gradients() -> None:
    ours, stock = pair_of_norms()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, CHANNELS, 3, 3, generator=generator) * 3 + 1
    valid = torch.tensor([True, False, True, True, False, False, True])
    x[~valid] = 1e3  # garbage
    weights = torch.randn(7, CHANNELS, 3, 3, generator=generator)
    padded, compact = x.clone().requires_grad_(), x[valid].clone().requires_grad_()

    y, expected = ours(padded, valid), stock(compact)
    torch.testing.assert_close(y[valid], expected)
    assert_same_state(ours, stock)

    torch.autograd.backward((y * weights)[valid].sum())
    torch.autograd.backward((expected * weights[valid]).sum())
    assert padded.grad is not None
    assert compact.grad is not None
    torch.testing.assert_close(padded.grad[valid], compact.grad)
    torch.testing.assert_close(padded.grad[~valid], torch.zeros_like(padded.grad[~valid]), rtol=0, atol=0)
    torch.testing.assert_close(ours.weight.grad, stock.weight.grad)
    torch.testing.assert_close(ours.bias.grad, stock.bias.grad)


@pytest.mark.parametrize("valid", [None, torch.ones(5, dtype=torch.bool)])
def test_without_padding_it_is_the_stock_layer(valid: Tensor | None) -> None:
    ours, stock = pair_of_norms()
    x = torch.randn(5, CHANNELS, 2, 2)
    torch.testing.assert_close(ours(x, valid), stock(x))
    assert_same_state(ours, stock)
    ours.eval()
    stock.eval()
    torch.testing.assert_close(ours(x, valid), stock(x))
    assert_same_state(ours, stock)


@pytest.mark.parametrize(
    ("rows", "valid"),
    [
        (0, None),  # no regions at all
        (1, None),  # one value a channel: no variance
        (0, torch.zeros(0, dtype=torch.bool)),
        (3, torch.zeros(3, dtype=torch.bool)),
        (3, torch.tensor([False, True, False])),
    ],
)
def test_too_few_rows_are_normalised_by_the_running_statistics(rows: int, valid: Tensor | None) -> None:
    ours, stock = pair_of_norms()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    x = torch.randn(rows, CHANNELS, 1, 1, requires_grad=True)
    y = ours(x, valid)
    torch.testing.assert_close(y, stock.eval()(x))
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)
    torch.autograd.backward(y.sum())
    for parameter in ours.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_one_row_with_many_cells_has_statistics() -> None:
    ours, stock = pair_of_norms()
    x = torch.randn(3, CHANNELS, 4, 4)
    valid = torch.tensor([False, True, False])
    torch.testing.assert_close(ours(x, valid)[valid], stock(x[valid]))
    assert_same_state(ours, stock)


@pytest.mark.parametrize(
    ("kind", "layer"),
    [("batch", RowBatchNorm), ("frozen", FrozenNorm), ("group", nn.GroupNorm), ("none", nn.Identity)],
)
def test_make_norm_by_name(kind: NormKind, layer: type[nn.Module]) -> None:
    norm = make_norm(kind, 48)
    assert type(norm) is layer
    x = torch.randn(3, 48, 2, 2)
    assert apply_norm(norm, x, None).shape == x.shape
    assert apply_norm(norm, x[:0], None).shape == (0, 48, 2, 2)


@pytest.mark.parametrize(("channels", "groups"), [(1024, 32), (256, 32), (48, 2), (32, 4), (16, 2), (8, 1), (7, 1)])
def test_group_norm_fits_any_width(channels: int, groups: int) -> None:
    norm = make_norm("group", channels)
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == groups
    x = torch.randn(1, channels, 1, 1)
    assert norm(x).any()  # one value alone in its group would become zero


def test_apply_norm_hands_the_rows_to_batch_norm() -> None:
    ours, stock = pair_of_norms()
    x = torch.randn(4, CHANNELS, 3, 3)
    valid = torch.tensor([True, True, False, False])
    torch.testing.assert_close(apply_norm(ours, x, valid)[valid], stock(x[valid]))


@pytest.mark.parametrize("kind", ["batch", "frozen", "frozen_statistics"])
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_epsilon_is_added_to_the_stored_variance(kind: NormKind, epsilon: float) -> None:
    norm = make_norm(kind, CHANNELS, epsilon).eval()
    torch.manual_seed(0)
    numbers = {name: torch.rand(CHANNELS) + 0.1 for name in ("running_mean", "running_var", "weight", "bias")}
    norm.load_state_dict(numbers, strict=False)
    x = torch.randn(3, CHANNELS, 2, 2)
    mean, variance, gamma, beta = (values[:, None, None] for values in numbers.values())
    torch.testing.assert_close(norm(x), (x - mean) / (variance + epsilon).sqrt() * gamma + beta)


def test_epsilon_of_group_norm_and_of_batch_statistics() -> None:
    x = torch.randn(2, 8, 3, 3)
    for kind, axes in (("group", (1, 2, 3)), ("batch", (0, 2, 3))):
        mean, variance = x.mean(axes, keepdim=True), x.var(axes, keepdim=True, correction=0)
        norm = make_norm("group" if kind == "group" else "batch", 8, 0.5).train()
        torch.testing.assert_close(norm(x), (x - mean) / (variance + 0.5).sqrt())


@pytest.mark.parametrize("rows", [4, 1, 0])
def test_frozen_statistics_stay_while_scale_and_shift_learn(rows: int) -> None:
    norm = make_norm("frozen_statistics", CHANNELS).train()
    assert {name for name, _ in norm.named_parameters()} == {"weight", "bias"}
    torch.manual_seed(0)
    statistics = {"running_mean": torch.rand(CHANNELS), "running_var": torch.rand(CHANNELS) + 0.5}
    norm.load_state_dict(statistics, strict=False)
    x = torch.randn(rows, CHANNELS, 2, 2)
    y = apply_norm(norm, x, torch.ones(rows, dtype=torch.bool))
    torch.testing.assert_close(y, norm.eval()(x))
    torch.autograd.backward((y * 2).sum())
    normalised = (x - statistics["running_mean"][:, None, None]) / (
        statistics["running_var"][:, None, None] + 1e-5
    ).sqrt()
    torch.testing.assert_close(norm.weight.grad, 2 * normalised.sum(dim=(0, 2, 3)))
    torch.testing.assert_close(norm.bias.grad, torch.full((CHANNELS,), 2.0 * rows * 4))
    for name, value in statistics.items():
        torch.testing.assert_close(norm.state_dict()[name], value, rtol=0, atol=0)
