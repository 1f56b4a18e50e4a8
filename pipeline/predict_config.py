"""Knobs of prediction and evaluation; defaults of a checkpoint hold where one is null."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from model.config import Config, Fraction, PositiveFloat, PositiveInt

NonNegativeInt = Annotated[int, Field(ge=0)]
CanvasSide = Annotated[int, Field(ge=32, multiple_of=32)]
OverlapFraction = Annotated[float, Field(ge=0.0, lt=0.9)]


class TilingSettings(Config):
    """Large images cut into overlapping tiles, whose detections are united by the overlap of their masks."""

    size: PositiveInt = 1024
    """Side of a tile, original pixels; an image that fits into one is not cut."""
    overlap: OverlapFraction = 0.25
    """Share of a tile that its neighbour sees too; objects should be smaller than that."""
    mask_overlap: Fraction = 0.5
    """Of two tiles' detections of a class one goes where they share so much of the smaller mask."""


class DetectionOverrides(Config):
    """What takes the place of `model.detections` of a checkpoint."""

    score_threshold: Fraction | None = None
    """Least probability of the class of a detection; null: the model's."""
    nms_threshold: Fraction | None = None
    """IoU above which the lesser of two detections of a class goes; null: the model's."""
    max_per_image: PositiveInt | None = None
    """Most detections of an image or tile; null: the model's."""


class PredictSettings(Config):
    """Prediction of many images, and how an image is looked at in prediction and evaluation."""

    pattern: str | None = None
    """Files of a folder, as *.png (subfolders too); null: those with the suffix of an image format."""
    images_folder: str | None = None
    """Folder that names in a COCO file or a path column are relative to; null: the folder of that file."""
    bytes_column: str = "bytes"
    """Column of a Parquet or Arrow data set with image files as bytes."""
    path_column: str = "path"
    """Column of a Parquet or Arrow data set with paths, looked for where there is no bytes_column."""
    key_column: str | None = None
    """Column that names an image; null: its path, or its file and row."""
    images_per_part: PositiveInt = 256
    """Most images of one output file, computed whole or not at all; fewer, down to 8, for as many processes."""
    batch_size: PositiveInt = 8
    """Images of a forward pass."""
    num_workers: PositiveInt | None = None
    """Processes with the model; null: as many as the cluster holds."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass; auto takes bf16 where the processor computes in it, fp16 on older GPUs."""
    canvases: Annotated[tuple[tuple[CanvasSide, CanvasSide], ...], Field(min_length=1)] | None = None
    """Height and width that images are brought to; null: those that the model was trained on."""
    detections: DetectionOverrides = DetectionOverrides()
    """Thresholds other than the model's."""
    flip: bool = False
    """Look at every image mirrored too (test-time augmentation)."""
    scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0,)
    """Look at every image at these multiples of its size on the canvas (test-time augmentation)."""
    tiling: TilingSettings | None = None
    """Cut large images; null looks at each whole."""
    timeout_seconds: PositiveFloat = 120.0
    """Time to read and decode one image, after which it counts as an error."""
    max_error_fraction: Fraction = 0.05
    """Share of the images that may fail before the job stops."""
    max_failures: NonNegativeInt = 3
    """Lost processes that one part survives before the job stops."""
    coco_results: bool = False
    """Write coco_results.json too."""
    overlays: bool = False
    """Write a picture of every image with its detections too."""
    cutouts: bool = False
    """Write every detected object as a picture of its own too, transparent outside its mask."""
    picture_score: Fraction = 0.5
    """Least score of what overlays and cut-outs show."""
