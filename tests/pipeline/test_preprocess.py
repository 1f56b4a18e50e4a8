import io
import itertools
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from pipeline.preprocess import (
    ImageProblem,
    choose_canvas,
    decode_image,
    exif_orientation,
    image_to_rgb,
    minimise_mask,
    num_mask_bytes,
    pack_mask,
    rasterise,
    resize_image,
    stored_size,
    unpack_mask,
)
from tests.pipeline.factories import (
    ANIMALS,
    SHARED_DATA,
    Bitmap,
    Pixels,
    coco_content,
    ellipse_polygon,
    needs_shared_data,
    noise,
    png,
    rle_list,
    rle_string,
)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def with_orientation(pixels: Pixels, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(pixels), exif=exif)


# How stored pixels have to be turned to be upright, for each EXIF orientation.
UPRIGHT = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("orientation", sorted(UPRIGHT))
def test_image_is_turned_upright(orientation: int) -> None:
    stored = noise(5, 9)
    expected = UPRIGHT[orientation](stored)
    content = with_orientation(stored, orientation)
    np.testing.assert_array_equal(decode_image(content), expected)
    np.testing.assert_array_equal(decode_image(content, expected.shape[0], expected.shape[1]), expected)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_annotations_made_on_the_stored_pixels_get_the_stored_pixels(orientation: int) -> None:
    stored = noise(5, 9)
    np.testing.assert_array_equal(decode_image(with_orientation(stored, orientation), 5, 9), stored)


def test_image_of_another_size_than_annotated_is_refused() -> None:
    with pytest.raises(ImageProblem, match=r"^is 9 x 5 pixels, its annotations say 9 x 6$"):
        decode_image(png(noise(5, 9)), 6, 9)
    with pytest.raises(ImageProblem, match=r"^is 9 x 5 pixels, its annotations say 5 x 9; height and width are exch"):
        decode_image(png(noise(5, 9)), 9, 5)


def test_every_kind_of_pixel_becomes_rgb() -> None:
    gray = noise(4, 6)[:, :, 0]
    in_three = np.repeat(gray[:, :, None], 3, axis=2)
    colour = noise(4, 6, seed=1)
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(gray))), in_three)
    alpha = np.full((4, 6), 7, dtype=np.uint8)
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(np.dstack([colour, alpha])))), colour)
    gray_alpha = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)])
    np.testing.assert_array_equal(decode_image(encoded(gray_alpha)), in_three)
    palette = Image.fromarray(colour).convert("P", palette=Image.Palette.ADAPTIVE, colors=24)
    np.testing.assert_array_equal(decode_image(encoded(palette)), colour)  # 24 pixels, 24 colours
    black_and_white = Image.fromarray(gray > 127)
    np.testing.assert_array_equal(decode_image(encoded(black_and_white)), np.where(in_three > 127, 255, 0))
    cmyk = Image.fromarray(np.zeros((4, 6, 4), dtype=np.uint8), mode="CMYK")  # no ink
    np.testing.assert_array_equal(decode_image(encoded(cmyk, "TIFF")), np.full((4, 6, 3), 255))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    expected = np.array([[[0] * 3, [1] * 3, [128] * 3, [255] * 3]])
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(values))), expected)


def test_animation_gives_its_first_picture() -> None:
    frames = [Image.fromarray(np.full((4, 6, 3), value, dtype=np.uint8)) for value in (255, 0)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode_image(content), np.full((4, 6, 3), 255))


@pytest.mark.parametrize("content", [b"", b"no image", png(noise(30, 30))[:500], png(noise(30, 30))[:20]])
def test_undecodable_image_is_a_problem(content: bytes) -> None:
    with pytest.raises(ImageProblem, match=r"^cannot be decoded \([^\n]*\)$") as caught:
        decode_image(content)
    assert "0x" not in str(caught.value)  # the same text every time


