"""A model for inference alone detects what the model does, without its norms."""

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from model.config import ModelConfig, NormKind
from model.folded import folded, for_inference
from model.mask_rcnn import MaskRCNN
from tests.model.factories import tiny_config


def trained_like(config: ModelConfig) -> MaskRCNN:
    """Norms that do something, and classes that are far enough apart to be detected."""
    torch.manual_seed(0)
    model = MaskRCNN(config, 3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
        model.box_head.class_logits.weight.mul_(50)
    return model


@pytest.mark.parametrize("head_norm", ["none", "batch", "frozen", "group"])
def test_detects_the_same(head_norm: NormKind) -> None:
    model = trained_like(tiny_config(head_norm=head_norm))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor([[64, 64], [48, 64]])
    copied = folded(model)
    norms = [module for module in copied.modules() if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d)]
    assert not norms
    expected, found = model.eval().detect(images, sizes), copied.detect(images, sizes)
    assert sum(len(one) for one in expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.classes, other.classes)
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.boxes, other.boxes, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(one.mask_probabilities, other.mask_probabilities, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_are_stored_in_bf16_give_what_autocast_gives() -> None:
    model = trained_like(tiny_config(head_norm="group"))
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor([[64, 64]])
    with torch.autocast("cpu", torch.bfloat16):
        expected = folded(model).detect(images, sizes)[0]
        found = folded(model, torch.bfloat16).detect(images, sizes)[0]
    assert len(found) > 0
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=0)
    torch.testing.assert_close(found.mask_probabilities, expected.mask_probabilities, rtol=0, atol=0)


def test_in_float32_images_are_predicted_with_the_trained_model_itself() -> None:
    model = trained_like(tiny_config(head_norm="batch"))
    assert for_inference(model, None) is model
    half = for_inference(model, torch.bfloat16)
    assert half is not model
    assert half.mask_head.convolutions[0].weight.dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.float32
