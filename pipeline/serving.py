"""The model that MLflow serves: images as base64 or bytes in, the rows of jobs/predict.py out.

MLflow finds `_load_pyfunc` by this module's name (`loader_module`) and gives it the checkpoint's folder, so nothing is
ever unpickled. `mlflow models serve -m models:/NAME/VERSION --env-manager local` answers

    curl HOST:PORT/invocations -H 'Content-Type: application/json' -d '{"dataframe_records": [{"image": "BASE64"}]}'
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any

from model.masks import encode_detections
from pipeline.inference import Predictor, load
from pipeline.preprocess import ImageProblem, decode_image

COLUMN = "image"


class ServedModel:
    """What MLflow calls; images are looked at one after the other."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Find the objects of images.

        Args:
            model_input: a table with a column `image` (a data frame, or a dict of lists), a list of such rows, or a
                list of images; each an image file as bytes or as base64.
            params: none are known.

        Returns:
            A dict for each image, in order: height, width, boxes (xyxy in original pixels), class_ids, class_names,
            scores and masks (COCO RLE), best score first; or error and kind of an image that cannot be read.
        """
        return [self._predict_image(image) for image in _images_of(model_input)]

    def _predict_image(self, image: Any) -> dict[str, Any]:
        try:
            pixels = decode_image(_file_of(image))
        except ImageProblem as problem:
            return {"error": str(problem), "kind": problem.kind}
        height, width = pixels.shape[:2]
        found = self._predictor.predict(pixels)
        classes = found.classes.tolist()
        return {
            "height": height,
            "width": width,
            "boxes": found.boxes.tolist(),
            "class_ids": classes,
            "class_names": [self._predictor.class_names[class_id - 1] for class_id in classes],
            "scores": found.scores.tolist(),
            "masks": encode_detections(found, height, width, self._predictor.model.config.detections.whole_pixels),
        }


def _images_of(model_input: Any) -> Iterable[Any]:
    """The images of whatever MLflow hands over."""
    if isinstance(model_input, list | tuple):
        return [row[COLUMN] if isinstance(row, Mapping) else row for row in model_input]
    try:
        column = model_input[COLUMN]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"expected a column {COLUMN!r} with image files as bytes or base64") from None
    return [column] if isinstance(column, str | bytes) else list(column)


def _file_of(image: Any) -> bytes:
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    if not isinstance(image, str):
        raise ImageProblem(f"is neither bytes nor base64 but {type(image).__name__}")
    try:
        text = image.partition("base64,")[2] or image  # data URLs too
        return base64.b64decode("".join(text.split()), validate=True)  # lines, as encoders wrap them
    except ValueError as error:  # binascii.Error, or letters that are not ASCII
        raise ImageProblem(f"is no base64 ({error})") from error


def _load_pyfunc(path: str) -> ServedModel:
    """MLflow's entry: the model of a checkpoint folder."""
    return ServedModel(load(path))
