"""What each augmentation costs the ingest: one thread, a large picture with outlines, variants interleaved, medians.

Command: python benchmarks/augment.py --rounds 15
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from pipeline.augment import augment
from pipeline.config import AugmentSettings
from pipeline.copy_paste import copy_paste
from pipeline.preprocess import pack_mask
from pipeline.sample import Sample

CANVAS = (1024, 1024)
NUM_OBJECTS = 10
VARIANTS = {
    "nothing": AugmentSettings(horizontal_flip=0.0),
    "flip": AugmentSettings(horizontal_flip=1.0),
    "short side 640 to 800": AugmentSettings(horizontal_flip=0.0, short_side=(640, 800), short_side_step=32),
    "large-scale jitter 0.1 to 2": AugmentSettings(horizontal_flip=0.0, large_scale_jitter=(0.1, 2.0)),
    "brightness, contrast, saturation": AugmentSettings(
        horizontal_flip=0.0, brightness=0.4, contrast=0.4, saturation=0.4
    ),
    "hue": AugmentSettings(horizontal_flip=0.0, hue=0.1),
}


def picture(seed: int) -> Sample:
    """768 x 1024 pixels, ten ellipses up to half as wide as the image; masks in half the resolution, as COCO's are."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:384, :512]
    packed = []
    for _ in range(NUM_OBJECTS):
        centre, half = rng.uniform([0, 0], [384, 512]), rng.uniform(5, 128, size=2)
        packed.append(pack_mask(((y - centre[0]) / half[0]) ** 2 + ((x - centre[1]) / half[1]) ** 2 <= 1))
    boxes = np.array([box for box, _ in packed], dtype=np.float32)
    return Sample(
        image=rng.integers(0, 256, (768, 1024, 3), dtype=np.uint8),
        classes=np.ones(NUM_OBJECTS, dtype=np.int32),
        is_crowd=np.zeros(NUM_OBJECTS, dtype=bool),
        boxes=boxes * 2,
        mask_boxes=boxes * 2,
        mask_sizes=np.stack([boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], axis=1).astype(np.int32),
        mask_bits=np.frombuffer(b"".join(bits for _, bits in packed), dtype=np.uint8),
    )


def main() -> None:
    """Time each variant in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timings of each variant")
    options = parser.parse_args()
    pictures = [picture(seed) for seed in range(8)]

    def changed(settings: AugmentSettings) -> Callable[[int], Sample]:
        return lambda number: augment(pictures[number % 8], settings, np.random.default_rng(number), CANVAS)

    def pasted(number: int) -> Sample:
        chosen = np.random.default_rng(number).random(NUM_OBJECTS) < 0.5
        return copy_paste(pictures[number % 8], pictures[(number + 1) % 8], chosen)

    runs = {name: changed(settings) for name, settings in VARIANTS.items()} | {"copy-paste": pasted}
    milliseconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds):
        for name, run in runs.items():
            started = time.process_time()
            run(number).image.tobytes()
            milliseconds[name].append(1000 * (time.process_time() - started))
    for name, values in milliseconds.items():
        print(f"{name:34s} {statistics.median(values):7.1f} ms an image")


if __name__ == "__main__":
    main()
