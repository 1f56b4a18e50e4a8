"""The presets configs/torchvision_v1.yaml and _v2.yaml against torchvision's own models, with equal random weights."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import expand_boxes, paste_masks_in_image
from torchvision.models.detection.transform import resize_boxes
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d, batched_nms

from model.config import ModelConfig
from model.losses import LOSS_NAMES
from model.mask_rcnn import MaskRCNN
from model.masks import paste_masks
from model.postprocess import to_original
from model.structures import Batch, Detections
from model.targets import match_anchors, sample_anchors, sample_regions
from model.weights import import_weights
from tests.model.factories import (
    Bitmap,
    Scene,
    Thing,
    channels_last_columns,
    ellipse,
    make_batch,
    painted_scene,
    rectangle,
)

ROOT = Path(__file__).resolve().parents[2]
COCO_MINI = Path(os.environ.get("COCO_MINI_DIR", ROOT.parent / "shared" / "data" / "coco_mini"))
NUM_CLASSES = 11
VERSIONS = {
    "torchvision_v1": detection.maskrcnn_resnet50_fpn,
    "torchvision_v2": detection.maskrcnn_resnet50_fpn_v2,
}
THEIR_LOSSES = dict(
    zip(
        LOSS_NAMES, ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"), strict=True
    )
)


def preset(name: str, **changes: dict[str, Any]) -> ModelConfig:
    """The shipped configuration, some sections of it changed."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())["model"]
    for section, knobs in changes.items():
        values[section] = values.get(section, {}) | knobs
    return ModelConfig.model_validate(values)


def theirs_at_random(name: str) -> Any:
    """torchvision's model with random weights and statistics, from which nothing is left to chance."""
    torch.manual_seed(1)
    theirs = VERSIONS[name](weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
        if isinstance(module, Bottleneck):  # blocks that change little, as trained ones: rounding does not blow up
            nn.init.uniform_(module.bn3.weight, 0.1, 0.3)
    if name == "torchvision_v1":
        for module in list(theirs.modules()):
            for child_name, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):  # so it is with pretrained weights
                    layer = FrozenBatchNorm2d(child.num_features)
                    layer.load_state_dict(child.state_dict())
                    setattr(module, child_name, layer)
    return theirs.eval()


