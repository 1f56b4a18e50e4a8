"""Images of the training files that are kept back to validate on, where there is no second annotation file."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from pipeline.coco import CocoFile, is_int
from pipeline.errors import UserError


def hold_out(files: Sequence[CocoFile], fraction: float) -> tuple[list[CocoFile], list[CocoFile]]:
    """Divide the images of all files, each with its annotations, in two.

    The name of an image alone decides, so that it stays on its side when others are added, whatever their order.

    Args:
        files: as they were read.
        fraction: share of the images that is kept back, over 0 and under 1; about that many are, at least one.

    Returns:
        The files to train on and those to validate on, as many of each as `files`, with the same categories. An
        annotation of an image that is not listed stays with the training, where it is told.

    Raises:
        UserError: fewer than two images.
    """
    draws = [_draws(file) for file in files]
    ordered = sorted({draw for of_file in draws for draw in of_file})
    if len(ordered) < 2:
        raise UserError(
            f"{files[0].path}: lists one image, so none can be kept back to validate on; "
            "set data.validation_sources instead of data.validation_fraction"
        )
    limit = min(max(fraction, ordered[0]), ordered[-2])  # at least one on either side
    sides = [_divide(file, [draw <= limit for draw in of_file]) for file, of_file in zip(files, draws, strict=True)]
    return [training for training, _ in sides], [validation for _, validation in sides]


def _draws(file: CocoFile) -> list[float]:
    """For every image a number from 0 to 1, a function of its file's name; records of one id stay together."""
    of_id: dict[int, float] = {}
    draws = []
    for image in file.images:
        digest = hashlib.sha256(str(image.get("file_name")).encode(errors="surrogatepass")).digest()
        draw = int.from_bytes(digest[:8], "big") / 2**64
        image_id = image.get("id")
        draws.append(of_id.setdefault(image_id, draw) if is_int(image_id) else draw)
    return draws


def _divide(file: CocoFile, kept_back: Sequence[bool]) -> tuple[CocoFile, CocoFile]:
    """What is trained on, and what is kept back."""
    ids = {
        image.get("id") for image, kept in zip(file.images, kept_back, strict=True) if kept and is_int(image.get("id"))
    }
    of_kept = [is_int(annotation.get("image_id")) and annotation["image_id"] in ids for annotation in file.annotations]
    training, validation = (
        dataclasses.replace(
            file,
            images=[image for image, kept in zip(file.images, kept_back, strict=True) if kept is side],
            annotations=[record for record, kept in zip(file.annotations, of_kept, strict=True) if kept is side],
        )
        for side in (False, True)
    )
    return training, validation
