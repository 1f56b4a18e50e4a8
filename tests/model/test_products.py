"""Fully connected layers and 1 x 1 convolutions by another route: the same numbers as torch's own."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import products
from model.config import BackboneConfig
from model.mask_rcnn import MaskRCNN
from tests.model.factories import Thing, ellipse, make_batch, painted_scene, rectangle, tiny_config


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
    ("rows", "otherwise"),
    [
        ((0,), False),  # no region
        ((511,), False),  # too few
        ((512,), True),
        ((521,), True),  # nine are left over
        ((4, 256), True),
        ((3, 5, 40), True),
    ],
)
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_fully_connected_layer_is_the_usual_one(
    rows: tuple[int, ...], otherwise: bool, has_bias: bool, convolutions: mock.Mock
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
    assert batch_sizes(convolutions) == ([16] if otherwise else [])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


def test_each_row_is_multiplied_alone() -> None:
    # By hand: row r is r times (1, 2), so that rows which were mixed up would show.
    x = torch.arange(515.0)[:, None] * torch.tensor([1.0, 2.0])
    weight = torch.tensor([[1.0, 1.0], [0.0, 1.0], [2.0, 0.0]])
    expected = torch.arange(515.0)[:, None] * torch.tensor([3.0, 2.0, 2.0]) + torch.tensor([0.5, 0.0, 1.0])
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


@pytest.mark.parametrize(("images", "threads"), [(17, 1), (2, 2)])
def test_a_convolution_that_goes_to_onednn_anyway_is_left_alone(
    images: int, threads: int, convolutions: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    layer = nn.Conv2d(8, 12, 1)
    x = torch.randn(images, 8, 16, 32).contiguous(memory_format=torch.channels_last)
    assert torch.equal(products.convolve(layer, x), layer(x))
    assert batch_sizes(convolutions) == [images] * 2


def test_autograd_takes_results_for_no_views() -> None:
    """ReLU in place would copy the gradient of a view."""
    x, weight = torch.randn(512, 8), torch.randn(4, 8, requires_grad=True)
    y = products.linear(x, weight)
    assert not y._is_view()
    before = y.detach().clone()
    assert torch.equal(F.relu_(y), before.clamp(min=0))


def test_gradients_of_a_convolution_lie_in_memory_as_its_weight_does() -> None:
    """Data-parallel training copies those that do not."""
    layer = nn.Conv2d(8, 12, 1).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 16, 32).contiguous(memory_format=torch.channels_last)
    products.convolve(layer, x).sum().backward()  # type: ignore[no-untyped-call]
    assert layer.weight.grad is not None
    assert layer.weight.grad.stride() == layer.weight.stride()


def test_rows_need_not_lie_one_after_the_other() -> None:
    weight = torch.randn(4, 8)
    for x in (torch.randn(8, 600).t(), torch.randn(600, 16)[:, ::2], torch.randn(1, 8).expand(600, 8)):
        torch.testing.assert_close(products.linear(x, weight), F.linear(x, weight))


def test_without_onednn_the_usual_route_is_taken(convolutions: mock.Mock) -> None:
    x, weight = torch.randn(512, 8), torch.randn(4, 8)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(products.linear(x, weight), F.linear(x, weight))
    assert batch_sizes(convolutions) == []


def test_a_model_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of it takes the route, with losses and gradients as on the usual one."""
    monkeypatch.setattr(products, "FEWEST_ROWS", 16)
    taken = mock.Mock(wraps=products._product)
    monkeypatch.setattr(products, "_product", taken)
    torch.manual_seed(0)
    model = MaskRCNN(tiny_config(backbone=BackboneConfig(depth=50, norm="batch")), 3)
    model.to(memory_format=torch.channels_last).eval()
    model.training = True  # losses, with the norms' stored statistics
    things = [Thing(rectangle((4, 6, 30, 40), 64, 64), 1), Thing(ellipse((34, 20, 62, 60), 64, 64), 2)]
    batch = make_batch([painted_scene(things, key=key) for key in (3, 4)])

    def learn() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        losses = torch.stack([value for _, value in sorted(model(batch).items())])
        losses.sum().backward()  # type: ignore[no-untyped-call]
        return losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with products.usual_route():
        expected_losses, expected_gradients = learn()
    assert not taken.called
    losses, gradients = learn()
    shapes = {tuple(call.args[1].shape[:2]) for call in taken.call_args_list}
    block = list(model.backbone.stages[0].children())[1]
    box, mask = model.box_head, model.mask_head
    assert shapes >= {tuple(layer.weight.shape[:2]) for layer in (block.conv1, block.conv3, *model.fpn.laterals[:3])}
    assert shapes >= {tuple(layer.weight.shape) for layer in (*box.fully_connected, box.class_logits, box.box_deltas)}
    assert shapes >= {(4 * mask.upsampling.out_channels, mask.upsampling.in_channels), (16, 9 * 16)}
    torch.testing.assert_close(losses, expected_losses, atol=1e-4, rtol=1e-4)
    for name, gradient in expected_gradients.items():
        difference = float((gradients[name] - gradient).norm())
        assert difference <= 2e-2 * max(float(gradient.norm()), 1e-3), name  # ReLU hangs on rounding


def test_other_types_and_autocast_take_the_usual_route(convolutions: mock.Mock) -> None:
    x, weight = torch.randn(512, 8), torch.randn(4, 8)
    assert torch.equal(products.linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    with torch.autocast("cpu", torch.bfloat16):
        found = products.linear(x, weight)
    assert found.dtype == torch.bfloat16
    assert batch_sizes(convolutions) == []


def test_the_other_route_is_avoided_while_a_program_is_compared(convolutions: mock.Mock) -> None:
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
