"""Masks of detections to COCO RLE beside torchvision's way: paste into full bitmaps, encode one by one.

    python benchmarks/masks_to_rle.py

100 detections in an image of 800 x 1200, boxes of COCO-like sizes, one thread, variants interleaved, medians of CPU
time. Every RLE has to be the same in all variants, else there is no table.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from benchmarks.results import Table, show
from model.masks import encode_detections
from model.structures import Detections

HEIGHT, WIDTH, NUMBER, CELLS = 800, 1200, 100, 28
Rle = list[dict[str, Any]]


def draw_detections(seed: int) -> Detections:
    """Smooth masks; sides of boxes from 16 pixels to 600, log-uniform."""
    generator = torch.Generator().manual_seed(seed)
    sides = torch.exp(torch.rand(NUMBER, 2, generator=generator) * np.log(600 / 16)) * 16
    centre = torch.rand(NUMBER, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
    boxes = torch.cat([centre - sides / 2, centre + sides / 2], dim=1)
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT]).float())
    coarse = torch.rand(NUMBER, 1, 6, 6, generator=generator)
    masks = F.interpolate(coarse, size=(CELLS, CELLS), mode="bilinear")[:, 0]
    return Detections(boxes, torch.ones(NUMBER), torch.ones(NUMBER, dtype=torch.int64), masks)


def _text(rle: dict[str, Any]) -> dict[str, Any]:
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def usual(found: Detections) -> Rle:
    """As torchvision's reference evaluates: paste all, then `encode` each."""
    bitmaps = paste_masks_in_image(found.mask_probabilities[:, None], found.boxes, (HEIGHT, WIDTH)) > 0.5
    arrays = [np.array(bitmap[0].numpy()[:, :, None], dtype=np.uint8, order="F") for bitmap in bitmaps]
    return [_text(coco_mask.encode(array)[0]) for array in arrays]


def batched(found: Detections) -> Rle:
    """Paste all, then one call of `encode`."""
    bitmaps = paste_masks_in_image(found.mask_probabilities[:, None], found.boxes, (HEIGHT, WIDTH)) > 0.5
    array = np.asfortranarray(bitmaps[:, 0].permute(1, 2, 0).numpy().astype(np.uint8))
    return [_text(rle) for rle in coco_mask.encode(array)]


def ours(found: Detections) -> Rle:
    """`model.masks.encode_detections`."""
    return encode_detections(found, HEIGHT, WIDTH)


def main() -> None:
    """Time the variants in turn, on other detections every round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timings of each variant")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    rounds = 5 if options.quick else options.rounds
    torch.set_num_threads(1)
    variants: dict[str, Callable[[Detections], Rle]] = {
        "torchvision: paste, encode one by one": usual,
        "torchvision: paste, one batched encode": batched,
        "ours: run lengths of the crop": ours,
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    compared = 0
    for number in range(rounds + 1):
        found = draw_detections(number)
        encoded = []
        for name, run in variants.items():
            started = time.process_time()
            encoded.append(run(found))
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - started)
        if not encoded[0] == encoded[1] == encoded[2]:
            raise RuntimeError("the variants do not give the same RLE; their times mean nothing")
        compared += NUMBER
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    reference = next(iter(medians.values()))
    title = (
        f"{NUMBER} masks to RLE, image {HEIGHT} x {WIDTH}, one thread, CPU time, medians of {rounds}; "
        f"all {compared} RLE the same in every variant"
    )
    rows = [[name, f"{1000 * median:.1f}", f"{reference / median:.1f}"] for name, median in medians.items()]
    show(Table("masks_to_rle", title, ["variant", "ms", "times as fast"], rows, {"seconds": seconds}), options.json)


if __name__ == "__main__":
    main()
