"""A small experiment and small batches, for tests of training."""

from typing import Any

import numpy as np

from model.structures import Batch
from pipeline.config import ExperimentConfig
from pipeline.preprocess import pack_mask
from pipeline.sample import Sample, collate, sample_to_values
from pipeline.synthetic import SHAPE_NAMES, draw_example

SMALL_MODEL: dict[str, Any] = {
    "backbone": {"depth": 18, "norm": "frozen"},
    "fpn": {"channels": 32},
    "anchors": {"scales": [16, 32, 64, 128, 256]},
    "rpn": {
        "channels": 32,
        "anchors_per_image": 64,
        "pre_nms_top_k": 100,
        "proposals_training": 30,
        "proposals_inference": 20,
    },
    "roi": {"rois_per_image": 16},
    "box_head": {"channels": 32, "norm": "none"},
    "mask_head": {"channels": 16, "num_convolutions": 1, "norm": "none"},
    "detections": {"max_per_image": 10},
}


def small_config(**parts: Any) -> ExperimentConfig:
    """Configuration of a model that takes milliseconds a step; `parts` replace whole sections."""
    settings: dict[str, Any] = {
        "model": SMALL_MODEL,
        "data": {"canvases": [[128, 128]]},
        "optim": {"name": "adamw", "learning_rate": 1e-3, "warmup_steps": 2},
        "train": {"batch_size_per_worker": 2, "precision": "fp32"},
    }
    return ExperimentConfig.model_validate({**settings, **parts})


def small_sample(number: int) -> Sample:
    """A picture of the shapes data set as a sample."""
    pixels, objects = draw_example(0, "train", number)
    packed = [pack_mask(mask) for _, mask in objects]
    boxes = np.array([box for box, _ in packed], dtype=np.float32).reshape(-1, 4)
    sizes = np.stack([boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], axis=1).astype(np.int32)
    return Sample(
        image=pixels,
        classes=np.array([SHAPE_NAMES.index(name) + 1 for name, _ in objects], dtype=np.int32),
        is_crowd=np.zeros(len(objects), dtype=bool),
        boxes=boxes,
        mask_boxes=boxes,
        mask_sizes=sizes,
        mask_bits=np.frombuffer(b"".join(bits for _, bits in packed), dtype=np.uint8),
    )


def small_batch(num_images: int, part: slice = slice(None)) -> Batch:
    """The first pictures of the shapes data set as a batch, or a part of them."""
    rows = [
        {"random_key": number, "source": 0, "canvas_height": 128, "canvas_width": 128}
        | sample_to_values(small_sample(number))
        for number in range(num_images)
    ]
    return collate(rows[part], np.ones((1, len(SHAPE_NAMES) + 1), dtype=bool))
