"""A copy of a model for inference alone: norms with fixed statistics become part of the convolutions before them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from model.box_head import BoxHead
from model.mask_head import MaskHead
from model.mask_rcnn import MaskRCNN


def folded(model: MaskRCNN, dtype: torch.dtype | None = None) -> MaskRCNN:
    """The model in evaluation mode with batch norms folded away; it detects the same up to rounding.

    Args:
        model: left as it is.
        dtype: type that autocast computes convolutions and matrix products in; their weights are stored in it, so that
            they need not be converted for every batch. None leaves them.
    """
    result = copy.deepcopy(model).eval().requires_grad_(False)
    result._forward_pre_hooks.clear()  # who watches the model that is trained does not watch this one
    result._forward_hooks.clear()
    for parent, convolution_name, norm_parent, norm_name in list(_pairs(result)):
        convolution, norm = getattr(parent, convolution_name), getattr(norm_parent, norm_name)
        if isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d):
            _fold(convolution, norm)
            setattr(norm_parent, norm_name, nn.Identity())
    if dtype is not None:
        for module in result.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                module.weight.data = module.weight.data.to(dtype)
    return result


def for_inference(model: MaskRCNN, dtype: torch.dtype | None) -> MaskRCNN:
    """What images are predicted with: `folded` in half precision; in float32 the model itself.

    In half precision every batch would convert all weights anew. In float32 folding saves little, and rounds otherwise
    than the model that was trained.
    """
    return model if dtype is None else folded(model, dtype)


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d | FrozenBatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    convolution.weight, convolution.bias = weight.requires_grad_(False), bias.requires_grad_(False)


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module, str]]:
    """Where each convolution and the norm right after it hang: module and name of the child, twice."""
    for module in model.modules():
        if isinstance(module, BoxHead | MaskHead):
            for index in range(len(module.norms)):
                yield module.convolutions, str(index), module.norms, str(index)
        elif isinstance(module, nn.Sequential):  # stem, shortcut, a convolution of the pyramid
            yield from _neighbours(module)
        elif any(name == "bn1" for name, _ in module.named_children()):  # torchvision's blocks
            for index in range(1, 4):
                if hasattr(module, f"bn{index}"):
                    yield module, f"conv{index}", module, f"bn{index}"


def _neighbours(module: nn.Sequential) -> Iterator[tuple[nn.Module, str, nn.Module, str]]:
    for (name, child), (next_name, _) in itertools.pairwise(module.named_children()):
        if isinstance(child, nn.Conv2d):
            yield module, name, module, next_name