@torch.no_grad()
def spread(layer: nn.Module, x: Tensor, deviation: float) -> None:
    """Scale a predictor so that its outputs vary about zero from row to row."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    assert layer.bias is not None
    y = layer(x).transpose(0, 1).flatten(1)  # (outputs, values)
    factor = deviation / float((y - y.mean(dim=1, keepdim=True)).std())
    layer.weight.mul_(factor)
    layer.bias.copy_((layer.bias - y.mean(dim=1)) * factor + torch.randn(len(layer.bias)) * 0.1)


@torch.no_grad()
def spread_predictions(theirs: Any, images: Tensor) -> None:
    """Heads of random weights say the same everywhere; make scores differ and boxes move, so that NMS has to work."""
    size = (images.shape[2], images.shape[3])
    features = theirs.backbone(images)
    hidden = [theirs.rpn.head.conv(level).permute(1, 0, 2, 3).flatten(1) for level in features.values()]
    cells = torch.cat(hidden, dim=1).T[:, :, None, None]  # (cells, channels, 1, 1)
    spread(theirs.rpn.head.cls_logits, cells, 2.0)
    spread(theirs.rpn.head.bbox_pred, cells, 0.2)
    corner = torch.rand(40, 2) * torch.tensor([size[1], size[0]]) * 0.7
    boxes = torch.cat([corner, corner + 10 + torch.rand(40, 2) * 0.3 * min(size)], dim=1)
    heads = theirs.roi_heads
    x = heads.box_head(heads.box_roi_pool(features, [boxes] * len(images), [size] * len(images)))
    spread(heads.box_predictor.cls_score, x, 2.0)
    spread(heads.box_predictor.bbox_pred, x, 0.5)
    x = heads.mask_head(heads.mask_roi_pool(features, [boxes] * len(images), [size] * len(images)))
    x = torch.relu(heads.mask_predictor.conv5_mask(x))
    spread(heads.mask_predictor.mask_fcn_logits, x, 2.0)


def imported(state: dict[str, Tensor], config: ModelConfig, folder: Path) -> MaskRCNN:
    """Our model with the weights of a torchvision state dict, by way of a file."""
    torch.save(state, folder / "weights.pth")
    ours = MaskRCNN(config, NUM_CLASSES)
    names = [f"class {index}" for index in range(1, NUM_CLASSES)]
    report = import_weights(f"torchvision:{folder / 'weights.pth'}", ours, names)
    assert not report.skipped
    assert not report.initial_parts
    assert len(report.classes_loaded) == NUM_CLASSES
    return ours.eval()


def our_names(theirs: Any, config: ModelConfig, folder: Path) -> dict[str, str]:
    """Their name of each of our tensors, found by importing numbered ones."""
    keys = [key for key, value in theirs.state_dict().items() if value.is_floating_point()]
    numbered = {key: torch.full_like(theirs.state_dict()[key], number) for number, key in enumerate(keys)}
    state = imported(numbered, config, folder).state_dict()
    names = {key: keys[int(value.flatten()[0])] for key, value in state.items() if value.is_floating_point()}
    assert sorted(names.values()) == sorted(keys)
    return names


def with_our_columns(key: str, tensor: Tensor) -> Tensor:
    """The first fully connected layer takes channel, row, column of a region there, and channel last here."""
    return channels_last_columns(tensor, 49) if key == "box_head.fully_connected.0.weight" else tensor


@dataclass(frozen=True)
class Views:
    """Images on one canvas, as both sides take them."""

    images: Tensor  # (B, 3, H, W) uint8
    sizes: list[tuple[int, int]]
    original_sizes: list[tuple[int, int]]

    def for_torchvision(self, theirs: Any) -> ImageList:
        """Normalised by its transform, zero outside the image."""
        canvas = torch.zeros(self.images.shape)
        for row, (height, width) in enumerate(self.sizes):
            image = self.images[row, :, :height, :width].float() / 255
            canvas[row, :, :height, :width] = theirs.transform.normalize(image)
        return ImageList(canvas, self.sizes)


def views_of(pictures: Sequence[Tensor], original_sizes: Sequence[tuple[int, int]], canvas: int) -> Views:
    images = torch.zeros(len(pictures), 3, canvas, canvas, dtype=torch.uint8)
    for row, picture in enumerate(pictures):
        images[row, :, : picture.shape[1], : picture.shape[2]] = picture
    return Views(images, [(p.shape[1], p.shape[2]) for p in pictures], list(original_sizes))


def synthetic_views() -> Views:
    """Two images of shapes in noise, one smaller than its canvas and in the file twice as large."""
    first = painted_scene([Thing(ellipse((20, 30, 110, 160), 192, 192), 1)], 192, 192, key=3).image
    second = painted_scene([Thing(rectangle((10, 10, 90, 60), 150, 130), 2)], 150, 130, key=4).image
    return views_of([first, second], [(192, 192), (300, 260)], 192)


def real_images(number: int) -> list[tuple[Image.Image, dict[str, Any], list[dict[str, Any]]]]:
    """Photographs with their records and annotations; without crowds, which torchvision's model does not know."""
    if not COCO_MINI.is_dir():
        pytest.skip(f"{COCO_MINI} is not here")
    values = json.loads((COCO_MINI / "annotations" / "instances_val.json").read_text())
    found = []
    for record in values["images"]:
        annotations = [a for a in values["annotations"] if a["image_id"] == record["id"]]
        if len(annotations) >= 3 and not any(a["iscrowd"] for a in annotations):
            found.append((Image.open(COCO_MINI / "images" / record["file_name"]).convert("RGB"), record, annotations))
        if len(found) == number:
            break
    return found


def real_views(side: int = 320) -> Views:
    """Photographs made smaller, so that the masks have to be brought back to the size of the file."""
    pictures, original_sizes = [], []
    for image, record, _ in real_images(2):
        factor = side / max(record["width"], record["height"])
        small = image.resize((round(record["width"] * factor), round(record["height"] * factor)))
        pictures.append(torch.from_numpy(np.array(small)).permute(2, 0, 1))
        original_sizes.append((record["height"], record["width"]))
    return views_of(pictures, original_sizes, side)


@torch.no_grad()
def their_detections(theirs: Any, views: Views) -> list[dict[str, Tensor]]:
    """Boxes in input pixels, probabilities (N, 1, 28, 28) as masks."""
    images = views.for_torchvision(theirs)
    features = theirs.backbone(images.tensors)
    proposals, _ = theirs.rpn(images, features)
    found: list[dict[str, Tensor]] = theirs.roi_heads(features, proposals, images.image_sizes)[0]
    return found


