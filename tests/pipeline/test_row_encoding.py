import dataclasses
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.coco import Annotation, ImageRecord
from pipeline.config import AugmentSettings, DataSettings
from pipeline.preprocess import resize_image
from pipeline.row_encoding import ImageLeftOut, RowSettings, check_mask, encode_row
from pipeline.shards import ROW_SCHEMA, decode_jpeg, row_digest
from tests.pipeline.factories import noise, png, record_of, row_settings


def test_row_by_hand(tmp_path: Path) -> None:
    pixels = noise(48, 64)
    (tmp_path / "a.png").write_bytes(png(pixels))
    bitmap = np.zeros((48, 64), dtype=bool)
    bitmap[10:13, 20:24] = True
    record = record_of(tmp_path / "a.png", [bitmap], 48, 64, classes=[2])
    values, problems = encode_row(9, record, row_settings())
    assert list(values) == ROW_SCHEMA.names
    assert problems == []
    digest = row_digest(values)
    assert values.pop("digest") == digest
    image = np.frombuffer(values["image"], np.uint8).reshape(64, 85, 3)  # 4 / 3 of its size
    np.testing.assert_array_equal(image, resize_image(pixels, 64, 85))
    del values["image"]
    assert values == {
        "row": 9,
        "source": 0,
        "image_id": 1,
        "file_name": "a.png",
        "file_sha256": hashlib.sha256((tmp_path / "a.png").read_bytes()).digest(),
        "height": 48,
        "width": 64,
        "canvas": 0,
        "image_height": 64,
        "image_width": 85,
        "annotation_ids": [1],
        "classes": [2],
        "is_crowd": [False],
        "bboxes": [20, 10, 4, 3],
        "areas": [12],
        "mask_boxes": [20, 10, 24, 13],
        "mask_bits": bytes([0b11111111, 0b11110000]),
    }


