"""A training step beside torchvision's own model: ResNet-50 FPN, equal weights, images, proposals and positive regions.

    python benchmarks/train_step.py --size 512

Both take the preset configs/torchvision_v1.yaml stands for, with the same random weights, 512 regions an image of which
the same number are positive, one thread, variants interleaved in one process, medians of CPU time (GPU: wall time).
Ratios are the time of torchvision in fp32 over that of the variant: more than 1 is faster.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from model.canvas import image_windows, normalise
from model.config import ModelConfig
from model.mask_rcnn import MaskRCNN
from model.structures import Batch
from model.weights import import_weights

ROOT = Path(__file__).resolve().parents[1]
NUM_CLASSES = 81
BATCH_SIZE = 2
OBJECTS = 8  # an image


def make_batch(size: int, device: torch.device) -> Batch:
    """Random images with rectangles as objects, the same every time."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(BATCH_SIZE, OBJECTS, 2, generator=generator) * size * 0.6
    extent = (0.1 + 0.3 * torch.rand(BATCH_SIZE, OBJECTS, 2, generator=generator)) * size
    boxes = torch.cat([corner, corner + extent], dim=2).round()
    sizes = (boxes[..., 2:] - boxes[..., :2]).flip(-1).long()  # rows, columns
    num_bytes = (sizes.prod(dim=2) + 7) // 8
    ends = num_bytes.flatten().cumsum(0)
    batch = Batch(
        images=torch.randint(0, 256, (BATCH_SIZE, 3, size, size), dtype=torch.uint8, generator=generator),
        image_sizes=torch.tensor([[size, size]] * BATCH_SIZE),
        boxes=boxes,
        classes=torch.randint(1, NUM_CLASSES, (BATCH_SIZE, OBJECTS), generator=generator),
        is_crowd=torch.zeros(BATCH_SIZE, OBJECTS, dtype=torch.bool),
        mask_boxes=boxes.clone(),
        mask_sizes=sizes,
        mask_offsets=(ends - num_bytes.flatten()).reshape(num_bytes.shape),
        mask_bits=torch.full((int(ends[-1]),), 255, dtype=torch.uint8),
        active_class_ids=torch.ones(BATCH_SIZE, NUM_CLASSES, dtype=torch.bool),
        random_keys=torch.arange(BATCH_SIZE),
    )
    return batch.to(device)


def make_proposals(batch: Batch, size: int, positives: int) -> Tensor:
    """(B, 1000, 4): so many close to an object each image, the objects themselves counted, and background."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(0, OBJECTS, (BATCH_SIZE, positives - OBJECTS), generator=generator)
    boxes = batch.boxes.cpu().gather(1, chosen[..., None].expand(-1, -1, 4))
    near = boxes + 0.04 * torch.rand(boxes.shape, generator=generator) * (boxes[..., 2:] - boxes[..., :2]).repeat(
        1, 1, 2
    )
    corner = torch.rand(BATCH_SIZE, 1000, 2, generator=generator) * size * 0.9
    far = torch.cat([corner, corner + size * 0.05], dim=2)  # too small to overlap an object by half
    return torch.cat([near, far], dim=1)[:, :1000].clamp(0, size).to(batch.images.device)


def main() -> None:
    """Build both models once, then time each variant in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="side of the images")
    parser.add_argument("--positives", type=int, default=32, help="positive regions an image, of 512")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each variant")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = make_batch(options.size, device)
    proposals = make_proposals(batch, options.size, options.positives)
    theirs = _torchvision(device)
    ours = _ours(theirs, device)
    targets = _targets(batch, options.size)
    half = torch.bfloat16
    variants = {
        "torchvision fp32": _their_step(theirs, batch, proposals, targets, None, torch.contiguous_format),
        "torchvision bf16, channels last": _their_step(theirs, batch, proposals, targets, half, torch.channels_last),
        "ours fp32": _our_step(ours, batch, proposals, None),
        "ours bf16": _our_step(ours, batch, proposals, half),
    }
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(options.rounds + 1):
        for name, step in variants.items():
            started = clock()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                seconds[name].append(clock() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    reference, strongest = list(medians.values())[:2]
    print(
        f"training step, {options.size} px, batch {BATCH_SIZE}, ResNet-50, 512 regions an image, {options.positives} "
        f"positive, {device.type}, one thread, medians of {options.rounds}"
    )
    for name, median in medians.items():
        print(
            f"{name:34s} {median:7.2f} s   x {reference / median:.2f} of torchvision fp32   "
            f"x {strongest / median:.2f} of its bf16"
        )
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options) | {"json": None}, "seconds": seconds}, indent=1))