def assert_same_masks(ours: Detections, theirs: dict[str, Tensor], size: tuple[int, int]) -> None:
    """Full bitmaps equal in every pixel; one may differ only where the probability is one half but for rounding."""
    probabilities = paste_masks_in_image(theirs["masks"], theirs["boxes"], size)[:, 0]
    bitmaps = torch.from_numpy(paste_masks(ours, *size))
    # Corners are cut to whole pixels: a mask of which one lies on a pixel's edge, but for rounding, may be a pixel off.
    corners, their_corners = (expand_boxes(boxes, 30 / 28) for boxes in (ours.boxes, theirs["boxes"]))
    moved = corners.long() != their_corners.long()
    assert ((corners - corners.round()).abs()[moved] < 1e-2).all()
    same_place = ~moved.any(dim=1)
    assert same_place.sum() >= len(ours) - 2
    unequal = (bitmaps != (probabilities > 0.5))[same_place]
    print(f"{int(unequal.sum())} of {unequal.numel()} pixels differ; {int(moved.any(dim=1).sum())} masks moved")  # noqa: T201 - with -s
    assert ((probabilities[same_place][unequal] - 0.5).abs() < 1e-4).all()
    assert unequal.sum() <= 20  # of 100 full images, millions of pixels
    assert 0.005 < float(bitmaps.float().mean()) < 0.9
    # Of the same boxes and probabilities every pixel is the same, in float32 too: only the network's rounding differs.
    same = Detections(theirs["boxes"], theirs["scores"], theirs["labels"], theirs["masks"][:, 0])
    assert torch.equal(torch.from_numpy(paste_masks(same, *size)), probabilities > 0.5)


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize(("draw", "score_threshold"), [(synthetic_views, 0.8), (real_views, 0.05)])
def test_detections_and_full_masks(
    name: str, draw: Callable[[], Views], score_threshold: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Everything from pixels to bitmaps: once with as many detections as there may be, once with fewer.

    How far a probability is off in float32 hangs on the convolutions of the processor: see the next test for that.
    """
    assert_both_detect_the_same(name, draw(), score_threshold, monkeypatch, tmp_path, precisely=False)


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.usefixtures("everything_in_float64")
def test_detections_and_full_masks_without_rounding(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In float64 not one pixel differs, and no probability by more than a millionth; smaller, since it is slow."""
    assert_both_detect_the_same(name, real_views(160), 0.05, monkeypatch, tmp_path, precisely=True)


def assert_both_detect_the_same(
    name: str, views: Views, score_threshold: float, monkeypatch: pytest.MonkeyPatch, folder: Path, precisely: bool
) -> None:
    theirs = theirs_at_random(name)
    spread_predictions(theirs, views.for_torchvision(theirs).tensors)
    theirs.roi_heads.score_thresh = score_threshold
    proposals = 200 if precisely else 1000  # arithmetic in float64 is slow
    theirs.rpn._post_nms_top_n["testing"] = proposals
    knobs: dict[str, dict[str, Any]] = {
        "detections": {"score_threshold": score_threshold},
        "rpn": {"proposals_inference": proposals},
    }
    config = preset(name, **knobs)
    assert (preset(name).detections.score_threshold, preset(name).rpn.proposals_inference) == (0.05, 1000)
    ours = imported(theirs.state_dict(), config, folder)
    shares = []

    def look(boxes: Tensor, *rest: Any) -> Tensor:
        keep: Tensor = batched_nms(boxes, *rest)
        shares.append(len(keep) / len(boxes))
        return keep

    monkeypatch.setattr("torchvision.ops.boxes.batched_nms", look)
    expected = their_detections(theirs, views)
    assert len(shares) == 4
    assert max(shares) < 0.8  # NMS has work to do, in the RPN and behind the heads
    found = ours.detect(views.images, torch.tensor(views.sizes))

    pixels, chances = (1e-5, 1e-7) if precisely else (1e-2, 1e-4)
    for one, other in zip(found, expected, strict=True):
        assert len(other["scores"]) == 100 if score_threshold == 0.05 else 10 < len(other["scores"]) < 100
        assert int((other["labels"].bincount() > 0).sum()) > 2
        assert other["scores"].std() > 0.01
        torch.testing.assert_close(one.boxes, other["boxes"], rtol=0, atol=pixels)
        torch.testing.assert_close(one.scores, other["scores"], rtol=0, atol=chances)
        torch.testing.assert_close(one.classes, other["labels"], rtol=0, atol=0)
        if precisely:
            torch.testing.assert_close(one.mask_probabilities, other["masks"][:, 0], rtol=0, atol=1e-6)

    for one, other, size, original_size in zip(found, expected, views.sizes, views.original_sizes, strict=True):
        moved = to_original(one, size, original_size, config)
        scaled = other | {"boxes": resize_boxes(other["boxes"], size, original_size)}
        torch.testing.assert_close(moved.boxes, scaled["boxes"], rtol=0, atol=pixels)
        assert_same_masks(moved, scaled, original_size)
        if precisely:
            bitmaps = paste_masks_in_image(scaled["masks"], scaled["boxes"], original_size)[:, 0] > 0.5
            assert torch.equal(torch.from_numpy(paste_masks(moved, *original_size)), bitmaps)


@dataclass(frozen=True)
class Lesson:
    """What both sides are trained on: ground truth and proposals."""

    batch: Batch
    bitmaps: list[list[Bitmap]]
    proposals: Tensor  # (B, K, 4)

    def views(self) -> Views:
        sizes = [(height, width) for height, width in self.batch.image_sizes.tolist()]
        return Views(self.batch.images, sizes, sizes)

    def for_torchvision(self) -> list[dict[str, Tensor]]:
        targets = []
        for image, bitmaps in enumerate(self.bitmaps):
            masks = np.stack(bitmaps).astype(np.uint8)
            boxes, classes = self.batch.boxes[image, : len(bitmaps)], self.batch.classes[image, : len(bitmaps)]
            targets.append({"boxes": boxes, "labels": classes, "masks": torch.from_numpy(masks)})
        return targets


def lesson_of(scenes: Sequence[Scene], canvas: int) -> Lesson:
    """Proposals: every object moved about, and boxes anywhere."""
    batch = make_batch(scenes, slots=12, num_classes=NUM_CLASSES, canvas=canvas)
    generator = torch.Generator().manual_seed(2)
    proposals = torch.zeros(len(scenes), 120, 4)
    for image, scene in enumerate(scenes):
        height, width = scene.image.shape[1:]
        limit = torch.tensor([width, height, width, height])
        copies = batch.boxes[image, : len(scene.things)].repeat(60 // len(scene.things) + 1, 1)[:60]
        size = (copies[:, 2:] - copies[:, :2]).repeat(1, 2)
        proposals[image, :60] = copies + torch.randn(60, 4, generator=generator) * 0.15 * size
        corners = torch.rand(60, 2, 2, generator=generator) * limit[:2]
        proposals[image, 60:] = torch.cat([corners.amin(dim=1), corners.amax(dim=1) + 4], dim=1)
        proposals[image] = torch.minimum(proposals[image].clamp(min=0), limit)
    return Lesson(batch, [[thing.bitmap for thing in scene.things] for scene in scenes], proposals)


def synthetic_lesson() -> Lesson:
    first = [Thing(ellipse((0, 5, 70, 90), 128, 128), 1), Thing(rectangle((80, 60, 128, 128), 128, 128), 4)]
    second = [Thing(ellipse((20, 30, 60, 100), 110, 90), 7), Thing(ellipse((50, 1, 90, 40), 110, 90), 10)]
    return lesson_of([painted_scene(first, 128, 128, key=3), painted_scene(second, 110, 90, key=4)], 128)


def real_lesson() -> Lesson:
    """Photographs cut to 224 pixels, their objects as rendered by pycocotools."""
    scenes: list[Scene] = []
    for image, record, annotations in real_images(2):
        things = []
        for annotation in annotations:
            rles = coco_mask.frPyObjects(annotation["segmentation"], record["height"], record["width"])
            bitmap = coco_mask.decode(coco_mask.merge(rles))[:224, :224].astype(bool)
            if bitmap.sum() > 50:
                things.append(Thing(bitmap, 1 + annotation["category_id"] % (NUM_CLASSES - 1)))
        assert things
        pixels = torch.from_numpy(np.array(image)[:224, :224]).permute(2, 0, 1)
        scenes.append(Scene(pixels, tuple(things[:12]), key=5 + len(scenes)))
    return lesson_of(scenes, 224)


def train_both(theirs: Any, ours: MaskRCNN, lesson: Lesson, patch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Losses of both, under our names; torchvision's matching and losses on the rows that we have drawn."""
    batch, targets = lesson.batch, lesson.for_torchvision()
    images = lesson.views().for_torchvision(theirs)
    valid = torch.ones(lesson.proposals.shape[:2], dtype=torch.bool)
    patch.setattr(ours, "propose", lambda *_: (lesson.proposals, valid))
    patch.setattr(theirs.rpn, "filter_proposals", lambda *_: (list(lesson.proposals), None))
    assign = theirs.rpn.assign_targets_to_anchors

    def assign_as_precisely(*arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
        labels, boxes = assign(*arguments)  # float32 always, which would be the type of the loss
        return [label.to(lesson.proposals.dtype) for label in labels], boxes

    patch.setattr(theirs.rpn, "assign_targets_to_anchors", assign_as_precisely)

    features = theirs.backbone(images.tensors)
    anchors = theirs.rpn.anchor_generator(images, list(features.values()))[0]
    positive, negative, _ = match_anchors(anchors, batch, ours.config)
    anchor_samples = sample_anchors(positive, negative, batch, ours.config)
    regions = sample_regions(lesson.proposals, valid, batch, ours.config)
    candidates = [torch.cat([p, t["boxes"]]) for p, t in zip(lesson.proposals, targets, strict=True)]

    def drawn_anchors(labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        chosen = []
        for image, label in enumerate(labels):
            torch.testing.assert_close(label == 1, positive[image])
            torch.testing.assert_close(label == 0, negative[image])
            row = torch.zeros(len(label), dtype=torch.bool)
            row[anchor_samples.index[image][anchor_samples.valid[image]]] = True
            chosen.append(row)
        pairs = list(zip(chosen, labels, strict=True))
        return [row & (label == 1) for row, label in pairs], [row & (label == 0) for row, label in pairs]

    def drawn_regions(labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        chosen = []
        for image, label in enumerate(labels):
            boxes = regions.boxes[image][regions.valid[image]]
            row = (candidates[image][:, None] == boxes).all(dim=2).any(dim=1)
            assert row.sum() == len(boxes)
            assert (label[row] > 0).sum() == (regions.classes[image] > 0).sum() > 2
            chosen.append(row)
        pairs = list(zip(chosen, labels, strict=True))
        return [row & (label > 0) for row, label in pairs], [row & (label == 0) for row, label in pairs]

    patch.setitem(theirs.rpn.__dict__, "fg_bg_sampler", drawn_anchors)
    patch.setitem(theirs.roi_heads.__dict__, "fg_bg_sampler", drawn_regions)
    proposals, rpn_losses = theirs.rpn(images, features, targets)
    _, head_losses = theirs.roi_heads(features, proposals, images.image_sizes, targets)
    their_losses = rpn_losses | head_losses
    return [ours(batch), {name: their_losses[there] for name, there in THEIR_LOSSES.items()}]


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("draw", [synthetic_lesson, real_lesson])
def test_five_losses(name: str, draw: Callable[[], Lesson], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same proposals, samples and exact masks; 64 regions an image, so that it takes seconds."""
    lesson = draw()
    theirs = theirs_at_random(name)
    spread_predictions(theirs, lesson.views().for_torchvision(theirs).tensors)
    config = preset(name, roi={"rois_per_image": 64})
    ours = imported(theirs.state_dict(), config, tmp_path)
    losses, expected = train_both(theirs.train(), ours.train(), lesson, monkeypatch)
    assert tuple(losses) == tuple(expected) == LOSS_NAMES
    for key, value in expected.items():
        assert value > 0.01, key
        torch.testing.assert_close(losses[key], value, rtol=0, atol=1e-4)
    for key, there in our_names(theirs, config, tmp_path).items():
        value = with_our_columns(key, theirs.state_dict()[there])
        # Among them what batch norm has learned of the images and regions.
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-3, atol=1e-3, msg=key)


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.usefixtures("everything_in_float64")
def test_gradients_of_every_parameter(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lesson = synthetic_lesson()
    lesson = replace(lesson, batch=replace(lesson.batch, boxes=lesson.batch.boxes.double()))
    theirs = theirs_at_random(name)
    spread_predictions(theirs, lesson.views().for_torchvision(theirs).tensors)
    config = preset(name, roi={"rois_per_image": 32})
    ours = imported(theirs.state_dict(), config, tmp_path)
    names = our_names(theirs, config, tmp_path)
    losses, expected = train_both(theirs.train(), ours.train(), lesson, monkeypatch)
    shares = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])  # so that no two losses can be mistaken for each other
    for values in (losses, expected):
        assert all(value.dtype == torch.float64 for value in values.values())
        torch.autograd.backward((torch.stack(list(values.values())) * shares).sum())
    their_parameters = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        gradient = their_parameters[names[key]].grad
        assert gradient is not None, key
        assert parameter.grad is not None, key
        assert gradient.any(), key
        gradient = with_our_columns(key, gradient)
        atol = 1e-7 * float(gradient.abs().max())
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=atol, msg=key)