def test_object_without_a_pixel_is_dropped_and_the_others_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(noise(48, 64)))
    full = np.ones((48, 64), dtype=bool)
    record = record_of(tmp_path / "a.png", [full, full, full], 48, 64)
    first, second, third = record.annotations
    nothing = dataclasses.replace(second, segmentation={"size": [48, 64], "counts": [48 * 64]})
    values, problems = encode_row(0, dataclasses.replace(record, annotations=(first, nothing, third)), row_settings())
    assert values["annotation_ids"] == [1, 3]
    assert (len(values["mask_boxes"]), len(values["mask_bits"])) == (8, 2 * 48 * 64 // 8)
    assert [(p.kind, p.policy, p.annotation_id, p.reason) for p in problems] == [
        ("empty_mask", "drop", 2, "annotation 2: mask covers no pixel")
    ]


def turned(orientation: int, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    return buffer.getvalue()


BOMB = b"GIF89a" + (65535).to_bytes(2, "little") * 2 + b"\x00\x00\x00" + b",\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"


@pytest.mark.parametrize(
    ("content", "kind", "reason"),
    [
        (b"no image", "unreadable_image", "cannot be decoded (no image format that Pillow knows)"),
        (png(noise(50, 64))[:-200], "unreadable_image", "cannot be decoded"),
        (png(noise(48, 64)), "size_mismatch", "is 64 x 48 pixels, its annotations say 64 x 50"),
        (png(noise(64, 50)), "size_mismatch", "has the file lost its EXIF orientation?"),
        (BOMB, "decompression_bomb", "is refused (Image size (4294836225 pixels) exceeds limit"),
        (None, "unreadable_image", "a.png"),
    ],
)
def test_image_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None, kind: str, reason: str) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    for policy in ("error", "drop"):
        with pytest.raises(ImageLeftOut) as caught:
            encode_row(0, record_of(tmp_path / "a.png", [], 50, 64), row_settings(policies={kind: policy}))
        problem = caught.value.problem
        assert (problem.kind, problem.policy, problem.level) == (kind, policy, "image")
        assert (problem.image_id, problem.file_name) == (1, "a.png")
        assert problem.reason.startswith(f"{tmp_path}/a.png: ")
        assert reason in problem.reason


@pytest.mark.parametrize(
    ("orientation", "shape", "size", "how"),
    [
        (6, (48, 64), (64, 48), "it is turned, as its annotations have it"),
        (6, (48, 64), (48, 64), "it is not turned: its annotations were made on the stored pixels"),
        (3, (48, 64), (48, 64), "its size does not tell whether"),
        (8, (64, 64), (64, 64), "its size does not tell whether"),
    ],
)
def test_exif_orientation_is_told(
    tmp_path: Path, orientation: int, shape: tuple[int, int], size: tuple[int, int], how: str
) -> None:
    (tmp_path / "a.png").write_bytes(turned(orientation, noise(*shape)))
    record = record_of(tmp_path / "a.png", [], *size)
    _, (problem,) = encode_row(0, record, row_settings())
    assert (problem.kind, problem.policy) == ("exif_orientation", "keep")
    assert how in problem.reason
    assert f"EXIF orientation {orientation};" in problem.reason
    with pytest.raises(ImageLeftOut):
        encode_row(0, record, row_settings(policies={"exif_orientation": "drop"}))


ANNOTATION = Annotation(7, 1, (10.0, 20.0, 30.0, 10.0), 300.0, False, [])
RECORD = ImageRecord(0, 1, "a.png", "/a.png", 48, 64, (ANNOTATION,))


def checked(
    bbox: tuple[float, float, float, float], area: float, **policies: str
) -> tuple[Annotation | None, list[str]]:
    annotation = dataclasses.replace(ANNOTATION, bbox=bbox, area=area)
    found, problems = check_mask(annotation, (10, 20, 40, 30), 300, RECORD, row_settings(policies=policies))
    return found, [problem.kind for problem in problems]


def test_tolerances_by_hand() -> None:
    assert checked((10, 20, 30, 10), 300)[1] == []
    assert checked((8, 20, 32, 10), 300)[1] == []  # 2 pixels
    assert checked((7.9, 20, 32.1, 10), 300)[1] == ["box_disagrees_with_mask"]
    assert checked((10, 20, 30, 12.5), 300)[1] == ["box_disagrees_with_mask"]
    assert checked((10, 20, 30, 10), 260)[1] == []  # 13 % of 300
    assert checked((10, 20, 30, 10), 350)[1] == []  # 14 % of 350
    assert checked((10, 20, 30, 10), 250)[1] == ["area_disagrees_with_mask"]
    assert checked((10, 20, 30, 10), 360)[1] == ["area_disagrees_with_mask"]


def test_policies_on_boxes_and_areas() -> None:
    both = ["box_disagrees_with_mask", "area_disagrees_with_mask"]
    kept, kinds = checked((0, 20, 40, 10), 900)
    assert kept is not None
    assert (kept.bbox, kept.area, kinds) == ((0, 20, 40, 10), 900, both)
    fixed, kinds = checked((0, 20, 40, 10), 900, **dict.fromkeys(both, "fix"))
    assert fixed is not None
    assert (fixed.bbox, fixed.area, kinds) == ((10, 20, 30, 10), 300, both)
    for kind in both:
        for policy in ("drop", "error"):
            assert checked((0, 20, 40, 10), 900, **{kind: policy})[0] is None
    mended, kinds = checked((10, 20, 0, 10), 300, box_without_size="fix")
    assert mended is not None
    assert (mended.bbox, kinds) == ((10, 20, 30, 10), [])  # the check of the records has told it already


def test_an_area_that_is_not_given_is_that_of_the_mask() -> None:
    annotation = dataclasses.replace(ANNOTATION, bbox=(10, 20, 30, 10), area=None)
    found, problems = check_mask(annotation, (10, 20, 40, 30), 150, RECORD, row_settings())
    assert found is not None
    assert (found.area, problems) == (150, [])


def test_an_image_that_loses_its_last_annotation_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(noise(48, 64)))
    record = record_of(tmp_path / "a.png", [np.ones((48, 64), dtype=bool)], 48, 64)
    nothing = dataclasses.replace(record.annotations[0], segmentation={"size": [48, 64], "counts": [48 * 64]})
    record = dataclasses.replace(record, annotations=(nothing,))
    values, problems = encode_row(0, record, row_settings())
    assert values["annotation_ids"] == []
    assert [(problem.kind, problem.policy) for problem in problems] == [
        ("empty_mask", "drop"), ("image_without_annotations", "keep"),
    ]  # fmt: skip
    with pytest.raises(ImageLeftOut, match=r"image 1 .* has no annotation that can be used"):
        encode_row(0, record, row_settings(policies={"image_without_annotations": "drop"}))


