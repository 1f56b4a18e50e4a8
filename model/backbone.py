"""ResNet that turns an image into C2..C5 (He et al. 2015; torchvision's layers)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet

from model.config import BackboneConfig, NormConfig
from model.norm import convolve, make_norm

_CONSTRUCTORS: dict[int, Callable[..., resnet.ResNet]] = {
    18: resnet.resnet18,
    34: resnet.resnet34,
    50: resnet.resnet50,
    101: resnet.resnet101,
}


class Backbone(nn.Module):
    """Stem and four stages."""

    def __init__(self, config: BackboneConfig, norms: NormConfig) -> None:
        super().__init__()
        norm_layer = partial(make_norm, config.norm, epsilon=norms.epsilon)
        body = _CONSTRUCTORS[config.depth](weights=None, norm_layer=norm_layer)
        if config.variant == "keras":
            _like_keras(body)
        if norms.convolution_bias:
            _add_biases(body)
        self.stem = nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool)
        self.stages = nn.ModuleList([body.layer1, body.layer2, body.layer3, body.layer4])
        width = body.fc.in_features  # channels of C5
        self.out_channels = (width // 8, width // 4, width // 2, width)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W), normalised, H and W multiples of 32, to C2..C5 with strides 4, 8, 16, 32."""
        convolution, norm, _, pooling = self.stem.children()
        x: Tensor = pooling(F.relu_(convolve(cast(nn.Conv2d, convolution), norm, images)))
        features = []
        for stage in self.stages:
            for block in stage.children():
                x = _residual(block, x)
            features.append(x)
        return features


def _residual(block: Any, x: Tensor) -> Tensor:
    """What the forward pass of torchvision's block does, with frozen norms folded."""
    y = F.relu_(convolve(block.conv1, block.bn1, x))
    y = convolve(block.conv2, block.bn2, y)
    if isinstance(block, resnet.Bottleneck):
        y = convolve(block.conv3, block.bn3, F.relu_(y))
    if block.downsample is not None:
        x = convolve(block.downsample[0], block.downsample[1], x)
    return F.relu_(y.add_(x))


def _like_keras(body: resnet.ResNet) -> None:
    """The stride of a bottleneck in its first convolution, and the stem's pooling without padding at the start."""
    body.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)  # TensorFlow's "same" for even sides
    for block in body.modules():
        if isinstance(block, resnet.Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def _add_biases(body: resnet.ResNet) -> None:
    for convolution in body.modules():
        if isinstance(convolution, nn.Conv2d):
            convolution.bias = nn.Parameter(torch.zeros(convolution.out_channels))