def test_an_error_of_any_kind_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged GIF files end in an IndexError, AVIF files in a RuntimeError."""

    def fail(*_: object, **__: object) -> None:
        raise IndexError("index out of range")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ImageProblem, match=r"^cannot be decoded \(IndexError: index out of range\)$"):
        decode_image(b"any")
    assert exif_orientation(b"any") == 1


def test_damaged_files_give_pixels_or_a_problem() -> None:
    """Bytes of a header changed at random: Pillow raises many kinds of errors."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(noise(24, 32))
    outcomes = {"decoded": 0, "problem": 0}
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        content = encoded(picture, kind)
        for _ in range(60):
            damaged = np.frombuffer(content, dtype=np.uint8).copy()
            places = rng.integers(0, min(len(damaged), 200), size=int(rng.integers(1, 6)))
            damaged[places] = rng.integers(0, 256, size=len(places))
            end = int(rng.integers(1, len(damaged))) if rng.random() < 0.3 else len(damaged)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    image = decode_image(damaged[:end].tobytes())
                except ImageProblem:
                    outcomes["problem"] += 1
                    continue
            assert image.dtype == np.uint8
            assert (image.ndim, image.shape[2]) == (3, 3)
            outcomes["decoded"] += 1
    assert min(outcomes.values()) > 50, outcomes


NASTY = SHARED_DATA / "nasty"
# Width, height and mean colour that NASTY/README.md asks for; None: has to be reported as unreadable.
NASTY_FILES: dict[str, tuple[int, int, tuple[int, int, int]] | None] = {
    "hopper_gray.jpg": (128, 128, (85, 85, 85)),
    "hopper_bad_exif.jpg": (500, 500, (125, 125, 125)),
    "pil_sample_cmyk.jpg": (100, 100, (30, 5, 7)),
    "pil_sample_rgb.jpg": (100, 100, (28, 4, 3)),
    "app13-multiple.jpg": (256, 160, (120, 120, 103)),
    "testimgari.jpg": (227, 149, (146, 91, 82)),
    "sugarshack_bad_mpo_header.jpg": (640, 480, (121, 109, 99)),
    "Portrait_6.jpg": (1200, 1800, (144, 156, 163)),
    "orientation_rectangle.jpg": (1, 2, (254, 0, 0)),
    "hopper_orientation_6.webp": (128, 128, (90, 80, 96)),
    "basn0g16.png": (32, 32, (144, 144, 144)),
    "basn2c16.png": (32, 32, (128, 128, 44)),
    "basn0g01.png": (32, 32, (125, 125, 125)),
    "pil123rgba.png": (162, 150, (21, 20, 3)),
    "pil123p.png": (162, 150, (21, 20, 2)),
    "uncompressed_la.png": (128, 128, (47, 47, 47)),
    "high_ascii_chars.png": (750, 30, (222, 222, 222)),
    "chi.gif": (320, 240, (250, 251, 247)),
    "truncated_jpeg.jpg": None,
    "truncated_image.png": None,
    "broken_data_stream.png": None,
    "broken.png": None,
    "monkey12.jpg": None,
    "decompression_bomb.gif": None,
}


@needs_shared_data("nasty")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", sorted(NASTY_FILES))
def test_odd_file_from_the_wild(name: str) -> None:
    content = (NASTY / name).read_bytes()
    expected = NASTY_FILES[name]
    if expected is None:
        with pytest.raises(ImageProblem):
            decode_image(content)
        return
    width, height, mean = expected
    image = decode_image(content)
    assert image.shape == (height, width, 3)
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image.reshape(-1, 3).mean(axis=0), mean, atol=4)


@needs_shared_data("nasty")
def test_every_odd_file_is_listed() -> None:
    assert {path.name for path in NASTY.iterdir()} == {*NASTY_FILES, "README.md"}


def test_canvas_by_hand() -> None:
    canvases = ((800, 1344), (1344, 800), (1088, 1088))
    assert choose_canvas(480, 640, canvases) == (2, 816, 1088)  # 1088/640 = 1.7 beats 800/480 = 1.67
    assert choose_canvas(400, 640, canvases) == (0, 800, 1280)
    assert choose_canvas(640, 400, canvases) == (1, 1280, 800)
    assert choose_canvas(500, 500, canvases) == (2, 1088, 1088)
    assert choose_canvas(3000, 2000, canvases) == (1, 1200, 800)  # 800/2000 = 0.4 beats 1088/3000
    assert choose_canvas(100, 100, ((64, 96), (96, 64))) == (0, 64, 64)  # equal: the first


