"""ResNet that turns an image into C2..C5 (He et al. 2015; torchvision's layers)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from model.config import BackboneConfig

_CONSTRUCTORS: dict[int, Callable[..., resnet.ResNet]] = {
    18: resnet.resnet18,
    34: resnet.resnet34,
    50: resnet.resnet50,
    101: resnet.resnet101,
}


class Backbone(nn.Module):
    """Stem and four stages; the stride sits in the 3x3 convolution of a bottleneck."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        norm_layer = nn.BatchNorm2d if config.norm == "batch" else FrozenBatchNorm2d
        body = _CONSTRUCTORS[config.depth](weights=None, norm_layer=norm_layer)
        self.stem = nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool)
        self.stages = nn.ModuleList([body.layer1, body.layer2, body.layer3, body.layer4])
        width = body.fc.in_features  # channels of C5
        self.out_channels = (width // 8, width // 4, width // 2, width)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W), normalised, H and W multiples of 32, to C2..C5 with strides 4, 8, 16, 32."""
        x: Tensor = self.stem(images)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features
