import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torchvision.ops import roi_align

from model.canvas import image_windows
from model.mask_targets import crop_mask_targets
from model.structures import Batch
from pipeline.augment import flip
from pipeline.batches import collate, table_rows
from pipeline.preprocess import minimise_mask, pack_mask, unpack_mask
from pipeline.sample import SAMPLE_SCHEMA, Sample, mask_offsets, sample_from_row, sample_to_values, with_mini_masks
from tests.pipeline.factories import Bitmap, bitmap_of, ellipse_polygon, noise, png, record_of, row_of

ACTIVE = np.array([[True, True, True, False], [True, False, True, True]])  # of two sources


def planned(sample: Sample, position: int = 0, source: int = 0, canvas: tuple[int, int] = (64, 96)) -> dict[str, Any]:
    """The sample as a row of the stream."""
    return {
        "position": position,
        "row": position,
        "random_key": 1000 + position,
        "source": source,
        "canvas_height": canvas[0],
        "canvas_width": canvas[1],
        **sample_to_values(sample),
    }


def through_arrow(rows: Sequence[dict[str, Any]]) -> list[Any]:
    return table_rows(pa.Table.from_pylist(list(rows), schema=SAMPLE_SCHEMA))


def sample_with(folder: Path, bitmaps: Sequence[Bitmap], seed: int = 0, size: tuple[int, int] = (48, 64)) -> Sample:
    path = folder / f"{seed}.png"
    path.write_bytes(png(noise(*size, seed=seed)))
    return sample_from_row(row_of(record_of(path, bitmaps, *size)))


def ellipses(number: int, seed: int, size: tuple[int, int] = (48, 64)) -> list[Bitmap]:
    rng = np.random.default_rng(seed)
    return [bitmap_of([ellipse_polygon(rng, *size)], *size) for _ in range(number)]


def targets_of(
    batch: Batch, image_index: torch.Tensor, gt_index: torch.Tensor, regions: torch.Tensor, size: int
) -> torch.Tensor:
    windows = image_windows(batch.image_sizes, (batch.images.shape[2], batch.images.shape[3]), "top_left")
    return crop_mask_targets(batch, windows, image_index, gt_index, regions, size, "thresholded")


def test_mini_masks_are_squares_in_the_same_boxes(tmp_path: Path) -> None:
    sample = sample_with(tmp_path, ellipses(3, 0))
    mini = with_mini_masks(sample, 8)
    assert mini.mask_sizes.tolist() == [[8, 8]] * 3
    np.testing.assert_array_equal(mini.mask_boxes, sample.mask_boxes)
    starts = mask_offsets(sample.mask_sizes)
    for index, (height, width) in enumerate(sample.mask_sizes.tolist()):
        whole = unpack_mask(sample.mask_bits[starts[index] : starts[index + 1]], height, width)
        found = unpack_mask(mini.mask_bits[8 * index : 8 * index + 8], 8, 8)
        np.testing.assert_array_equal(found, minimise_mask(whole, 8))
    batch = collate(through_arrow([planned(mini)]), ACTIVE)
    assert batch.mask_sizes[0, :3].tolist() == [[8, 8]] * 3

    nothing = sample_with(tmp_path, [], seed=1)
    assert with_mini_masks(nothing, 8).mask_bits.size == 0


def test_row_becomes_a_sample_by_hand() -> None:
    bits = np.frombuffer(bytes([0b11110000]), dtype=np.uint8)
    row = {
        "height": 10,
        "width": 20,
        "image_height": 20,  # twice as high
        "image_width": 60,  # three times as wide
        "image": np.arange(20 * 60 * 3, dtype=np.uint32).astype(np.uint8),
        "classes": np.array([2, 1], dtype=np.int32),
        "is_crowd": np.array([0, 1]),
        "bboxes": np.array([1.5, 2, 3, 4, -2, 6, 30, 7]),  # the second one leaves the image on three sides
        "mask_boxes": np.array([1, 2, 5, 3, 0, 6, 2, 8], dtype=np.int32),
        "mask_bits": np.concatenate([bits, bits]),
    }
    sample = sample_from_row(row)
    np.testing.assert_array_equal(sample.boxes, np.array([[4.5, 4, 13.5, 12], [0, 12, 60, 20]], dtype=np.float32))
    np.testing.assert_array_equal(sample.mask_boxes, np.array([[3, 4, 15, 6], [0, 12, 6, 16]], dtype=np.float32))
    np.testing.assert_array_equal(sample.mask_sizes, [[1, 4], [2, 2]])
    np.testing.assert_array_equal(sample.is_crowd, [False, True])
    assert sample.image.shape == (20, 60, 3)
    assert sample.image[0, 1].tolist() == [3, 4, 5]
    assert sample.boxes.dtype == sample.mask_boxes.dtype == np.float32