def test_the_short_side_grows_no_further_than_it_is_asked_to() -> None:
    canvases = ((800, 1344), (1344, 800))
    assert choose_canvas(480, 640, canvases, 800) == (0, 800, 1067)
    assert choose_canvas(640, 480, canvases, 800) == (1, 1067, 800)
    assert choose_canvas(400, 800, canvases, 800) == (0, 672, 1344)  # the long side has no more room
    assert choose_canvas(500, 500, ((1024, 1024),), 800) == (0, 800, 800)
    assert choose_canvas(2000, 3000, ((1024, 1024),), 300) == (0, 300, 450)


def test_images_are_kept_as_large_as_any_draw_may_ask_for() -> None:
    assert stored_size(2400, 3000, (1024, 1024)) == (819, 1024)
    assert stored_size(2400, 3000, (1024, 1024), largest_scale=2.0) == (1638, 2048)
    assert stored_size(2400, 3000, (1024, 1024), largest_scale=0.5) == (410, 512)
    assert stored_size(2400, 3000, (800, 1344), largest_short_side=640) == (640, 800)
    assert stored_size(2400, 3000, (800, 1344), largest_short_side=900) == (800, 1000)  # the canvas holds no more
    # No pixel is made up: what is smaller than it may be drawn stays as it is.
    assert stored_size(480, 640, (1024, 1024), largest_scale=2.0) == (480, 640)
    assert stored_size(480, 640, (800, 1344), largest_short_side=800) == (480, 640)
    assert stored_size(480, 640, (1024, 1024), largest_scale=0.5) == (384, 512)
    assert stored_size(1, 5000, (1024, 1024), largest_scale=1.0) == (1, 1024)


def test_the_original_resizes_without_smoothing_and_cuts_fractions_off() -> None:
    stripes = np.zeros((2, 8, 3), dtype=np.uint8)
    stripes[:, ::2] = 101
    # Half the width: every new pixel lies between two old ones, 101 and 0.
    np.testing.assert_array_equal(resize_image(stripes, 2, 4, "original"), np.full((2, 4, 3), 50))
    # Twice the height: a quarter of the outermost rows comes from outside, which is black.
    white = np.full((2, 2, 3), 200, dtype=np.uint8)
    assert resize_image(white, 4, 2, "original")[:, 0, 0].tolist() == [
        200,
        200,
        200,
        200,
    ]  # but within the input's range
    mixed = np.array([[[0] * 3], [[200] * 3]], dtype=np.uint8)
    assert resize_image(mixed, 4, 1, "original")[:, 0, 0].tolist() == [0, 50, 150, 150]


def test_mini_masks_by_hand() -> None:
    mask = np.zeros((4, 4), dtype=bool)
    mask[:, :2] = True
    assert minimise_mask(mask, 2).tolist() == [[True, False], [True, False]]
    assert minimise_mask(np.ones((1, 1), dtype=bool), 3).all()  # within the range of the input
    with pytest.raises(ValueError, match="without pixels"):
        minimise_mask(np.zeros((0, 3), dtype=bool), 4)


def test_no_side_vanishes_or_leaves_the_canvas() -> None:
    assert choose_canvas(1, 1000, ((64, 64),)) == (0, 1, 64)
    assert choose_canvas(1000, 1, ((64, 64),)) == (0, 64, 1)
    canvases = ((64, 96), (96, 64))
    for height, width in itertools.product(range(1, 200, 7), repeat=2):
        index, rows, columns = choose_canvas(height, width, canvases)
        assert 1 <= rows <= canvases[index][0]
        assert 1 <= columns <= canvases[index][1]
        assert rows == canvases[index][0] or columns == canvases[index][1]


def test_resizing_to_the_same_size_changes_nothing() -> None:
    image = noise(5, 9)
    np.testing.assert_array_equal(resize_image(image, 5, 9), image)


def test_resizing_by_hand() -> None:
    halves = np.zeros((4, 8, 3), dtype=np.uint8)
    halves[:, 4:] = 200
    small = resize_image(halves, 2, 4)
    assert small.shape == (2, 4, 3)
    assert small.dtype == np.uint8
    # Bilinear at half size is a triangle over four pixels with weights 1, 3, 3, 1 (at the border 3, 3, 1).
    np.testing.assert_array_equal(small[0, :, 0], [0, 25, 175, 200])
    np.testing.assert_array_equal(resize_image(np.full((7, 5, 3), 93, np.uint8), 31, 3), np.full((31, 3, 3), 93))


