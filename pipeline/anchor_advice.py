"""Which anchors fit the objects of a data set: what the configured ones reach, and what others would.

Everything is in input pixels, after the configured resize. It suggests, it never applies: k-means can make things worse
for other reasons, so its suggestions are points of a search space for a sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from model.config import AnchorConfig

FloatArray = npt.NDArray[np.float64]

STRIDES = (4, 8, 16, 32, 64)  # input pixels a cell of P2..P6
LEVELS = ("P2", "P3", "P4", "P5", "P6")
GOOD_IOU, POOR_IOU = 0.7, 0.5
ENOUGH = 0.9  # share of objects that anchors should reach at the lower of these
DOUBLING = "best doubling scales"
KMEANS_ROUNDS = 100
SMALLEST_SCALES = tuple(4 * 2 ** (quarter / 4) for quarter in range(17))  # 4 to 64 on P2
MAX_OBJECTS_TRIED = 20_000


@dataclass(frozen=True)
class Objects:
    """Boxes of a data set, crowds left out."""

    boxes: FloatArray
    """(N, 4) xyxy in input pixels, clipped to their image."""
    canvases: npt.NDArray[np.int64]
    """(N, 2) height and width of the canvas of each."""


def best_ious(objects: Objects, scales: Sequence[float], ratios: Sequence[float], anchor_stride: int) -> FloatArray:
    """IoU of every object with the best anchor of every level, over the whole grid of anchors.

    Of anchors of one shape, the one whose centre is nearest to the object's, in x and in y, overlaps it most; so one
    anchor for each shape has to be looked at, not all of them.

    Args:
        objects: N may be 0.
        scales: one for each of P2..P6.
        ratios: width / height.
        anchor_stride: see `AnchorConfig`.

    Returns:
        (N, 5).
    """
    best = np.zeros((len(objects.boxes), len(scales)))
    for level, (scale, stride) in enumerate(zip(scales, STRIDES, strict=True)):
        cells = -(-objects.canvases // stride)  # feature cells of a canvas, (N, 2)
        centres_y = _nearest_centre(objects.boxes[:, 1::2].mean(axis=1), stride * anchor_stride, cells[:, 0], stride)
        centres_x = _nearest_centre(objects.boxes[:, 0::2].mean(axis=1), stride * anchor_stride, cells[:, 1], stride)
        for ratio in ratios:
            half = np.array([scale * ratio**0.5, scale / ratio**0.5]) / 2
            centres = np.stack([centres_x, centres_y], axis=1)
            anchors = np.concatenate([centres - half, centres + half], axis=1).astype(np.float32)  # as the model's
            best[:, level] = np.maximum(best[:, level], _iou(objects.boxes, anchors))
    return best


def _nearest_centre(
    wanted: FloatArray, spacing: float, cells: npt.NDArray[np.int64], stride: int
) -> npt.NDArray[np.float64]:
    """Nearest multiple of the spacing among the anchors' centres on a side with so many cells."""
    last = (cells - 1) * stride // spacing
    return np.clip(np.rint(wanted / spacing), 0, last) * spacing


def _iou(boxes: FloatArray, others: npt.NDArray[Any]) -> FloatArray:
    """(N,) IoU of each box with the other of its place; 0 where a box has no area."""
    others = others.astype(np.float64)
    sides = np.minimum(boxes[:, 2:], others[:, 2:]) - np.maximum(boxes[:, :2], others[:, :2])
    intersection = np.prod(np.clip(sides, 0, None), axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) + np.prod(others[:, 2:] - others[:, :2], axis=1)
    return np.where(intersection > 0, intersection / np.maximum(areas - intersection, 1e-12), 0.0)


def recalls(best: FloatArray) -> dict[str, Any]:
    """How well anchors cover objects.

    Args:
        best: (N, 5) from `best_ious`.

    Returns:
        Shares of all objects, over all levels and by the level of the best anchor; None where there are no objects.
    """
    number = len(best)
    overall, level_of = best.max(axis=1, initial=0.0), best.argmax(axis=1)

    def share(chosen: npt.NDArray[np.bool_]) -> float | None:
        return round(float(chosen.sum()) / number, 6) if number else None

    return {
        "recall_50": share(overall >= POOR_IOU),
        "recall_70": share(overall >= GOOD_IOU),
        "objects_with_none": int((overall < POOR_IOU).sum()),
        "levels": [
            {
                "level": name,
                "objects": int((level_of == level).sum()),
                "recall_50": share((level_of == level) & (overall >= POOR_IOU)),
                "recall_70": share((level_of == level) & (overall >= GOOD_IOU)),
            }
            for level, name in enumerate(LEVELS)
        ],
    }


def suggest(objects: Objects, num_scales: int, num_ratios: int) -> tuple[list[float], list[float]]:
    """Scales and ratios of the objects, by k-means in log size and in log ratio, each ascending."""
    sizes = objects.boxes[:, 2:] - objects.boxes[:, :2]
    sizes = sizes[(sizes > 0).all(axis=1)]
    scales = kmeans(np.log(sizes.prod(axis=1)) / 2, num_scales)
    ratios = kmeans(np.log(sizes[:, 0] / sizes[:, 1]), num_ratios)
    return [_rounded(np.exp(s), 1) for s in scales], [_rounded(np.exp(r), 2) for r in ratios]


def _rounded(number: float, digits: int) -> float:
    """So many digits behind the point; of small numbers two that are not zero, for no anchor is without size."""
    return round(float(number), digits) if number >= 10.0 ** (1 - digits) else float(f"{number:.2g}")


