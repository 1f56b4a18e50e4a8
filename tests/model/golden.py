"""Numbers that the original implementation computed: where they lie, what has been looked at, and its conventions.

The original writes boxes as (y1, x1, y2, x2), normalised by H - 1 and W - 1 with the last pixel inside, and deltas as
(dy, dx, dh, dw): adapted here, not in the model.
"""

import importlib.util
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from torch import Tensor

from model.boxes import last_pixel_inside, last_pixel_outside
from model.config import ModelConfig

Array = npt.NDArray[Any]

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[2].parent / "shared" / "golden"))
FILES = ("forward", "detect", "roialign", "stages", "pure", "losses", "targets", "train_step")
SLICES = {
    "C1": (1, 2, 2, 4), "C2": (1, 2, 2, 16), "C3": (1, 2, 2, 16), "C4": (1, 1, 1, 16), "C5": (1, 1, 1, 8),
    "P2": (1, 2, 2, 8), "P3": (1, 1, 1, 8), "P4": (1, 1, 1, 2),
    "pooled_class": (1, 10, 1, 1, 16), "pooled_mask": (1, 4, 1, 1, 32),
}  # fmt: skip
"""Steps of the slices of large tensors, as the files' README gives them; of others the whole is there."""

needs_golden = pytest.mark.skipif(
    "GOLDEN_DIR" not in os.environ and not (FOLDER / "manifest.json").is_file(),
    reason="no golden vectors; name their folder in GOLDEN_DIR",
)

visited: set[tuple[str, str]] = set()
"""(file, key) of every number that a test has looked at."""


@cache
def archive(name: str) -> dict[str, Array]:
    """A whole file."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


class Case:
    """The arrays of one case by the name of the argument; what is read counts as visited."""

    def __init__(self, file: str, prefix: str = "") -> None:
        self.file, self.prefix = file, f"{prefix}__" if prefix else ""
        assert any(key.startswith(self.prefix) for key in archive(file)), f"{file}.npz has no case {prefix}"

    def __getitem__(self, name: str) -> Array:
        key = self.prefix + name
        visited.add((self.file, key))
        return archive(self.file)[key]

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in archive(self.file)

    def tensor(self, name: str) -> Tensor:
        """As it is."""
        return torch.from_numpy(np.array(self[name]))

    def boxes(self, name: str) -> Tensor:
        """(y1, x1, y2, x2) as (x1, y1, x2, y2), or (dy, dx, dh, dw) as (dx, dy, dw, dh)."""
        return swapped(self[name])


def cases(file: str, start: str) -> list[str]:
    """Names of the cases of a file that begin so; none where there are no golden vectors."""
    if not (FOLDER / f"{file}.npz").is_file():
        return []
    names = {key.rsplit("__", 1)[0] if "__" in key else key for key in archive(file)}
    found = sorted(name for name in names if name.startswith(start))
    assert found, f"{FOLDER}: no case of {file}.npz begins with {start}"  # else its test would be skipped
    return found


def swapped(values: Array) -> Tensor:
    """See `Case.boxes`."""
    return torch.from_numpy(np.ascontiguousarray(values[..., [1, 0, 3, 2]]))


def to_pixels(boxes: Tensor, height: int, width: int) -> Tensor:
    """Normalised xyxy to pixels, the last one inside: the frame of the model with `boxes: inclusive`."""
    return boxes * boxes.new_tensor([width - 1, height - 1, width - 1, height - 1])


def to_normalised(boxes: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `to_pixels`."""
    return boxes / boxes.new_tensor([width - 1, height - 1, width - 1, height - 1])


def normalise_pixels(boxes: Tensor, height: int, width: int) -> Tensor:
    """xyxy in pixels, right and bottom exclusive, to normalised."""
    return to_normalised(last_pixel_inside(boxes), height, width)


def denormalise(boxes: Tensor, height: int, width: int) -> Tensor:
    """Normalised to whole pixels, right and bottom exclusive."""
    return last_pixel_outside(to_pixels(boxes, height, width)).round()


@cache
def manifest() -> dict[str, Any]:
    """Settings and weights of the original's model."""
    content: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_text())
    return content


def original_config() -> dict[str, Any]:
    """Settings of the original's model."""
    config: dict[str, Any] = manifest()["config"]
    return config


def delta_scale(name: str) -> tuple[float, float, float, float]:
    """RPN_BBOX_STD_DEV or BBOX_STD_DEV, of (dy, dx, dh, dw), as ours of (dx, dy, dw, dh)."""
    dy, dx, dh, dw = original_config()[name]
    return dx, dy, dw, dh


def class_names() -> list[str]:
    """Names for classes 1..C-1, which the original does not give."""
    return [f"class {index}" for index in range(1, original_config()["NUM_CLASSES"])]


def model_config() -> ModelConfig:
    """configs/matterport.yaml with the sizes and thresholds of the golden model."""
    original = original_config()
    preset = yaml.safe_load((Path(__file__).parents[2] / "configs" / "matterport.yaml").read_text())["model"]
    changes: dict[str, Any] = {
        "weights_classes": class_names(),  # 81 would be taken for COCO's
        "pixel_mean": [value / 255 for value in original["MEAN_PIXEL"]],
        "backbone": {"depth": int(original["BACKBONE"].removeprefix("resnet"))},
        "fpn": {"channels": original["TOP_DOWN_PYRAMID_SIZE"]},
        "anchors": {
            "scales": original["RPN_ANCHOR_SCALES"],
            "ratios": original["RPN_ANCHOR_RATIOS"],
            "anchor_stride": original["RPN_ANCHOR_STRIDE"],
        },
        "rpn": {
            "nms_threshold": original["RPN_NMS_THRESHOLD"],
            "pre_nms_top_k": original["PRE_NMS_LIMIT"],
            "proposals_training": original["POST_NMS_ROIS_TRAINING"],
            "proposals_inference": original["POST_NMS_ROIS_INFERENCE"],
            "anchors_per_image": original["RPN_TRAIN_ANCHORS_PER_IMAGE"],
            "delta_scale": delta_scale("RPN_BBOX_STD_DEV"),
        },
        "roi": {
            "rois_per_image": original["TRAIN_ROIS_PER_IMAGE"],
            "positive_fraction": original["ROI_POSITIVE_RATIO"],
        },
        "box_head": {
            "pool_size": original["POOL_SIZE"],
            "channels": original["FPN_CLASSIF_FC_LAYERS_SIZE"],
            "delta_scale": delta_scale("BBOX_STD_DEV"),
        },
        "mask_head": {"pool_size": original["MASK_POOL_SIZE"]},
        "detections": {
            "score_threshold": original["DETECTION_MIN_CONFIDENCE"],
            "nms_threshold": original["DETECTION_NMS_THRESHOLD"],
            "max_per_image": original["DETECTION_MAX_INSTANCES"],
        },
    }
    merged = {
        key: {**preset.get(key, {}), **change} if isinstance(change, dict) else change
        for key, change in changes.items()
    }
    return ModelConfig.model_validate({**preset, **merged})


def weight_maker() -> Any:
    """The golden folder's make_weights.py as a module."""
    spec = importlib.util.spec_from_file_location("make_weights", FOLDER / "make_weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