def test_polygon_by_hand() -> None:
    mask = rasterise([[2, 1, 6, 1, 6, 4, 2, 4]], 6, 9)
    expected = np.zeros((6, 9), dtype=bool)
    expected[1:4, 2:6] = True
    np.testing.assert_array_equal(mask, expected)
    assert mask.dtype == bool


def test_run_lengths_by_hand() -> None:
    """Column by column, zeros first."""
    mask = rasterise({"size": [2, 3], "counts": [1, 2, 2, 1]}, 2, 3)
    np.testing.assert_array_equal(mask, [[False, True, False], [True, False, True]])


def test_every_kind_of_outline_is_drawn_as_pycocotools_draws_it() -> None:
    content = coco_content("x", [4, 3, 4, 4, 5, 3], ANIMALS, seed=8, first_id=1)
    reference = COCO()
    reference.dataset = content
    reference.createIndex()
    kinds = set()
    for annotation in content["annotations"]:
        image = reference.imgs[annotation["image_id"]]
        outline = annotation["segmentation"]
        kinds.add((type(outline), type(outline["counts"])) if isinstance(outline, dict) else len(outline))
        np.testing.assert_array_equal(
            rasterise(outline, image["height"], image["width"]), reference.annToMask(annotation).astype(bool)
        )
    assert kinds == {1, 2, (dict, list), (dict, str)}


def test_the_three_encodings_of_a_mask_are_equal() -> None:
    rng = np.random.default_rng(4)
    for height, width in ((1, 1), (7, 3), (40, 50)):
        for share in (0.0, 0.3, 1.0):
            mask = rng.random((height, width)) < share
            np.testing.assert_array_equal(rasterise(rle_list(mask), height, width), mask)
            np.testing.assert_array_equal(rasterise(rle_string(mask), height, width), mask)


def test_packed_bits_by_hand() -> None:
    mask = np.zeros((5, 12), dtype=bool)
    mask[1, 2] = mask[1, 10] = mask[2, 3] = True  # box of 2 rows and 9 columns
    box, bits = pack_mask(mask)
    assert box == (2, 1, 11, 3)
    # 100000001 010000000 and six bits of filling.
    assert bits == bytes([0b10000000, 0b10100000, 0b00000000])


@pytest.mark.parametrize(("height", "width", "expected"), [(0, 0, 0), (1, 1, 1), (2, 4, 1), (3, 3, 2), (28, 28, 98)])
def test_bytes_of_a_mask_by_hand(height: int, width: int, expected: int) -> None:
    assert num_mask_bytes(height, width) == expected


def test_empty_mask_has_no_bits() -> None:
    assert pack_mask(np.zeros((5, 12), dtype=bool)) == ((0, 0, 0, 0), b"")
    assert unpack_mask(np.zeros(0, dtype=np.uint8), 0, 0).shape == (0, 0)


def test_packing_and_unpacking_is_the_identity() -> None:
    rng = np.random.default_rng(1)
    masks: list[Bitmap] = [
        rng.random((h, w)) < share for h, w in ((1, 1), (9, 17), (30, 8)) for share in (0.05, 0.5, 1)
    ]
    masks.append(rasterise([ellipse_polygon(rng, 48, 64)], 48, 64))
    for mask in (mask for mask in masks if mask.any()):
        (left, top, right, bottom), bits = pack_mask(mask)
        assert len(bits) == num_mask_bytes(bottom - top, right - left)
        inside = unpack_mask(np.frombuffer(bits, dtype=np.uint8), bottom - top, right - left)
        again = np.zeros_like(mask)
        again[top:bottom, left:right] = inside
        np.testing.assert_array_equal(again, mask)
        for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
            assert side.any()  # tight


def test_an_open_picture_reads_as_its_file() -> None:
    """Turned by EXIF and in 16 bit alike, so that predictions do not depend on who opened the file."""
    gray = np.arange(0, 6000, 100, dtype=np.uint16).reshape(6, 10)
    turned = Image.fromarray(noise(6, 10))
    exif = turned.getexif()
    exif[0x0112] = 6
    for picture, options in ((Image.fromarray(gray), {}), (turned, {"exif": exif})):
        file = io.BytesIO()
        picture.save(file, format="PNG", **options)
        with Image.open(io.BytesIO(file.getvalue())) as opened:
            np.testing.assert_array_equal(image_to_rgb(opened), decode_image(file.getvalue()))