def test_first_bytes_of_masks_by_hand() -> None:
    sizes = np.array([[3, 3], [1, 8], [5, 5]], dtype=np.int32)  # 9, 8 and 25 bits
    np.testing.assert_array_equal(mask_offsets(sizes), [0, 2, 3, 7])
    np.testing.assert_array_equal(mask_offsets(np.zeros((0, 2), dtype=np.int32)), [0])


def test_batch_by_hand() -> None:
    image = noise(2, 3)
    sample = Sample(
        image=image,
        classes=np.array([2], dtype=np.int32),
        is_crowd=np.array([True]),
        boxes=np.array([[0, 0, 2, 1]], dtype=np.float32),
        mask_boxes=np.array([[0, 0, 3, 2]], dtype=np.float32),
        mask_sizes=np.array([[4, 5]], dtype=np.int32),
        mask_bits=np.array([1, 2, 3], dtype=np.uint8),
    )
    batch = collate([planned(sample, 5, source=1, canvas=(4, 6)), planned(sample, 6, source=0, canvas=(4, 6))], ACTIVE)
    assert batch.images.shape == (2, 3, 4, 6)
    np.testing.assert_array_equal(batch.images[0, :, :2, :3], image.transpose(2, 0, 1))
    assert int(batch.images[0].sum()) == int(image.astype(np.int64).sum())  # nothing but the image
    assert batch.image_sizes.tolist() == [[2, 3], [2, 3]]
    assert batch.classes.tolist() == [[2] + [0] * 7] * 2  # at least eight slots
    assert batch.is_crowd.tolist() == [[True] + [False] * 7] * 2
    assert batch.boxes[0, 0].tolist() == [0, 0, 2, 1]
    assert batch.mask_boxes[1, 0].tolist() == [0, 0, 3, 2]
    assert batch.mask_sizes[0, 0].tolist() == [4, 5]
    assert batch.mask_offsets[:, 0].tolist() == [0, 3]
    assert batch.mask_bits.tolist() == [1, 2, 3, 1, 2, 3, 0]
    assert batch.random_keys.tolist() == [1005, 1006]
    assert batch.active_class_ids.tolist() == [ACTIVE[1].tolist(), ACTIVE[0].tolist()]


@pytest.mark.parametrize(("objects", "slots"), [(0, 8), (8, 8), (9, 16), (17, 32)])
def test_slots_are_a_power_of_two(tmp_path: Path, objects: int, slots: int) -> None:
    sample = sample_with(tmp_path, ellipses(objects, seed=1))
    batch = collate(through_arrow([planned(sample), planned(sample_with(tmp_path, [], 5))]), ACTIVE)
    assert batch.classes.shape == (2, slots)
    assert (batch.classes > 0).sum(dim=1).tolist() == [objects, 0]


def test_images_without_objects_make_a_batch(tmp_path: Path) -> None:
    batch = collate(through_arrow([planned(sample_with(tmp_path, [], seed)) for seed in range(2)]), ACTIVE)
    assert batch.num_images == 2
    assert batch.classes.shape == (2, 8)
    assert not batch.classes.any()
    assert not batch.mask_sizes.any()
    assert batch.mask_bits.numel() > 0  # an index into it is always legal
    nothing = torch.zeros(0, dtype=torch.int64)
    assert targets_of(batch, nothing, nothing, torch.zeros(0, 4), 28).shape == (0, 28, 28)


def test_types_are_those_of_the_batch(tmp_path: Path) -> None:
    batch = collate(through_arrow([planned(sample_with(tmp_path, ellipses(2, 0)))]), ACTIVE)
    found = {field.name: getattr(batch, field.name).dtype for field in dataclasses.fields(Batch)}
    long, real, byte = torch.int64, torch.float32, torch.uint8
    assert found == {
        "images": byte,
        "image_sizes": long,
        "boxes": real,
        "classes": long,
        "is_crowd": torch.bool,
        "mask_boxes": real,
        "mask_sizes": long,
        "mask_offsets": long,
        "mask_bits": byte,
        "active_class_ids": torch.bool,
        "random_keys": long,
    }


