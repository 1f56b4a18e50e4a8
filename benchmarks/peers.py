"""Our model and torchvision's with equal weights, images, proposals and positive regions; steps of each to be timed."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from model.canvas import image_windows, normalise
from model.config import ModelConfig
from model.losses import LOSS_NAMES
from model.mask_rcnn import MaskRCNN
from model.structures import Batch
from model.weights import import_weights

ROOT = Path(__file__).resolve().parents[1]
NUM_CLASSES = 81
OBJECTS = 8  # an image
SLOTS = 16  # for them
NUM_PROPOSALS = 1000  # an image

Step = Callable[[], None]
Canvas = tuple[int, int]


def make_batch(batch_size: int, canvas: Canvas, device: torch.device) -> Batch:
    """Random images with rectangles as objects, the same every time."""
    generator = torch.Generator().manual_seed(0)
    height, width = canvas
    side = torch.tensor([width, height])
    corner = torch.rand(batch_size, OBJECTS, 2, generator=generator) * side * 0.6
    extent = (0.1 + 0.3 * torch.rand(batch_size, OBJECTS, 2, generator=generator)) * side
    boxes = torch.zeros(batch_size, SLOTS, 4)
    boxes[:, :OBJECTS] = torch.cat([corner, corner + extent], dim=2).round()
    sizes = (boxes[..., 2:] - boxes[..., :2]).flip(-1).long()  # rows, columns
    num_bytes = (sizes.prod(dim=2) + 7) // 8
    ends = num_bytes.flatten().cumsum(0)
    classes = torch.zeros(batch_size, SLOTS, dtype=torch.int64)
    classes[:, :OBJECTS] = torch.randint(1, NUM_CLASSES, (batch_size, OBJECTS), generator=generator)
    batch = Batch(
        images=torch.randint(0, 256, (batch_size, 3, height, width), dtype=torch.uint8, generator=generator),
        image_sizes=torch.tensor([canvas] * batch_size),
        boxes=boxes,
        classes=classes,
        is_crowd=torch.zeros(batch_size, SLOTS, dtype=torch.bool),
        mask_boxes=boxes.clone(),
        mask_sizes=sizes,
        mask_offsets=(ends - num_bytes.flatten()).reshape(num_bytes.shape),
        mask_bits=torch.full((int(ends[-1]),), 255, dtype=torch.uint8),
        active_class_ids=torch.ones(batch_size, NUM_CLASSES, dtype=torch.bool),
        random_keys=torch.arange(batch_size),
    )
    return batch.to(device)


def make_proposals(batch: Batch, positives: int) -> Tensor:
    """(B, 1000, 4): so many close to an object each image, the objects themselves counted, and background."""
    generator = torch.Generator().manual_seed(1)
    height, width = batch.images.shape[2:]
    side = torch.tensor([width, height])
    chosen = torch.randint(0, OBJECTS, (batch.num_images, positives - OBJECTS), generator=generator)
    boxes = batch.boxes.cpu().gather(1, chosen[..., None].expand(-1, -1, 4))
    extent = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    near = boxes + 0.04 * torch.rand(boxes.shape, generator=generator) * extent
    corner = torch.rand(batch.num_images, NUM_PROPOSALS, 2, generator=generator) * side * 0.9
    far = torch.cat([corner, corner + side * 0.05], dim=2)  # too small to overlap an object by half
    boxes = torch.cat([near, far], dim=1)[:, :NUM_PROPOSALS]
    return torch.minimum(boxes.clamp(min=0), side.repeat(2)).to(batch.images.device)


def torchvision_model(device: torch.device, trained_stages: int = 5) -> Any:
    """maskrcnn_resnet50_fpn with random weights and frozen norms, as with its published weights.

    Args:
        device: where it is put.
        trained_stages: 5 trains the whole ResNet, 3 leaves out stem and first stage, as recipes do.
    """
    torch.manual_seed(0)
    model = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
    frozen = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=trained_stages
    )
    frozen.load_state_dict(model.backbone.state_dict(), strict=False)
    for module in frozen.modules():
        if isinstance(module, Bottleneck):  # blocks that change little, as trained ones: values stay finite
            module.bn3.weight.fill_(0.2)
    model.backbone = frozen
    return model.to(device).train()


def our_model(theirs: Any, device: torch.device, **changes: dict[str, Any]) -> MaskRCNN:
    """The preset configs/torchvision_v1.yaml, some sections changed, with their weights; the same layers learn."""
    values = yaml.safe_load((ROOT / "configs" / "torchvision_v1.yaml").read_text())["model"]
    for section, knobs in changes.items():
        values[section] = values.get(section, {}) | knobs
    model = MaskRCNN(ModelConfig.model_validate(values), NUM_CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(theirs.state_dict(), f"{folder}/weights.pth")
        import_weights(f"torchvision:{folder}/weights.pth", model, [str(index) for index in range(1, NUM_CLASSES)])
    if not theirs.backbone.body.layer1[0].conv1.weight.requires_grad:
        model.backbone.stem.requires_grad_(False)
        model.backbone.stages[0].requires_grad_(False)
    return model.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload, no-any-return]


def torchvision_targets(batch: Batch) -> list[dict[str, Tensor]]:
    """The objects as torchvision takes them: bitmaps as large as the images."""
    targets = []
    for boxes, classes in zip(batch.boxes, batch.classes, strict=True):
        is_object = classes > 0
        masks = torch.zeros(int(is_object.sum()), *batch.images.shape[2:], dtype=torch.uint8, device=boxes.device)
        for mask, (left, top, right, bottom) in zip(masks, boxes[is_object].int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        targets.append({"boxes": boxes[is_object], "labels": classes[is_object], "masks": masks})
    return targets


def in_type(dtype: torch.dtype | None, device: torch.device) -> Any:
    """Autocast to this type; None: fp32."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class Optimizer:
    """Clip and update, the same for both."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.sgd = torch.optim.SGD(self.parameters, lr=1e-4, momentum=0.9, fused=True)

    def update(self) -> None:
        """One step with the gradients that are there."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.sgd.step()
        self.sgd.zero_grad(set_to_none=True)


