from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from model.masks import encode_detections, expand_boxes, paste_masks, paste_masks_in_boxes, run_lengths
from model.structures import Detections
from tests.model.factories import Bitmap, rectangle


def detections_of(boxes: list[list[float]], masks: Tensor) -> Detections:
    num = len(boxes)
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.ones(num),
        torch.ones(num, dtype=torch.int64),
        masks,
    )


def random_detections(num: int, height: int, width: int, cells: int = 28, seed: int = 0) -> Detections:
    """Smooth masks in boxes of all sizes, some on the border and some the whole image."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(num, 2, 2, generator=generator) * torch.tensor([width, height]) * 1.2
    corners = torch.minimum(corners, torch.tensor([float(width), float(height)]))
    boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    boxes[::7] = torch.tensor([0.0, 0, width, height])
    coarse = torch.rand(num, 1, 5, 5, generator=generator)
    masks = torch.nn.functional.interpolate(coarse, size=(cells, cells), mode="bilinear")[:, 0]
    return detections_of(boxes.tolist(), masks)


class TestPaste:
    @pytest.mark.parametrize("cells", [28, 14])
    def test_equals_torchvision(self, cells: int) -> None:
        height, width = 50, 70
        found = random_detections(60, height, width, cells)
        expected = paste_masks_in_image(found.mask_probabilities[:, None], found.boxes, (height, width))[:, 0] > 0.5
        pasted = paste_masks(found, height, width)
        assert pasted.shape == (60, height, width)
        assert 0.1 < pasted.mean() < 0.9
        np.testing.assert_array_equal(pasted, expected.numpy())

    def test_a_full_mask_fills_its_box(self) -> None:
        found = detections_of([[10, 20, 38, 48]], torch.ones(1, 28, 28))
        # The convention counts the column and the row at the right and bottom corner as inside.
        np.testing.assert_array_equal(paste_masks(found, 60, 60)[0], rectangle((10, 20, 39, 49), 60, 60))

    def test_crops_lie_inside_the_image(self) -> None:
        found = random_detections(60, 50, 70)
        for top, left, crop in paste_masks_in_boxes(found, 50, 70):
            assert 0 <= top <= top + crop.shape[0] <= 50
            assert 0 <= left <= left + crop.shape[1] <= 70

    @pytest.mark.parametrize("box", [[80, 10, 90, 20], [10, 80, 20, 90], [-40, 5, -20, 15], [5, -40, 15, -20]])
    def test_a_box_outside_of_the_image_has_an_empty_mask(self, box: list[float]) -> None:
        found = detections_of([box], torch.ones(1, 28, 28))
        assert not paste_masks(found, 50, 70).any()
        assert encode_detections(found, 50, 70)[0]["size"] == [50, 70]

    def test_no_detections(self) -> None:
        none = detections_of([], torch.zeros(0, 28, 28))
        assert paste_masks(none, 5, 6).shape == (0, 5, 6)
        assert paste_masks_in_boxes(none, 5, 6) == []
        assert encode_detections(none, 5, 6) == []

    def test_expand_boxes_by_hand(self) -> None:
        boxes = np.array([[10, 20, 30, 60]], dtype=np.float32)
        np.testing.assert_array_equal(expand_boxes(boxes, 1.5), [[5, 10, 35, 70]])


def full_bitmap(crop: Bitmap, top: int, left: int, height: int, width: int) -> Bitmap:
    bitmap = np.zeros((height, width), dtype=bool)
    bitmap[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    return bitmap


def coco_encode(bitmap: Bitmap) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(bitmap.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def encoded_run_lengths(crop: Bitmap, top: int, left: int, height: int, width: int) -> dict[str, Any]:
    counts = run_lengths(crop, top, left, height, width)
    assert sum(counts) == height * width
    assert all(count > 0 for count in counts[1:])
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


class TestRunLengths:
    @pytest.mark.parametrize(
        ("crop", "top", "left", "expected"),
        [
            # Images of 3 rows and 4 columns, column by column.
            ([[1]], 1, 1, [4, 1, 7]),
            ([[1]], 0, 0, [0, 1, 11]),
            ([[1]], 2, 3, [11, 1]),
            ([[1, 1], [1, 0]], 0, 1, [3, 2, 1, 1, 5]),
            ([[1, 1], [1, 1], [1, 1]], 0, 1, [3, 6, 3]),  # full columns are one run
            ([[0, 1], [0, 1], [1, 0]], 0, 2, [8, 3, 1]),  # the bottom of a column runs into the top of the next
            ([[0, 0], [0, 0]], 0, 0, [12]),
        ],
    )
    def test_by_hand(self, crop: list[list[int]], top: int, left: int, expected: list[int]) -> None:
        assert run_lengths(np.array(crop, dtype=bool), top, left, 3, 4) == expected

    def test_full_and_empty_images(self) -> None:
        assert run_lengths(np.ones((3, 4), dtype=bool), 0, 0, 3, 4) == [0, 12]
        assert run_lengths(np.zeros((0, 4), dtype=bool), 2, 0, 3, 4) == [12]
        assert run_lengths(np.zeros((2, 0), dtype=bool), 0, 4, 3, 4) == [12]

    def test_equals_pycocotools_on_thousands_of_crops(self) -> None:
        generator = np.random.default_rng(0)
        full_height = at_bottom = touching_corner = 0
        for _ in range(5000):
            height, width = generator.integers(1, 14, 2).tolist()
            h, w = int(generator.integers(1, height + 1)), int(generator.integers(1, width + 1))
            top, left = int(generator.integers(0, height - h + 1)), int(generator.integers(0, width - w + 1))
            crop = generator.random((h, w)) < generator.choice([0.0, 0.1, 0.5, 0.9, 1.0])
            found = encoded_run_lengths(crop, top, left, height, width)
            assert found == coco_encode(full_bitmap(crop, top, left, height, width))
            full_height += h == height
            at_bottom += top + h == height and bool(crop[-1].any())
            touching_corner += top + h == height and left + w == width and bool(crop[-1, -1])
        assert min(full_height, at_bottom, touching_corner) > 300

    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_equals_pycocotools_on_any_crop(self, data: st.DataObject) -> None:
        height, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
        h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
        top, left = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
        cells = data.draw(st.lists(st.booleans(), min_size=h * w, max_size=h * w))
        crop = np.array(cells, dtype=bool).reshape(h, w)
        found = encoded_run_lengths(crop, top, left, height, width)
        assert found == coco_encode(full_bitmap(crop, top, left, height, width))


def test_encode_detections_equals_pycocotools_on_the_pasted_bitmaps() -> None:
    visited = 0
    for seed, (height, width) in enumerate([(50, 70), (64, 64), (31, 90)]):
        found = random_detections(60, height, width, seed=seed)
        encoded = encode_detections(found, height, width)
        bitmaps = paste_masks(found, height, width)
        for rle, bitmap in zip(encoded, bitmaps, strict=True):
            assert rle == coco_encode(bitmap)
            visited += int(bitmap.any())
    assert visited > 150