def test_alone_is_the_same_as_in_a_batch(tmp_path: Path) -> None:
    samples = [sample_with(tmp_path, ellipses(number, number), seed=number) for number in (3, 0, 12, 1)]
    rows = [planned(sample, index, source=index % 2) for index, sample in enumerate(samples)]
    together = collate(through_arrow(rows), ACTIVE)
    assert together.classes.shape == (4, 16)
    for index, row in enumerate(rows):
        alone = collate(through_arrow([row]), ACTIVE)
        slots = alone.classes.shape[1]
        assert not together.classes[index, slots:].any()
        for name in ("images", "image_sizes", "active_class_ids", "random_keys"):
            torch.testing.assert_close(getattr(together, name)[index], getattr(alone, name)[0], rtol=0, atol=0)
        for name in ("boxes", "classes", "is_crowd", "mask_boxes", "mask_sizes"):
            torch.testing.assert_close(getattr(together, name)[index, :slots], getattr(alone, name)[0], rtol=0, atol=0)
        number = int((alone.classes > 0).sum())
        slot, where = torch.arange(number), torch.full((number,), index)
        torch.testing.assert_close(
            targets_of(together, where, slot, together.boxes[index, :number], 28),
            targets_of(alone, torch.zeros_like(where), slot, alone.boxes[0, :number], 28),
            rtol=0,
            atol=0,
        )


def test_step_must_not_mix_canvases(tmp_path: Path) -> None:
    sample = sample_with(tmp_path, [])
    with pytest.raises(AssertionError, match="a step mixes canvases"):
        collate([planned(sample), planned(sample, 1, canvas=(96, 96))], ACTIVE)


def test_arrow_keeps_every_value(tmp_path: Path) -> None:
    rows = [planned(sample_with(tmp_path, ellipses(number, number), number), number) for number in (2, 0, 1)]
    again = through_arrow(rows)
    assert len(again) == 3
    for row, other in zip(rows, again, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            kept = np.frombuffer(other[name], np.uint8).tobytes() if isinstance(value, bytes) else other[name]
            np.testing.assert_array_equal(kept, value)


@pytest.mark.parametrize("flips", [(), (1,), (0,), (0, 1)])
def test_mask_targets_are_those_of_the_full_bitmap(tmp_path: Path, flips: tuple[int, ...]) -> None:
    """Equal to ROIAlign on the bitmap in original resolution, for regions that are not the mask's own box."""
    size = 28
    cases = {(48, 64): 5, (41, 37): 4, (100, 150): 6}  # enlarged, and reduced, by whole and broken factors
    samples, bitmaps = [], []
    for index, (shape, number) in enumerate(cases.items()):
        drawn = ellipses(number, seed=index, size=shape)
        sample = sample_with(tmp_path, drawn, seed=index, size=shape)
        for axis in flips:
            sample, drawn = flip(sample, axis), [np.flip(bitmap, axis) for bitmap in drawn]
        samples.append(sample)
        bitmaps.append(drawn)
    rows = [planned(sample, index, canvas=(96, 96)) for index, sample in enumerate(samples)]
    batch = collate(through_arrow(rows), ACTIVE)
    generator = torch.Generator().manual_seed(0)
    unequal = compared = 0
    for index, drawn in enumerate(bitmaps):
        height, width = batch.image_sizes[index].tolist()
        for slot, bitmap in enumerate(drawn):
            jitter = torch.rand(6, 4, generator=generator) * 12 - 6
            regions = batch.boxes[index, slot] + torch.cat([torch.zeros(1, 4), jitter[1:]])
            regions[:, 0::2] = regions[:, 0::2].clamp(0, width)
            regions[:, 1::2] = regions[:, 1::2].clamp(0, height)
            scale = torch.tensor([bitmap.shape[1] / width, bitmap.shape[0] / height] * 2)
            # float64: what lies within a rounding error of one half may fall either way.
            averages = roi_align(
                torch.from_numpy(bitmap.copy()).double()[None, None],
                [(regions * scale).double()],
                output_size=size,
                sampling_ratio=2,
                aligned=True,
            )[:, 0]
            found = targets_of(batch, torch.full((6,), index), torch.full((6,), slot), regions, size)
            sure = (averages - 0.5).abs() > 1e-4
            torch.testing.assert_close(found[sure], (averages >= 0.5).float()[sure], rtol=0, atol=0)
            unequal += int((~sure).sum())
            compared += int(sure.sum())
            assert 0.05 < float(found.mean()) < 1
    assert compared == 15 * 6 * size * size - unequal
    assert unequal < 0.02 * compared


def test_bits_of_a_sample_are_those_of_the_row(tmp_path: Path) -> None:
    bitmaps = ellipses(3, seed=2)
    sample = sample_with(tmp_path, bitmaps)
    assert sample.mask_bits.tobytes() == b"".join(pack_mask(bitmap)[1] for bitmap in bitmaps)
