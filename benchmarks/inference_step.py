"""Images to COCO RLE beside torchvision's own model: ResNet-50 FPN, equal weights, proposals, and 100 detections each.

    python benchmarks/inference_step.py --size 512

Both take the preset configs/torchvision_v1.yaml stands for, with the same random weights, 81 classes; both do the work
of choosing 1000 proposals and the detections, then the same ones are given to both. torchvision pastes into full
bitmaps and encodes them one by one, as its reference does. One thread, variants interleaved in one process that keeps
freed memory as our workers do (`pipeline.allocator`), medians of CPU time. Ratios are the time of torchvision in fp32
over that of the variant: more than 1 is faster. The roof is a convolution of 256 channels in the type of the variant,
timed in the same turns (`benchmarks.roof`).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from benchmarks import peers, turns
from benchmarks.results import Table, has_bf16, show
from benchmarks.turns import Variant
from model.canvas import image_windows, normalise
from model.config import ModelConfig
from model.folded import folded
from model.mask_rcnn import MaskRCNN
from model.masks import encode_detections
from model.postprocess import select_detections, to_original
from model.structures import Batch
from pipeline import allocator

BATCH_SIZE, DETECTIONS = 2, 100
Rle = list[dict[str, Any]]
Run = Callable[[], list[Rle]]


def given_detections(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (100, 4) of COCO-like sizes, scores and classes, for every image."""
    generator = torch.Generator().manual_seed(2)
    height, width = batch.images.shape[2:]
    sides = torch.exp(torch.rand(DETECTIONS, 2, generator=generator) * np.log(20)) * min(height, width) / 40
    centre = torch.rand(DETECTIONS, 2, generator=generator) * torch.tensor([width, height])
    boxes = torch.cat([centre - sides / 2, centre + sides / 2], dim=1).clamp(min=0)
    boxes = torch.minimum(boxes, torch.tensor([width, height, width, height]).float())
    scores = torch.linspace(0.9, 0.1, DETECTIONS)
    return boxes, scores, torch.randint(1, peers.NUM_CLASSES, (DETECTIONS,), generator=generator)


def their_run(
    model: Any, batch: Batch, proposals: Tensor, dtype: torch.dtype | None, memory_format: torch.memory_format
) -> Run:
    """torchvision: network, full bitmaps, one `encode` each."""
    canvas = (int(batch.images.shape[2]), int(batch.images.shape[3]))
    windows = image_windows(batch.image_sizes, canvas, "top_left")
    boxes, scores, classes = given_detections(batch)
    given = ([boxes] * batch.num_images, [scores] * batch.num_images, [classes] * batch.num_images)
    proposed = (list(proposals), [torch.ones(len(one)) for one in proposals])
    filter_proposals, choose = model.rpn.filter_proposals, model.roi_heads.postprocess_detections

    @torch.no_grad()
    def run() -> list[Rle]:
        model.eval().to(memory_format=memory_format)
        images = normalise(batch.images, windows, ModelConfig()).contiguous(memory_format=memory_format)
        with peers.in_type(dtype, images.device):
            features = model.backbone(images)
            with (
                mock.patch.object(model.rpn, "filter_proposals", lambda *a: (filter_proposals(*a), proposed)[1]),
                mock.patch.object(model.roi_heads, "postprocess_detections", lambda *a: (choose(*a), given)[1]),
            ):
                chosen, _ = model.rpn(ImageList(images, [canvas] * batch.num_images), features)
                found, _ = model.roi_heads(features, chosen, [canvas] * batch.num_images)
        results = []
        for one in found:
            bitmaps = (paste_masks_in_image(one["masks"].float(), one["boxes"], canvas) > 0.5).numpy()
            arrays = [np.array(bitmap[0][:, :, None], dtype=np.uint8, order="F") for bitmap in bitmaps]
            results.append([coco_mask.encode(array)[0] for array in arrays])
        return results

    return run


def our_run(model: MaskRCNN, batch: Batch, proposals: Tensor, dtype: torch.dtype | None) -> Run:
    """Ours, as an evaluation does it."""
    canvas = (int(batch.images.shape[2]), int(batch.images.shape[3]))
    model = folded(model, dtype)
    given = given_detections(batch)

    def run() -> list[Rle]:
        with (
            peers.in_type(dtype, batch.images.device),
            peers.given_proposals(model, proposals),
            mock.patch("model.mask_rcnn.select_detections", lambda *a: (select_detections(*a), given)[1]),
        ):
            found = model.detect(batch.images, batch.image_sizes)
        moved = [to_original(one, canvas, canvas, model.config) for one in found]
        return [encode_detections(one, *canvas) for one in moved]

    return run


def share_equal(results: list[Rle], expected: list[Rle]) -> float:
    """Least IoU of two masks that should be the same, over all images."""
    worst = 1.0
    for one, other in zip(results, expected, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            pair = [mine | {"counts": mine["counts"].encode()}], [theirs]
            if coco_mask.area(pair[1][0]) > 0:
                worst = min(worst, float(coco_mask.iou(*pair, [0])[0, 0]))
    return worst


def main() -> None:
    """Build both models once, then time each variant in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="side of the images")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each variant")
    parser.add_argument("--quick", action="store_true", help="256 px, two rounds")
    parser.add_argument("--fp32-only", action="store_true", help="for processors that only emulate bf16")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    size, rounds = (256, 2) if options.quick else (options.size, options.rounds)
    allocator.restart_keeping_freed_memory()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    batch = peers.make_batch(BATCH_SIZE, (size, size), device)
    proposals = peers.make_proposals(batch, 32)
    theirs = peers.torchvision_model(device)
    with torch.no_grad():  # far enough apart for some classes to pass the threshold, as after training
        theirs.roi_heads.box_predictor.cls_score.weight.mul_(30)
    ours = peers.our_model(theirs, device)
    half, plain = torch.bfloat16, torch.contiguous_format
    variants = {
        turns.PEER_FP32: Variant(their_run(theirs, batch, proposals, None, plain), None),
        "ours fp32": Variant(our_run(ours, batch, proposals, None), None),
    }
    least_iou = share_equal(variants["ours fp32"].run(), variants[turns.PEER_FP32].run())
    if has_bf16() and not options.fp32_only:
        variants[turns.PEER_BF16] = Variant(their_run(theirs, batch, proposals, half, torch.channels_last), half)
        variants["ours bf16"] = Variant(our_run(ours, batch, proposals, half), half)
    timed, roofs = turns.time_in_turns(variants, rounds)
    title = (
        f"images to COCO RLE, {size} px, batch {BATCH_SIZE}, ResNet-50, {DETECTIONS} detections an image, "
        f"{peers.NUM_CLASSES} classes, one thread, CPU time, medians of {rounds}; "
        f"least IoU of our fp32 masks with torchvision's: {least_iou:.3f}"
    )
    rows = turns.rows_of(variants, timed, roofs, lambda seconds: f"{1000 * seconds / BATCH_SIZE:.0f}", BATCH_SIZE)
    columns = ["variant", "ms an image", *turns.RATIOS, "GFLOP an image", *turns.SPEEDS]
    raw = turns.raw_of(timed, roofs) | {"least_iou": least_iou}
    show(Table("inference_step", title, columns, rows, raw), options.json)


if __name__ == "__main__":
    main()
