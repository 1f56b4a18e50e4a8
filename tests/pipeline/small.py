"""A small experiment and small batches, for tests of training."""

from typing import Any

from model.structures import Batch
from pipeline.config import ExperimentConfig
from pipeline.synthetic import draw_batch

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


def small_batch(num_images: int, part: slice = slice(None)) -> Batch:
    """The first pictures of the shapes data set as a batch, or a part of them."""
    return draw_batch(range(num_images)[part])
