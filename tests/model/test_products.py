"""Fully connected layers and 1 x 1 convolutions by another route: the same numbers as torch's own."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import products


@pytest.fixture(autouse=True)
def as_on_a_slow_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """The calls of `F.conv2d`."""
    watched = mock.Mock(wraps=F.conv2d)
    monkeypatch.setattr(F, "conv2d", watched)
    return watched


def batch_sizes(convolutions: mock.Mock) -> list[int]:
    return [call.args[0].shape[0] for call in convolutions.call_args_list]


@pytest.mark.parametrize(
    ("rows", "images"),
    [
        ((0,), None),  # no region
        ((511,), None),  # too few
        ((512,), 16),
        ((1000,), 20),
        ((521,), None),  # a prime
        ((4, 256), 16),
        ((1088,), 16),
    ],
)
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_fully_connected_layer_is_the_usual_one(
    rows: tuple[int, ...], images: int | None, has_bias: bool, convolutions: mock.Mock
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, 24, generator=generator)
    weight = torch.randn(40, 24, generator=generator)
    bias = torch.randn(40, generator=generator) if has_bias else None
    upstream = torch.randn(*rows, 40, generator=generator)

    def with_gradients(layer: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
        y = layer(*leaves)
        y.backward(upstream)  # type: ignore[no-untyped-call]
        return [y.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None]]

    expected, found = with_gradients(F.linear), with_gradients(products.linear)
    assert batch_sizes(convolutions) == ([] if images is None else [images])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


def test_each_row_is_multiplied_alone() -> None:
    # By hand: row r is r times (1, 2), so that rows which were mixed up would show.
    x = torch.arange(512.0)[:, None] * torch.tensor([1.0, 2.0])
    weight = torch.tensor([[1.0, 1.0], [0.0, 1.0], [2.0, 0.0]])
    expected = torch.arange(512.0)[:, None] * torch.tensor([3.0, 2.0, 2.0]) + torch.tensor([0.5, 0.0, 1.0])
    assert torch.equal(products.linear(x, weight, torch.tensor([0.5, 0.0, 1.0])), expected)


@pytest.mark.parametrize(
    ("options", "by_rows"),
    [
        ({}, True),
        ({"bias": False}, True),
        ({"stride": 2}, False),
        ({"padding": 1}, False),
        ({"groups": 4}, False),
        ({"kernel_size": 3, "padding": 1}, False),
    ],
)
@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
def test_a_convolution_is_the_usual_one(
    options: dict[str, int], by_rows: bool, form: torch.memory_format, convolutions: mock.Mock
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, **({"kernel_size": 1} | options))  # type: ignore[arg-type]
    x = torch.randn(2, 8, 16, 32).contiguous(memory_format=form)
    inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    expected = layer(inputs[0])
    expected.square().sum().backward()
    expected_weight, layer.weight.grad = layer.weight.grad, None
    convolutions.reset_mock()
    found = products.convolve(layer, inputs[1])
    assert batch_sizes(convolutions) == ([16] if by_rows and form is torch.channels_last else [2])
    assert found.is_contiguous(memory_format=form)
    found.square().sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(layer.weight.grad, expected_weight, atol=1e-3, rtol=1e-5)


def test_other_types_and_autocast_take_the_usual_route(convolutions: mock.Mock) -> None:
    x, weight = torch.randn(512, 8), torch.randn(4, 8)
    assert torch.equal(products.linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    with torch.autocast("cpu", torch.bfloat16):
        found = products.linear(x, weight)
    assert found.dtype == torch.bfloat16
    assert batch_sizes(convolutions) == []


def test_the_other_route_is_left_while_a_program_is_compared(convolutions: mock.Mock) -> None:
    x, weight = torch.randn(512, 8), torch.randn(4, 8)
    with products.usual_route():
        assert torch.equal(products.linear(x, weight), F.linear(x, weight))
    assert batch_sizes(convolutions) == []
    products.linear(x, weight)
    assert batch_sizes(convolutions) == [16]


def test_exported_programs_have_the_usual_layers() -> None:
    program = torch.export.export(products.Linear(8, 4), (torch.randn(512, 8),))
    targets = {str(node.target) for node in program.graph.nodes}
    assert any("linear" in target for target in targets)
    assert not any("conv" in target for target in targets)


@pytest.mark.parametrize(
    ("text", "slow"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n", True),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\n", False),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", False),  # not told, as on ARM
        (None, False),  # not Linux
    ],
)
def test_processors_are_told_apart(
    text: str | None, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the fixture's
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    assert products.mkl_is_slow(path) is (slow and torch._C.has_mkl)
