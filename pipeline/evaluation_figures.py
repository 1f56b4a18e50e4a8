"""Figures of an evaluation's page, as PNG files in base64."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

KIND_NAMES = {"bbox": "boxes", "segm": "masks"}
MOST_NAMED_CLASSES = 30  # more names than that do not fit beside a matrix


def _encoded(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def precision_recall(report: Mapping[str, Any]) -> str:
    """Precision over recall of boxes and of masks, a line for each IoU."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6))
    for column, (kind, name) in enumerate(KIND_NAMES.items(), start=1):
        axes = figure.add_subplot(1, 2, column)
        curves = report[kind]["curves"]
        for iou, values in curves.items():
            if iou != "recall":
                axes.plot(curves["recall"], [max(value, 0.0) for value in values], label=f"IoU {iou}")
        axes.set(title=name, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend()
    return _encoded(figure)


def reliability(report: Mapping[str, Any]) -> str:
    """How often detections of a score are right, and how many have it; empty where no detection counts."""
    from matplotlib.figure import Figure

    calibrations = [report[kind]["calibration"] for kind in KIND_NAMES]
    if any(found is None or not any(entry["count"] for entry in found["bins"]) for found in calibrations):
        return ""
    figure = Figure(figsize=(10, 3.6))
    for column, (kind, name) in enumerate(KIND_NAMES.items(), start=1):
        axes = figure.add_subplot(1, 2, column)
        calibration = report[kind]["calibration"]
        bins = [entry for entry in calibration["bins"] if entry["count"]]
        most = max(entry["count"] for entry in bins)
        left = [entry["bin_lower"] for entry in bins]
        width = [entry["bin_upper"] - entry["bin_lower"] for entry in bins]
        axes.bar(left, [entry["avg_accuracy"] for entry in bins], width, align="edge", color="#4a86c5", label="right")
        share = [entry["count"] / most for entry in bins]
        axes.step([*left, left[-1] + width[-1]], [*share, share[-1]], where="post", color="#b26a00", label="detections")
        axes.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle="--")
        axes.set(
            title=f"{name}, calibration error {calibration['ece']:.3f}", xlabel="score", xlim=(0, 1), ylim=(0, 1.02)
        )
        axes.legend()
    return _encoded(figure)


def confusion(report: Mapping[str, Any], class_names: Sequence[str]) -> str:
    """Confusion matrix of masks, rows divided by their sums."""
    from matplotlib.figure import Figure

    matrix = np.array(report["segm"]["confusion"]["matrix"], dtype=float)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(8.0, 3.5 + 0.3 * len(matrix))
    figure = Figure(figsize=(side, side))
    axes = figure.add_subplot(1, 1, 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="truth")
    if len(matrix) <= MOST_NAMED_CLASSES:
        names = [*class_names, "background"]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        for row, column in np.argwhere(matrix > 0).tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{matrix[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=8)
    return _encoded(figure)