def test_jpeg_is_smaller_and_close(tmp_path: Path) -> None:
    y, x = np.mgrid[:64, :96]
    smooth = np.stack([2 * x, 3 * y, x + y], axis=2).astype(np.uint8)
    (tmp_path / "a.png").write_bytes(png(smooth))
    settings = dataclasses.replace(row_settings(), image_format="jpeg")
    values, _ = encode_row(0, record_of(tmp_path / "a.png", [], 64, 96), settings)
    assert len(values["image"]) < smooth.size / 4
    pixels = decode_jpeg(values["image"]).reshape(64, 96, 3).astype(int)
    assert np.abs(pixels - smooth).max() <= 8
    assert values["digest"] == row_digest(values)


def test_digest_notices_every_value(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(noise(48, 64)))
    values, _ = encode_row(0, record_of(tmp_path / "a.png", [np.ones((48, 64), dtype=bool)], 48, 64), row_settings())
    digests = {values["digest"]}
    for name in ROW_SCHEMA.names[:-1]:
        value = values[name]
        other: Any = value + type(value)([0]) if isinstance(value, list) else value
        if isinstance(value, bytes):
            other = value[:-1] + bytes([value[-1] ^ 1])
        elif isinstance(value, str):
            other = value + "x"
        elif isinstance(value, int):
            other = value + 1
        digests.add(row_digest({**values, name: other}))
    assert len(digests) == len(ROW_SCHEMA.names)


def test_the_size_and_the_way_of_resizing_are_those_of_the_settings(tmp_path: Path) -> None:
    record = record_of(tmp_path / "a.png", [], 64, 96)
    (tmp_path / "a.png").write_bytes(png(noise(64, 96)))
    settings = dataclasses.replace(row_settings(canvases=((96, 96),)), short_side=32, resize_method="original")
    values, _ = encode_row(0, record, settings)
    assert (values["image_height"], values["image_width"]) == (32, 48)
    expected = resize_image(noise(64, 96), 32, 48, "original")
    np.testing.assert_array_equal(np.frombuffer(values["image"], np.uint8).reshape(32, 48, 3), expected)
    smooth, _ = encode_row(0, record, dataclasses.replace(settings, resize_method="antialiased"))
    assert smooth["image"] != values["image"]


def test_rows_whose_size_is_drawn_are_kept_at_the_largest(tmp_path: Path) -> None:
    """Boxes and masks are those of the original size in any case."""
    bitmap = np.zeros((640, 960), dtype=bool)
    bitmap[100:333, 7:501] = True
    record = record_of(tmp_path / "a.png", [bitmap], 640, 960)
    (tmp_path / "a.png").write_bytes(png(noise(640, 960)))
    data = DataSettings(canvases=((96, 96),))
    jitter = AugmentSettings(large_scale_jitter=(0.1, 2.0))
    short = AugmentSettings(short_side=(32, 48))
    sizes = {}
    for name, augment in {"none": None, "flip": AugmentSettings(), "jitter": jitter, "short": short}.items():
        values, _ = encode_row(0, record, RowSettings.of(data, augment))
        sizes[name] = (values["image_height"], values["image_width"])
        assert (values["bboxes"], values["mask_boxes"]) == ([7, 100, 494, 233], [7, 100, 501, 333])
        assert values["mask_bits"] == np.packbits(np.ones(233 * 494, dtype=bool)).tobytes()
    assert sizes == {"none": (64, 96), "flip": (64, 96), "jitter": (128, 192), "short": (48, 72)}
    wide, _ = encode_row(0, record, RowSettings.of(DataSettings(canvases=((1920, 1920),)), jitter))
    assert np.array_equal(np.frombuffer(wide["image"], np.uint8), noise(640, 960).ravel())  # never enlarged
