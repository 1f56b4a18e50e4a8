import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import roi_align

from model.canvas import image_windows
from model.mask_targets import TargetKind, crop_mask_targets
from model.structures import Batch
from tests.model.factories import Bitmap, Scene, Thing, ellipse, make_batch, noise_image, rectangle, tight_box


def windows_of(batch: Batch) -> Tensor:
    return image_windows(batch.image_sizes, (batch.images.shape[2], batch.images.shape[3]), "top_left")


def blob(generator: np.random.Generator, height: int, width: int) -> Bitmap:
    """Smooth-edged random shape somewhere in the image, often on its border."""
    w, h = generator.integers(6, width), generator.integers(6, height)
    x, y = generator.integers(-w // 3, width - w // 2), generator.integers(-h // 3, height - h // 2)
    bitmap = ellipse((int(x), int(y), int(x + w), int(y + h)), height, width)
    if generator.random() < 0.5:
        bitmap &= generator.random((height, width)) < 0.8
    if not bitmap.any():
        bitmap[height // 2, width // 2] = True
    return bitmap


def regions_near(box: Tensor, height: int, width: int, num: int, generator: np.random.Generator) -> Tensor:
    """Random boxes around a box, clipped to the image: also its whole width or height."""
    size = (box[2:] - box[:2]).repeat(2)
    noise = torch.from_numpy(generator.normal(0, 0.25, (num, 4))).float()
    regions = box + noise * size
    corners = torch.stack(
        [
            regions[:, [0, 2]].amin(1),
            regions[:, [1, 3]].amin(1),
            regions[:, [0, 2]].amax(1),
            regions[:, [1, 3]].amax(1),
        ],
        1,
    )
    limit = torch.tensor([width, height, width, height]).float()
    return torch.minimum(corners.clamp(min=0), limit)


def reference_cells(bitmap: Bitmap, regions: Tensor, size: int) -> Tensor:
    """ROIAlign on the full bitmap: regions in original pixels, values before the threshold."""
    full = torch.from_numpy(bitmap).double()[None, None]
    cells: Tensor = roi_align(full, [regions.double()], size, 1.0, sampling_ratio=2, aligned=True)[:, 0]
    return cells


class TestCropMaskTargets:
    @pytest.mark.parametrize("scale", [(1.0, 1.0), (2.0, 2.0), (0.5, 0.5), (1.6, 0.8)])
    @pytest.mark.parametrize("size", [28, 7])
    def test_equals_roi_align_on_the_full_bitmap(self, scale: tuple[float, float], size: int) -> None:
        generator = np.random.default_rng(0)
        original_height, original_width = 40, 60
        height, width = round(original_height * scale[1]), round(original_width * scale[0])
        factor = torch.tensor([width / original_width, height / original_height] * 2)
        bitmaps = [[blob(generator, original_height, original_width) for _ in range(12)] for _ in range(2)]
        bitmaps[0][0] = rectangle((0, 0, 9, 7), original_height, original_width)  # in the corner
        bitmaps[1][0] = rectangle((50, 30, 60, 40), original_height, original_width)  # in the other one
        bitmaps[0][1] = np.ones((original_height, original_width), dtype=bool)
        scenes = [Scene(noise_image(height, width), tuple(Thing(b) for b in row)) for row in bitmaps]
        batch = make_batch(scenes, slots=14, canvas=128)
        different = compared = ones = 0
        for b in range(2):
            for g, bitmap in enumerate(bitmaps[b]):
                regions = regions_near(batch.boxes[b, g], height, width, 8, generator)
                regions = torch.cat([regions, batch.boxes[b, g][None]])
                rows = torch.ones(len(regions), dtype=torch.int64)
                targets = crop_mask_targets(batch, windows_of(batch), rows * b, rows * g, regions, size, "thresholded")
                cells = reference_cells(bitmap, regions / factor, size)
                # A cell that lies at one half may fall to either side, for rounding.
                clear = (cells - 0.5).abs() > 1e-4
                torch.testing.assert_close(targets[clear], (cells >= 0.5).float()[clear], rtol=0, atol=0)
                different += int((~clear).sum())
                compared += cells.numel()
                ones += int(targets.sum())
        assert compared == 2 * 12 * 9 * size * size
        assert different < 0.03 * compared
        assert 0.2 * compared < ones < 0.9 * compared

    def test_by_hand(self) -> None:
        bitmap = np.zeros((4, 6), dtype=bool)
        bitmap[1:3, 1:5] = [[True, True, True, True], [True, True, False, False]]
        batch = make_batch([Scene(noise_image(4, 6), (Thing(bitmap),))])
        assert batch.boxes[0, 0].tolist() == [1, 1, 5, 3]
        zero = torch.tensor([0])
        # A cell is two columns wide and one row high. Its samples lie in the middle of the columns, but a quarter row
        # off the middle of the rows: the cells hold 0.875, 0.75 / 0.875, 0.125.
        targets = crop_mask_targets(
            batch, windows_of(batch), zero, zero, torch.tensor([[1.0, 1, 5, 3]]), 2, "thresholded"
        )
        torch.testing.assert_close(targets, torch.tensor([[[1.0, 1], [1, 0]]]))

    def test_regions_far_from_the_object_are_empty(self) -> None:
        batch = make_batch([Scene(noise_image(64, 64), (Thing(rectangle((5, 5, 20, 20), 64, 64)),))])
        zero = torch.tensor([0])
        assert not crop_mask_targets(
            batch, windows_of(batch), zero, zero, torch.tensor([[30.0, 30, 50, 60]]), 28, "thresholded"
        ).any()
        assert crop_mask_targets(
            batch, windows_of(batch), zero, zero, torch.tensor([[7.0, 7, 18, 18]]), 28, "thresholded"
        ).all()

    def test_each_object_is_read_at_its_offset(self) -> None:
        # Widths that do not fill bytes; the second object of the second image starts in the middle of the buffer.
        things = [Thing(rectangle((0, 0, 3, 3), 64, 64)), Thing(ellipse((10, 10, 33, 41), 64, 64))]
        scenes = [Scene(noise_image(64, 64), tuple(things)), Scene(noise_image(64, 64), tuple(reversed(things)))]
        batch = make_batch(scenes)
        regions = torch.tensor([[10.0, 10, 33, 41]] * 2)
        a = crop_mask_targets(
            batch, windows_of(batch), torch.tensor([0, 1]), torch.tensor([1, 0]), regions, 28, "thresholded"
        )
        torch.testing.assert_close(a[0], a[1])
        assert 0.7 < a.mean() < 0.85  # pi / 4

    def test_no_regions_and_no_masks(self) -> None:
        none = torch.zeros(0, dtype=torch.int64)
        empty = make_batch([Scene(noise_image(64, 64))])
        assert empty.mask_bits.shape == (0,)
        assert crop_mask_targets(empty, windows_of(empty), none, none, torch.zeros(0, 4), 28, "thresholded").shape == (
            0,
            28,
            28,
        )
        # On a GPU all slots take part, also when no image of the batch has an object.
        zeros = torch.zeros(3, dtype=torch.int64)
        targets = crop_mask_targets(
            empty, windows_of(empty), zeros, zeros, torch.tensor([[0.0, 0, 9, 9]] * 3), 28, "thresholded"
        )
        torch.testing.assert_close(targets, torch.zeros(3, 28, 28))

    def test_empty_slots_beside_objects_are_harmless(self) -> None:
        batch = make_batch([Scene(noise_image(64, 64), (Thing(rectangle((5, 5, 20, 20), 64, 64)),))])
        index = torch.tensor([0, 0, 0])
        slots = torch.tensor([0, 1, 3])
        regions = torch.tensor([[5.0, 5, 20, 20], [0, 0, 0, 0], [5, 5, 20, 20]])
        targets = crop_mask_targets(batch, windows_of(batch), index, slots, regions, 28, "thresholded")
        assert targets[0].all()
        assert not targets[1:].any()
        sizes, offsets = batch.mask_sizes.clone(), batch.mask_offsets.clone()
        sizes[0, 1], sizes[0, 3] = torch.tensor([0, 7]), torch.tensor([7, 0])
        offsets[0, [1, 3]] = len(batch.mask_bits)  # behind the last byte
        odd = replace(batch, mask_sizes=sizes, mask_offsets=offsets)
        for kind in ("thresholded", "crop_and_resize"):
            found = crop_mask_targets(odd, windows_of(batch), index, slots, regions, 28, kind)
            assert not found[1:].any()


def test_moving_a_batch_keeps_the_targets() -> None:
    # The bits stay as they are when objects are scaled: only the boxes move.
    batch = make_batch([Scene(noise_image(64, 64), (Thing(ellipse((6, 9, 40, 50), 64, 64)),))])
    half: Batch = replace(
        batch, boxes=batch.boxes / 2, mask_boxes=batch.mask_boxes / 2, image_sizes=batch.image_sizes // 2
    )
    zero, regions = torch.tensor([0]), torch.tensor([[5.3, 11.2, 41.7, 44.9]])
    a = crop_mask_targets(batch, windows_of(batch), zero, zero, regions, 28, "thresholded")
    assert tight_box(ellipse((6, 9, 40, 50), 64, 64)) == (6, 9, 40, 50)
    torch.testing.assert_close(a, crop_mask_targets(half, windows_of(half), zero, zero, regions / 2, 28, "thresholded"))


class TestSoft:
    @pytest.mark.parametrize("scale", [(1.0, 1.0), (2.0, 2.0), (0.5, 0.5), (1.6, 0.8)])
    @pytest.mark.parametrize("size", [28, 7])
    def test_equals_torchvision_on_the_full_bitmap(self, scale: tuple[float, float], size: int) -> None:
        generator = np.random.default_rng(0)
        original_height, original_width = 40, 60
        height, width = round(original_height * scale[1]), round(original_width * scale[0])
        factor = torch.tensor([width / original_width, height / original_height] * 2)
        bitmaps = [blob(generator, original_height, original_width) for _ in range(10)]
        bitmaps[0] = rectangle((0, 0, 9, 7), original_height, original_width)  # in the corner
        bitmaps[1] = rectangle((50, 30, 60, 40), original_height, original_width)  # in the other one
        bitmaps[2] = np.ones((original_height, original_width), dtype=bool)
        batch = make_batch([Scene(noise_image(height, width), tuple(Thing(b) for b in bitmaps))], slots=12, canvas=128)
        full = torch.from_numpy(np.stack(bitmaps))
        touching = between = 0
        for slot in range(len(bitmaps)):
            regions = regions_near(batch.boxes[0, slot], height, width, 8, generator)
            regions = torch.cat(
                [
                    regions,
                    batch.boxes[0, slot][None],
                    torch.tensor([[0.0, 0, width, height], [3, 3, 3.5, 3.4], [-0.3, -0.4, 9, 7]]),
                ]
            )
            zero, slots = torch.zeros(len(regions), dtype=torch.int64), torch.full((len(regions),), slot)
            targets = crop_mask_targets(batch, windows_of(batch), zero, slots, regions, size, "soft")
            expected = project_masks_on_boxes(full, regions / factor, slots, size)
            torch.testing.assert_close(targets, expected, rtol=0, atol=1e-4)
            limit = torch.tensor([width, height])
            touching += int(((regions[:, :2] == 0) | (regions[:, 2:] == limit)).any(dim=1).sum())
            between += int(((targets > 0.01) & (targets < 0.99)).sum())
        assert touching > 20
        assert between > 1000

    def test_each_image_has_its_own_border_and_offset(self) -> None:
        """Two images on one canvas; the second is smaller, and its object reaches its right and lower border."""
        bitmaps = [ellipse((5, 8, 50, 60), 64, 64), rectangle((20, 10, 40, 48), 48, 40)]
        batch = make_batch([Scene(noise_image(*b.shape), (Thing(b),)) for b in bitmaps])
        regions = torch.tensor([[4.5, 3.2, 51.7, 64], [12.3, 9.1, 40, 48]])
        targets = crop_mask_targets(
            batch, windows_of(batch), torch.arange(2), torch.zeros(2).long(), regions, 14, "soft"
        )
        for row, bitmap in enumerate(bitmaps):
            expected = project_masks_on_boxes(torch.from_numpy(bitmap)[None], regions[row][None], torch.tensor([0]), 14)
            torch.testing.assert_close(targets[row], expected[0], rtol=0, atol=1e-5)

    def test_images_in_the_centre_of_their_canvas(self) -> None:
        batch = make_batch([Scene(noise_image(40, 48), (Thing(rectangle((0, 9, 30, 40), 40, 48)),))])
        zero, regions = torch.tensor([0]), torch.tensor([[0.0, 5.5, 25, 40]])
        expected = crop_mask_targets(batch, windows_of(batch), zero, zero, regions, 14, "soft")
        moved = replace(batch, mask_boxes=batch.mask_boxes + torch.tensor([8.0, 12, 8, 12]))
        windows = image_windows(batch.image_sizes, (64, 64), "centre")
        found = crop_mask_targets(moved, windows, zero, zero, regions + torch.tensor([8.0, 12, 8, 12]), 14, "soft")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def crop_and_resize_of_the_original(
    bits: Bitmap, region: list[float], box: list[float], size: int
) -> npt.NDArray[np.float64]:
    """`detection_targets_graph` with mini masks: the region in shares of the object's box, then TensorFlow's operator,
    not yet rounded.

    Args:
        bits: inside the object's box.
        region: xyxy, last pixel inside.
        box: of the object, xyxy, last pixel inside.
        size: cells a side.
    """
    height, width = bits.shape
    x0, x1 = ((region[i] - box[0]) / (box[2] - box[0]) for i in (0, 2))
    y0, y1 = ((region[i] - box[1]) / (box[3] - box[1]) for i in (1, 3))
    cells = np.zeros((size, size))
    for i in range(size):
        y = (y0 + (y1 - y0) * i / (size - 1)) * (height - 1)
        for j in range(size):
            x = (x0 + (x1 - x0) * j / (size - 1)) * (width - 1)
            if 0 <= y <= height - 1 and 0 <= x <= width - 1:
                rows, columns = [math.floor(y), math.ceil(y)], [math.floor(x), math.ceil(x)]
                square = bits[np.ix_(rows, columns)].astype(float)
                across = square[:, 0] * (1 - (x - columns[0])) + square[:, 1] * (x - columns[0])
                cells[i, j] = across[0] * (1 - (y - rows[0])) + across[1] * (y - rows[0])
    return cells


class TestCropAndResize:
    @pytest.mark.parametrize("scale", [1.0, 1.7])
    def test_equals_a_loop_over_its_samples(self, scale: float) -> None:
        generator = np.random.default_rng(3)
        height, width = round(40 * scale), round(60 * scale)
        bitmaps = [blob(generator, 40, 60) for _ in range(8)]
        batch = make_batch([Scene(noise_image(height, width), tuple(Thing(b) for b in bitmaps))], slots=8, canvas=128)
        ones = zeros = 0
        for slot, bitmap in enumerate(bitmaps):
            x0, y0, x1, y1 = tight_box(bitmap)
            regions = regions_near(batch.boxes[0, slot], height, width, 6, generator) - torch.tensor([0.0, 0, 1, 1])
            index = torch.zeros(6, dtype=torch.int64)
            targets = crop_mask_targets(batch, windows_of(batch), index, index + slot, regions, 28, "crop_and_resize")
            box = (batch.boxes[0, slot] - torch.tensor([0.0, 0, 1, 1])).tolist()
            for target, region in zip(targets, regions.tolist(), strict=True):
                cells = crop_and_resize_of_the_original(bitmap[y0:y1, x0:x1], region, box, 28)
                clear = np.abs(cells - 0.5) > 1e-4  # the others may fall to either side, for rounding
                np.testing.assert_array_equal(target.numpy()[clear], np.round(cells)[clear])
                ones, zeros = ones + int(target.sum()), zeros + int((1 - target).sum())
        assert min(ones, zeros) > 5000

    def test_by_hand(self) -> None:
        # The object's own box: the grid's corners lie on the centres of its corner pixels.
        bitmap = np.zeros((6, 7), dtype=bool)
        bitmap[1:4, 2:5] = [[True, False, True], [False, False, False], [True, True, False]]
        batch = make_batch([Scene(noise_image(6, 7), (Thing(bitmap),))])
        zero = torch.tensor([0])
        own = torch.tensor([[2.0, 1, 4, 3]])
        targets = crop_mask_targets(batch, windows_of(batch), zero, zero, own, 3, "crop_and_resize")
        torch.testing.assert_close(targets, torch.tensor([[[1.0, 0, 1], [0, 0, 0], [1, 1, 0]]]))
        # One pixel to the left: what lies outside of the box is empty.
        moved = crop_mask_targets(
            batch, windows_of(batch), zero, zero, own - torch.tensor([1.0, 0, 1, 0]), 3, "crop_and_resize"
        )
        torch.testing.assert_close(moved, torch.tensor([[[0.0, 1, 0], [0, 0, 0], [0, 1, 1]]]))


@pytest.mark.parametrize("kind", ["thresholded", "soft", "crop_and_resize"])
def test_no_regions_of_any_kind(kind: TargetKind) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    for things in ((), (Thing(rectangle((5, 5, 20, 20), 64, 64)),)):
        batch = make_batch([Scene(noise_image(64, 64), things)])
        found = crop_mask_targets(batch, windows_of(batch), none, none, torch.zeros(0, 4), 28, kind)
        assert found.shape == (0, 28, 28)
