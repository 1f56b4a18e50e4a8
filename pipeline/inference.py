"""Python's door to a trained model: load a checkpoint, predict an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from model.folded import for_inference
from model.mask_rcnn import MaskRCNN
from model.masks import paste_masks
from model.structures import Detections
from model.weights import is_import
from pipeline.checkpoint import build_model, check_same_classes, load_judged_state, verify_checkpoint
from pipeline.checkpoint_reference import resolve_checkpoint
from pipeline.command_line import ConfigurationError
from pipeline.config import ExperimentConfig
from pipeline.errors import UserError
from pipeline.initial_weights import NONE, Say, build_model_from, find_checkpoint
from pipeline.mlflow_runs import flatten
from pipeline.preprocess import UInt8Array, decode_image, image_to_rgb
from pipeline.training import autocast_dtype
from pipeline.views import Viewing, detect_views, unite, views_of

FREE_IN_INFERENCE = (
    "weights", "losses.", "detections.", "mask_head.targets", "rpn.nms_threshold", "rpn.pre_nms_top_k",
    "rpn.proposals_", "rpn.min_size", "rpn.anchors_per_image", "rpn.positive_", "rpn.negative_iou",
    "roi.rois_per_image", "roi.positive_", "roi.add_ground_truth", "roi.fixed_ratio",
)  # fmt: skip
"""Keys of the model that only its training looks at, or that choose among what it finds."""


@dataclass(frozen=True)
class Predictor:
    """A trained model and what it needs to look at an image."""

    model: MaskRCNN
    class_names: list[str]
    """Of classes 1..C-1: `class_names[detections.classes[i] - 1]`."""
    viewing: Viewing
    """How it looks at an image."""
    precision: str = "auto"

    def predict(self, image: UInt8Array | Image.Image | str | Path) -> Detections:
        """Find the objects of one image.

        Args:
            image: (H, W, 3) uint8 RGB, a Pillow image, or the path of an image file.

        Returns:
            Detections in original pixels, best score first, perhaps none; `masks` gives their bitmaps.

        Raises:
            ValueError: an array of another shape or type.
            ImageProblem: a file that is no image.
        """
        pixels = _to_array(image)
        height, width = pixels.shape[:2]
        views = views_of(pixels, height, width, self.viewing)
        dtype = autocast_dtype(self.precision, next(self.model.parameters()).device.type)
        found = [detect_views(self.model, [view], dtype)[0] for view in views]
        return unite(views, found, height, width, self.viewing, self.model.config)

    def masks(self, detections: Detections, height: int, width: int) -> npt.NDArray[np.bool_]:
        """Bitmaps (N, height, width) of detections in an image of this size; N may be 0."""
        return paste_masks(detections, height, width, self.model.config.detections.whole_pixels)


def load(
    checkpoint: str, storage_path: str = "runs", mlflow_uri: str | None = None, device: str | None = None
) -> Predictor:
    """Load a trained model.

    Args:
        checkpoint: a checkpoint folder, a run folder or its name in storage_path, or the id of an MLflow run.
        storage_path: where runs are.
        mlflow_uri: tracking server or store of an MLflow run; by default the sqlite file in storage_path.
        device: "cpu" or "cuda"; by default a GPU where there is one.

    Raises:
        UserError: no such checkpoint, or a damaged one.
    """
    model, description = build_model(resolve_checkpoint(checkpoint, storage_path, mlflow_uri))
    config = description.experiment()
    placed = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = for_inference(model.to(placed), autocast_dtype(config.train.precision, placed.type))
    viewing = Viewing(config.data.canvases, config.data.short_side, config.data.resize_method)
    return Predictor(model, description.class_names, viewing, config.train.precision)


def _to_array(image: UInt8Array | Image.Image | str | Path) -> UInt8Array:
    if isinstance(image, str | Path):
        return decode_image(Path(image).read_bytes())
    if isinstance(image, Image.Image):
        return image_to_rgb(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"expected an image of shape (H, W, 3) and type uint8, got {image.shape} and {image.dtype}")
    return image


def find_weights(config: ExperimentConfig, checkpoint: str | None) -> str:
    """What is to be evaluated: a source as in `model.weights`, or the local folder of a checkpoint of ours.

    Args:
        config: model.weights, and run, where runs are looked for.
        checkpoint: what the user named, None for model.weights.

    Raises:
        ConfigurationError: nothing was named.
        UserError: there is no such checkpoint.
    """
    source = checkpoint or config.model.weights
    if source == NONE:
        raise ConfigurationError("checkpoint: nothing to evaluate; name one with --checkpoint, or --model.weights")
    return source if is_import(source) else find_checkpoint(source, config)


def _check_same_model(trained: ExperimentConfig, config: ExperimentConfig, reference: str) -> None:
    """Refuse a model that would compute otherwise than the one that was trained; its weights need not tell.

    Raises:
        UserError: with the keys that differ.
    """
    there, here = (flatten(entry.model_dump(mode="json")["model"]) for entry in (trained, config))
    different = [
        f"model.{key} {here.get(key)} (there {there.get(key)})"
        for key in sorted(there | here)
        if there.get(key) != here.get(key) and not key.startswith(FREE_IN_INFERENCE)
    ]
    if different:
        raise UserError(
            f"{reference}: was trained with another model than the configuration's: {', '.join(different[:5])}"
            f"{' ...' if len(different) > 5 else ''}; take the configuration of its run"
        )


def load_weights(config: ExperimentConfig, weights: str, class_names: Sequence[str], say: Say) -> MaskRCNN:
    """The configured model with the weights that `find_weights` found, on the CPU.

    Args:
        config: model; thresholds may differ from the training's, the architecture may not.
        weights: a source of another implementation, whose classes are taken by name, or a checkpoint of ours.
        class_names: of classes 1..C-1 of the data.
        say: takes lines for a person to read.

    Raises:
        UserError: weights of another architecture, or a checkpoint of other classes or of another model.
    """
    if is_import(weights):
        model, report = build_model_from(config, weights, class_names)
        for line in report.lines():
            say(line)
        return model
    description = verify_checkpoint(weights)
    check_same_classes(description, list(class_names), weights)
    _check_same_model(description.experiment(), config, weights)
    model = MaskRCNN(config.model, len(class_names) + 1)
    load_judged_state(weights, model)
    return model
