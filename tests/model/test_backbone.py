from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet

from model.backbone import Backbone
from model.config import BackboneConfig, NormConfig


@pytest.mark.parametrize(("depth", "channels"), [(18, (64, 128, 256, 512)), (50, (256, 512, 1024, 2048))])
def test_strides_and_channels(depth: Literal[18, 50], channels: tuple[int, ...]) -> None:
    backbone = Backbone(BackboneConfig(depth=depth, norm="frozen"), NormConfig())
    assert backbone.out_channels == channels
    features = backbone(torch.zeros(2, 3, 64, 96))
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3)]  # strides 4, 8, 16, 32
    assert [tuple(f.shape) for f in features] == [(2, c, *size) for c, size in zip(channels, sizes, strict=True)]


def test_equals_torchvision() -> None:
    torch.manual_seed(0)
    body = resnet.resnet18(weights=None).eval()
    backbone = Backbone(BackboneConfig(depth=18, norm="batch"), NormConfig()).eval()
    backbone.stem.load_state_dict(nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool).state_dict())
    backbone.stages.load_state_dict(nn.ModuleList([body.layer1, body.layer2, body.layer3, body.layer4]).state_dict())
    x = torch.randn(1, 3, 64, 64)
    c2 = body.layer1(body.maxpool(body.relu(body.bn1(body.conv1(x)))))
    c3 = body.layer2(c2)
    c4 = body.layer3(c3)
    torch.testing.assert_close(backbone(x), [c2, c3, c4, body.layer4(c4)])


def test_the_stride_of_a_bottleneck_sits_in_the_3x3() -> None:
    stages = Backbone(BackboneConfig(depth=50), NormConfig()).stages
    for stage in list(stages)[1:]:
        assert isinstance(stage, nn.Sequential)
        assert stage[0].conv1.stride == (1, 1)
        assert stage[0].conv2.stride == (2, 2)


@pytest.mark.parametrize(("norm", "moves"), [("batch", True), ("frozen", False)])
def test_only_batch_statistics_move_in_training(norm: Literal["batch", "frozen"], moves: bool) -> None:
    backbone = Backbone(BackboneConfig(depth=18, norm=norm), NormConfig()).train()
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers() if name.endswith("running_mean")}
    assert len(before) == 20  # the convolutions of a ResNet-18
    backbone(torch.randn(2, 3, 64, 64))
    after = dict(backbone.named_buffers())
    assert all(torch.equal(after[name], value) is not moves for name, value in before.items())


def test_frozen_norm_has_no_parameters() -> None:
    backbone = Backbone(BackboneConfig(depth=18, norm="frozen"), NormConfig())
    assert len(list(backbone.parameters())) == 20  # the kernels of the convolutions
    assert all(parameter.dim() == 4 for parameter in backbone.parameters())


def randomise(module: nn.Module) -> None:
    """Weights, biases and statistics with which every operation can be told from its neighbours."""
    torch.manual_seed(0)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif name.endswith("num_batches_tracked"):
            continue
        elif tensor.dim() == 1:
            tensor.normal_(0.3, 0.2)


def keras_resnet_50(state: dict[str, Tensor], images: Tensor, epsilon: float) -> list[Tensor]:
    """The original's `resnet_graph`, layer by layer."""

    def norm(x: Tensor, name: str) -> Tensor:
        numbers = [state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        mean, variance, gamma, beta = (values[:, None, None] for values in numbers)
        return (x - mean) / (variance + epsilon).sqrt() * gamma + beta

    def convolve(x: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding)

    x = torch.relu(norm(convolve(images, "stem.0", stride=2, padding=3), "stem.1"))
    x = F.max_pool2d(F.pad(x, (0, 1, 0, 1)), kernel_size=3, stride=2)  # TensorFlow's "same"
    features = []
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            here = f"stages.{stage}.{block}"
            stride = 2 if stage > 0 and block == 0 else 1
            y = torch.relu(norm(convolve(x, f"{here}.conv1", stride), f"{here}.bn1"))
            y = torch.relu(norm(convolve(y, f"{here}.conv2", padding=1), f"{here}.bn2"))
            y = norm(convolve(y, f"{here}.conv3"), f"{here}.bn3")
            if block == 0:
                x = norm(convolve(x, f"{here}.downsample.0", stride), f"{here}.downsample.1")
            x = torch.relu(x + y)
        features.append(x)
    return features


def test_the_keras_variant_is_the_graph_of_the_original() -> None:
    norms = NormConfig(epsilon=1e-3, convolution_bias=True)
    backbone = Backbone(BackboneConfig(depth=50, norm="frozen_statistics", variant="keras"), norms)
    randomise(backbone)
    images = torch.randn(2, 3, 64, 96)
    expected = keras_resnet_50(dict(backbone.state_dict()), images, epsilon=1e-3)
    assert [tuple(f.shape[2:]) for f in expected] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    for training in (False, True):  # the statistics stay in training
        for found, wanted in zip(backbone.train(training)(images), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("has_bias", [False, True])
def test_convolutions_have_a_bias_on_request(has_bias: bool) -> None:
    backbone = Backbone(BackboneConfig(depth=18), NormConfig(convolution_bias=has_bias))
    convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 20
    assert all((convolution.bias is not None) is has_bias for convolution in convolutions)
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 32)
    if has_bias:  # it starts at zero, and learns
        assert not any(c.bias.any() for c in convolutions if c.bias is not None)
        torch.autograd.backward(backbone.eval()(x)[3].square().sum())
        assert all(c.bias.grad is not None and c.bias.grad.any() for c in convolutions if c.bias is not None)


def test_epsilon_reaches_every_norm() -> None:
    backbone = Backbone(BackboneConfig(depth=18), NormConfig(epsilon=0.125))
    assert {module.eps for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)} == {0.125}


def test_group_norms_are_those_of_torchvision_and_see_one_image_at_a_time() -> None:
    backbone = Backbone(BackboneConfig(depth=18, norm="group"), NormConfig()).train()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    body = resnet.resnet18(weights=None, norm_layer=lambda channels: nn.GroupNorm(min(channels // 8, 32), channels))
    body_stages = nn.ModuleList([body.layer1, body.layer2, body.layer3, body.layer4])
    nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool).load_state_dict(backbone.stem.state_dict())
    body_stages.load_state_dict(backbone.stages.state_dict())
    x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
    for stage, features in zip(body_stages, backbone(images), strict=True):
        x = stage(x)
        torch.testing.assert_close(features, x, rtol=1e-5, atol=1e-5)
    for alone, together in zip(backbone(images[:1]), backbone(images), strict=True):
        torch.testing.assert_close(alone, together[:1], rtol=1e-5, atol=1e-5)
