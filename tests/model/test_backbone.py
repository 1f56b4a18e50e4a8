from typing import Literal

import pytest
import torch
from torch import nn
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
