"""A small experiment and small batches, for tests of training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.mask_rcnn import MaskRCNN
from model.structures import Batch
from pipeline.checkpoint import Description, write_checkpoint
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


def write_small_checkpoint(folder: Path, class_names: Sequence[str] = ("a", "b", "c"), seed: int = 0) -> Path:
    """Checkpoint with random weights that finds ten objects in every image."""
    config = small_config(model={**SMALL_MODEL, "detections": {"max_per_image": 10, "score_threshold": 0.0}})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MaskRCNN(config.model, len(class_names) + 1)
    folder.mkdir(parents=True)
    description = Description(0, 0.0, 0.0, {}, list(class_names), "", config.model_dump(mode="json"))
    write_checkpoint(str(folder), model, None, description)
    return folder