def kmeans(values: FloatArray, k: int) -> FloatArray:
    """Centres of k groups of numbers, ascending, by Lloyd's rounds from equal shares; no randomness.

    Args:
        values: (N,), at least one.
        k: centres that are asked for; where there are fewer different numbers, some centres are equal.
    """
    ordered = np.sort(values)
    centres = np.array([part.mean() if len(part) else ordered[-1] for part in np.array_split(ordered, k)])
    for _ in range(KMEANS_ROUNDS):
        nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, ordered)
        moved = np.array([ordered[nearest == i].mean() if (nearest == i).any() else centres[i] for i in range(k)])
        if np.array_equal(moved, centres):
            break
        centres = np.sort(moved)
    return centres


def best_doubling(objects: Objects, ratios: Sequence[float], anchor_stride: int) -> list[float]:
    """Scales that double from level to level, as the strides do, with the most objects at IoU 0.5 and 0.7.

    Judged by at most `MAX_OBJECTS_TRIED` objects, evenly picked.
    """
    every = -(-len(objects.boxes) // MAX_OBJECTS_TRIED)
    few = Objects(objects.boxes[::every], objects.canvases[::every])
    found = []
    for start in SMALLEST_SCALES:
        scales = [_rounded(start * 2**level, 1) for level in range(len(LEVELS))]
        best = best_ious(few, scales, ratios, anchor_stride).max(axis=1)
        found.append(((best >= GOOD_IOU).sum() + (best >= POOR_IOU).sum(), -start, scales))
    return max(found)[2]


def advise(objects: Objects, anchors: AnchorConfig) -> dict[str, Any]:
    """What the configured anchors reach, and candidates with what they would reach, best first.

    Args:
        objects: of the training data.
        anchors: as configured.

    Returns:
        `configured` and `candidates`, each with scales, ratios and `recalls`; no candidates without objects.
    """
    settings = [("configured", list(anchors.scales), list(anchors.ratios))]
    if len(objects.boxes):
        scales, ratios = suggest(objects, len(anchors.scales), len(anchors.ratios))
        doubling = best_doubling(objects, anchors.ratios, anchors.anchor_stride)
        settings += [
            ("k-means scales", scales, list(anchors.ratios)),
            ("k-means scales and ratios", scales, ratios),
            (DOUBLING, doubling, list(anchors.ratios)),
            ("best doubling scales, k-means ratios", doubling, ratios),
        ]
    found = [
        {"name": name, "scales": s, "ratios": r, **recalls(best_ious(objects, s, r, anchors.anchor_stride))}
        for name, s, r in settings
    ]
    candidates = sorted(found[1:], key=lambda entry: (-entry["recall_70"], -entry["recall_50"], entry["name"]))
    return {"anchor_stride": anchors.anchor_stride, "configured": found[0], "candidates": candidates}


def anchors_in_words(advice: dict[str, Any]) -> str:
    """A line for a person: what the configured anchors reach, and whether to keep them.

    Args:
        advice: from `advise`.
    """
    configured = advice["configured"]
    if configured["recall_50"] is None:
        return "there are no objects to judge the anchors by"
    reached = f"{configured['recall_50']:.1%} of the objects by {POOR_IOU}, {configured['recall_70']:.1%} by {GOOD_IOU}"
    text = f"model.anchors.scales {configured['scales']} overlap {reached}"
    # Not the higher overlap: `match_anchors` makes the best anchor of every object positive, however little it overlaps
    # it, so that an object below the higher one is trained on all the same, if by fewer anchors.
    if configured["recall_50"] >= ENOUGH:
        return f"{text}; keep them ({ENOUGH:.0%} by {POOR_IOU} are enough)"
    # Not the k-means scales: they often lose in a training, whatever they reach here. Nor is it said that the doubling
    # ones win: on the nuclei they do not.
    better = next(entry for entry in advice["candidates"] if entry["name"] == DOUBLING)
    text += f"; few ({ENOUGH:.0%} by {POOR_IOU} are enough):"
    if better["recall_50"] <= configured["recall_50"]:
        return f"{text} larger data.canvases would help, if the objects are small on them"
    return f"{text} try {better['scales']}, which overlap {better['recall_50']:.1%}, and take what trains better"


def search_space(advice: dict[str, Any]) -> str:
    """The configured anchors and the candidates as a search space in YAML, over the configuration's own keys."""
    entries = [advice["configured"], *advice["candidates"]]
    space = {
        f"model.anchors.{key}": {"choice": [list(v) for v in dict.fromkeys(tuple(entry[key]) for entry in entries)]}
        for key in ("scales", "ratios")
    }
    lines = [
        "# What:    anchors worth a sweep, from jobs/prepare.py's look at the training boxes; configured ones first.",
        f"# Result:  recall at IoU {POOR_IOU} / {GOOD_IOU} of each, over all objects; that at {POOR_IOU} "
        f"decides, {ENOUGH} is enough:",
        *(f"#          {_recalls(e)}  {e['name']}: scales {e['scales']}, ratios {e['ratios']}" for e in entries),
    ]
    return "\n".join(lines) + "\n" + yaml.safe_dump(space, sort_keys=False, default_flow_style=None)


def _recalls(entry: dict[str, Any]) -> str:
    values = entry["recall_50"], entry["recall_70"]
    return " / ".join("-" if value is None else f"{value:.3f}" for value in values)