def their_step(
    model: Any,
    batch: Batch,
    proposals: Tensor,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Step:
    """Forward, backward and update of torchvision's model with given proposals.

    The work of choosing proposals is done, then the same ones are given to both models.
    """
    optimizer = Optimizer(model)
    canvas = (int(batch.images.shape[2]), int(batch.images.shape[3]))
    windows = image_windows(batch.image_sizes, canvas, "top_left")
    targets = torchvision_targets(batch)
    scores = [torch.ones(len(boxes), device=boxes.device) for boxes in proposals]
    choose = model.rpn.filter_proposals

    def step() -> None:
        model.to(memory_format=memory_format)
        images = normalise(batch.images, windows, ModelConfig()).contiguous(memory_format=memory_format)
        image_list = ImageList(images, [canvas] * batch.num_images)
        with in_type(dtype, images.device):
            features = model.backbone(images)
            given = (list(proposals), scores)
            with mock.patch.object(model.rpn, "filter_proposals", side_effect=lambda *a: (choose(*a), given)[1]):
                chosen, rpn_losses = model.rpn(image_list, features, targets)
            _, losses = model.roi_heads(features, chosen, image_list.image_sizes, targets)
        torch.stack([*losses.values(), *rpn_losses.values()]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.update()

    return step


@contextmanager
def given_proposals(model: MaskRCNN, proposals: Tensor) -> Iterator[None]:
    """Let our model do the work of choosing proposals, and then take these."""
    valid = torch.ones(proposals.shape[:2], dtype=torch.bool, device=proposals.device)
    choose = model.propose
    with mock.patch.object(model, "propose", side_effect=lambda *a: (choose(*a), (proposals, valid))[1]):
        yield


def our_step(model: MaskRCNN, batch: Batch, proposals: Tensor, dtype: torch.dtype | None) -> Step:
    """Forward, backward and update of our model with given proposals."""
    optimizer = Optimizer(model)

    def step() -> None:
        with in_type(dtype, proposals.device), given_proposals(model, proposals):
            losses = model(batch)
        torch.stack([losses[name] for name in LOSS_NAMES]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.update()

    return step


def our_graphed_step(model: MaskRCNN, batch: Batch, proposals: Tensor, dtype: torch.dtype | None) -> Step:
    """The same with forward and backward as one CUDA graph, as `pipeline.cuda_graph` makes it."""
    from pipeline.cuda_graph import GraphedGradients

    optimizer = Optimizer(model)
    gradients = GraphedGradients(model, model.config.losses, dtype)

    def step() -> None:
        with given_proposals(model, proposals):
            gradients(batch)
        optimizer.update()

    return step


def all_finite(model: torch.nn.Module) -> bool:
    """Whether the timed steps meant something."""
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())