def _torchvision(device: torch.device) -> Any:
    torch.manual_seed(0)
    model = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
    # As with its published weights: frozen norms.
    frozen = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5
    )
    frozen.load_state_dict(model.backbone.state_dict(), strict=False)
    model.backbone = frozen
    return model.to(device).train()


def _ours(theirs: Any, device: torch.device) -> MaskRCNN:
    values = yaml.safe_load((ROOT / "configs" / "torchvision_v1.yaml").read_text())["model"]
    model = MaskRCNN(ModelConfig.model_validate(values), NUM_CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(theirs.state_dict(), f"{folder}/weights.pth")
        import_weights(f"torchvision:{folder}/weights.pth", model, [str(index) for index in range(1, NUM_CLASSES)])
    return model.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload, no-any-return]


def _targets(batch: Batch, size: int) -> list[dict[str, Tensor]]:
    targets = []
    for boxes, classes in zip(batch.boxes, batch.classes, strict=True):
        masks = torch.zeros(OBJECTS, size, size, dtype=torch.uint8, device=boxes.device)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        targets.append({"boxes": boxes, "labels": classes, "masks": masks})
    return targets


def _autocast(dtype: torch.dtype | None, device: torch.device) -> Any:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _finish(losses: dict[str, Tensor], optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    total = torch.stack(list(losses.values())).sum()
    if not bool(total.isfinite()):
        raise RuntimeError("the loss is not finite; the timing would mean nothing")
    total.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _their_step(
    model: Any,
    batch: Batch,
    proposals: Tensor,
    targets: list[dict[str, Tensor]],
    dtype: torch.dtype | None,
    memory_format: torch.memory_format,
) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)
    size = batch.images.shape[2]
    windows = image_windows(batch.image_sizes, (size, size), "top_left")

    def step() -> None:
        model.to(memory_format=memory_format)
        images = normalise(batch.images, windows, ModelConfig()).contiguous(memory_format=memory_format)
        image_list = ImageList(images, [(size, size)] * BATCH_SIZE)
        with _autocast(dtype, images.device):
            features = model.backbone(images)
            given = (list(proposals), [torch.ones(len(p)) for p in proposals])
            # The work of choosing proposals is done, then the same ones are given to both.
            choose = model.rpn.filter_proposals
            with mock.patch.object(model.rpn, "filter_proposals", side_effect=lambda *a: (choose(*a), given)[1]):
                chosen, rpn_losses = model.rpn(image_list, features, targets)
            _, losses = model.roi_heads(features, chosen, image_list.image_sizes, targets)
        _finish({**losses, **rpn_losses}, optimizer, model)

    return step


def _our_step(model: MaskRCNN, batch: Batch, proposals: Tensor, dtype: torch.dtype | None) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)
    valid = torch.ones(proposals.shape[:2], dtype=torch.bool, device=proposals.device)
    choose = model.propose

    def step() -> None:
        with (
            _autocast(dtype, proposals.device),
            mock.patch.object(model, "propose", side_effect=lambda *a: (choose(*a), (proposals, valid))[1]),
        ):
            losses = model(batch)
        _finish(losses, optimizer, model)

    return step


if __name__ == "__main__":
    main()
