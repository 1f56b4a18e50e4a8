"""The original's bilinear resize, for its images, mini masks and pasted masks (scikit-image's, without smoothing)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def resize_bilinear(values: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[np.float64]:
    """Resize (H, W) or (H, W, C) to (height, width) or (height, width, C).

    Half-pixel centres; outside the picture is zero and blended in, so that the border of an enlarged picture gets
    darker; no anti-aliasing; the result stays within the range of the input.

    Args:
        values: any real type; H and W at least 1.
        height: rows wanted, at least 1.
        width: columns wanted, at least 1.
    """
    x = values.astype(np.float64)
    low, high = x.min(), x.max()
    x = _resize_rows(x, height)
    x = _resize_rows(x.swapaxes(0, 1), width).swapaxes(0, 1)
    clipped: npt.NDArray[np.float64] = np.clip(x, low, high)
    return clipped


def _resize_rows(x: npt.NDArray[np.float64], length: int) -> npt.NDArray[np.float64]:
    position = (np.arange(length) + 0.5) * x.shape[0] / length - 0.5
    first = np.floor(position).astype(np.int64)
    weight = (position - first).reshape(-1, *[1] * (x.ndim - 1))
    border = np.zeros((1, *x.shape[1:]))
    padded = np.concatenate([border, x, border])
    resized: npt.NDArray[np.float64] = padded[first + 1] * (1 - weight) + padded[first + 2] * weight
    return resized
