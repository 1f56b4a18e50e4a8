"""Images that are the same file under another name, or that are trained on and validated on."""

from __future__ import annotations

from collections.abc import Container, Sequence

from pipeline.coco import ImageRecord
from pipeline.config import PolicySettings
from pipeline.problems import Problem


def repeated_images(
    records: Sequence[ImageRecord], files: Sequence[str], validated: Container[str], policies: PolicySettings
) -> list[Problem]:
    """Images with the bytes of one that is validated on, or of another one under another name.

    Args:
        records: in row order.
        files: digest of each image file.
        validated: digests of the images that are validated on, where these are trained on.
        policies: what is done about them.
    """
    problems = []
    first_of: dict[str, str] = {}
    for record, digest in zip(records, files, strict=True):
        first = first_of.setdefault(digest, record.path)
        if digest in validated:
            kind, policy = "image_in_both_splits", policies.image_in_both_splits
            reason = f"{record.path}: has the bytes of an image that is validated on"
        elif first != record.path:
            kind, policy = "duplicate_image", policies.duplicate_image
            reason = f"{record.path}: has the bytes of {first}"
        else:
            continue
        problems.append(
            Problem(kind, policy, "image", record.source, reason, record.image_id, file_name=record.file_name)
        )
    return problems
