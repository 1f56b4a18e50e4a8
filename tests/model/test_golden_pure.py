"""The original's pure functions: anchors, boxes, IoU, NMS, images and masks."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torchvision.ops import nms

from model.anchors import level_anchors, pyramid_anchors
from model.boxes import box_area, clip_boxes, decode_boxes, encode_boxes, pairwise_iou
from model.canvas import image_windows, move_to_windows, normalise
from model.config import AnchorConfig, ModelConfig
from model.masks import paste_masks, paste_masks_in_boxes
from model.resize import resize_bilinear
from model.structures import Detections
from pipeline.preprocess import minimise_mask, pack_mask, resize_image
from tests.model.golden import Array, Case, cases, denormalise, needs_golden, normalise_pixels, to_normalised

pytestmark = needs_golden

UNIT = (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("name", cases("pure", "anchors_level"))
def test_anchors_of_a_level(name: str) -> None:
    golden = Case("pure", name)
    height, width = golden["shape"].tolist()
    stride = float(golden["feature_stride"])
    anchors = level_anchors(
        golden["scales"].tolist(),
        golden["ratios"].tolist(),
        (height, width),
        (stride, stride),
        int(golden["anchor_stride"]),
    )
    torch.testing.assert_close(anchors, golden.boxes("out").float(), rtol=0, atol=0)


@pytest.mark.parametrize("name", cases("pure", "anchors_pyramid"))
def test_anchors_of_a_pyramid(name: str) -> None:
    golden = Case("pure", name)
    assert golden["strides"].tolist() == [4, 8, 16, 32, 64]
    sizes = [(int(height), int(width)) for height, width in golden["backbone_shapes"]]
    canvas = (4 * sizes[0][0], 4 * sizes[0][1])
    anchors = torch.cat(pyramid_anchors(AnchorConfig(scales=tuple(golden["scales"].tolist())), sizes, canvas))
    assert len(anchors) == int(golden["count"])
    step = int(golden["step"])
    torch.testing.assert_close(anchors[::step], golden.boxes("px").float(), rtol=0, atol=0)
    # Sums of all anchors, in float64 of float32 numbers.
    torch.testing.assert_close(anchors.double().sum(dim=0), golden.boxes("px_sum"), rtol=1e-6, atol=0.1)
    torch.testing.assert_close(anchors.double().abs().sum(dim=0), golden.boxes("px_abs_sum"), rtol=1e-6, atol=0.1)
    normalised = normalise_pixels(anchors, *canvas)
    torch.testing.assert_close(normalised[::step], golden.boxes("norm"), rtol=0, atol=1e-6)
    torch.testing.assert_close(normalised.double().sum(dim=0), golden.boxes("norm_sum"), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", cases("pure", "box_refinement"))
def test_encode_boxes(name: str) -> None:
    golden = Case("pure", name)
    deltas = encode_boxes(golden.boxes("gt_box").float(), golden.boxes("box").float(), UNIT)
    for result in ("out", "out_graph"):
        if result in golden:
            torch.testing.assert_close(deltas, golden.boxes(result), rtol=1e-5, atol=1e-4)


def test_decode_boxes() -> None:
    golden = Case("pure", "apply_box_deltas")
    boxes = decode_boxes(golden.boxes("deltas"), golden.boxes("boxes"), UNIT)
    torch.testing.assert_close(boxes, golden.boxes("out"), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(boxes, golden.boxes("out_graph"), rtol=1e-5, atol=1e-4)


def test_clip_boxes() -> None:
    golden = Case("pure", "clip_boxes")
    clipped = clip_boxes(golden.boxes("boxes"), golden.boxes("window"))
    torch.testing.assert_close(clipped, golden.boxes("out"), rtol=0, atol=0)


def test_iou() -> None:
    golden = Case("pure", "compute_overlaps")
    iou = pairwise_iou(golden.boxes("boxes1"), golden.boxes("boxes2"))
    torch.testing.assert_close(iou, golden.tensor("out"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(iou.float(), golden.tensor("out_graph"), rtol=1e-6, atol=1e-6)


def test_iou_and_area_of_one_box() -> None:
    golden = Case("pure", "compute_iou")
    box, boxes = golden.boxes("box"), golden.boxes("boxes")
    torch.testing.assert_close(pairwise_iou(box[None], boxes)[0], golden.tensor("out"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(box_area(box), golden.tensor("box_area"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(box_area(boxes), golden.tensor("boxes_area"), rtol=1e-12, atol=1e-12)


def test_iou_of_masks() -> None:
    # Ours are run lengths, counted by pycocotools.
    golden = Case("pure", "compute_overlaps_masks")

    def encode(masks: Array) -> list[dict[str, object]]:
        encoded: list[dict[str, object]] = coco_mask.encode(np.asfortranarray(masks, dtype=np.uint8))
        return encoded

    masks1, masks2 = encode(golden["masks1"]), encode(golden["masks2"])
    iou = coco_mask.iou(masks1, masks2, [0] * len(masks2))
    np.testing.assert_allclose(iou, golden["out"], rtol=1e-6)
    nothing = Case("pure", "compute_overlaps_masks_empty")["out"]
    assert nothing.size == len(coco_mask.iou(masks1, [], [])) == 0


def test_boxes_of_masks() -> None:
    golden = Case("pure", "extract_bboxes")
    masks = golden["mask"]
    boxes = torch.tensor([pack_mask(masks[:, :, index])[0] for index in range(masks.shape[2])])
    torch.testing.assert_close(boxes, golden.boxes("out").long())


@pytest.mark.parametrize("name", cases("pure", "nms_"))
def test_nms(name: str) -> None:
    golden = Case("pure", name)
    keep = nms(golden.boxes("boxes"), golden.tensor("scores"), float(golden["threshold"]))
    assert keep.tolist() == golden["out"].tolist()


def test_normalised_boxes() -> None:
    golden = Case("pure", "norm_boxes")
    height, width = golden["shape"].tolist()
    normalised = normalise_pixels(golden.boxes("boxes").float(), height, width)
    torch.testing.assert_close(normalised, golden.boxes("out"), rtol=0, atol=1e-6)
    torch.testing.assert_close(normalised, golden.boxes("out_graph"), rtol=0, atol=1e-6)

    golden = Case("pure", "denorm_boxes")
    height, width = golden["shape"].tolist()
    pixels = denormalise(golden.boxes("boxes").double(), height, width)
    torch.testing.assert_close(pixels.int(), golden.boxes("out"))
    torch.testing.assert_close(pixels.int(), golden.boxes("out_graph"))
    there_and_back = denormalise(normalised.double(), *Case("pure", "norm_boxes")["shape"].tolist())
    torch.testing.assert_close(there_and_back.int(), golden.boxes("roundtrip"))


def scale_of(golden: Case) -> float:
    """The original's rule; ours is that an image fills its canvas as far as it goes."""
    height, width = golden["image"].shape[:2]
    mode, smallest, largest = str(golden["mode"]), int(golden["min_dim"]), int(golden["max_dim"])
    least = float(golden["min_scale"])
    if mode == "none":
        return 1.0
    scale = max(1.0, smallest / min(height, width)) if smallest else 1.0
    scale = max(scale, least)
    if mode == "square" and round(max(height, width) * scale) > largest:
        scale = largest / max(height, width)
    return scale


@pytest.mark.parametrize("name", cases("pure", "resize_image_"))
def test_resized_images(name: str) -> None:
    golden = Case("pure", name)
    image, expected = golden["image"], golden["out"]
    scale = float(golden["scale"])
    assert scale == pytest.approx(scale_of(golden), rel=1e-12)
    height, width = round(image.shape[0] * scale), round(image.shape[1] * scale)
    resized: Array
    if image.dtype == np.uint8:
        resized = resize_image(image, height, width, "original")
    else:
        resized = resize_bilinear(image, height, width)
    top, left, crop_height, crop_width = golden["crop"].tolist()
    if top >= 0:  # the original's random crop
        assert golden["window"].tolist() == [0, 0, crop_height, crop_width]
        assert not golden["padding"].any()
        actual = resized[top : top + crop_height, left : left + crop_width]
    else:
        sizes = torch.tensor([[height, width]])
        canvas = (expected.shape[0], expected.shape[1])
        windows = image_windows(sizes, canvas, "centre")
        torch.testing.assert_close(windows[0].long(), golden.boxes("window"))
        (above, below), (before, after), _ = golden["padding"].tolist()
        assert (above, before) == (windows[0, 1], windows[0, 0])
        assert (above + height + below, before + width + after) == canvas
        in_corner = torch.zeros(1, 3, *canvas, dtype=torch.from_numpy(resized).dtype)
        in_corner[0, :, :height, :width] = torch.from_numpy(resized).permute(2, 0, 1)
        actual = move_to_windows(in_corner, windows)[0].permute(1, 2, 0).numpy()
    assert actual.shape == expected.shape
    difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    if image.dtype == np.uint8:  # fractions are cut off, so a last bit of a float can be a whole step
        assert difference.max() <= 1
        assert (difference > 0).mean() <= 0.01
    else:
        assert difference.max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", cases("pure", "minimize_mask"))
def test_mini_masks(name: str) -> None:
    golden = Case("pure", name)
    masks, expected, expanded = golden["mask"], golden["out"], golden["expanded"]
    size = int(golden["mini_shape"][0])
    for index, (top, left, bottom, right) in enumerate(golden["bbox"].tolist()):
        mini = minimise_mask(masks[top:bottom, left:right, index], size)
        np.testing.assert_array_equal(mini, expected[:, :, index])
        back = np.zeros(masks.shape[:2], dtype=bool)
        back[top:bottom, left:right] = np.around(resize_bilinear(mini, bottom - top, right - left)).astype(bool)
        np.testing.assert_array_equal(back, expanded[:, :, index])


@pytest.mark.parametrize("name", cases("pure", "unmold_mask_"))
def test_pasted_masks(name: str) -> None:
    golden = Case("pure", name)
    height, width, _ = golden["image_shape"].tolist()
    detections = Detections(
        boxes=golden.boxes("bbox")[None].float(),
        scores=torch.ones(1),
        classes=torch.ones(1, dtype=torch.int64),
        mask_probabilities=golden.tensor("mask")[None],
    )
    np.testing.assert_array_equal(paste_masks(detections, height, width, whole_pixels=True)[0], golden["out"])
    top, left, bottom, right = golden["bbox"].tolist()
    ((pasted_top, pasted_left, crop),) = paste_masks_in_boxes(detections, height, width, whole_pixels=True)
    assert (pasted_top, pasted_left, *crop.shape) == (top, left, bottom - top, right - left)
    resized = resize_bilinear(golden["mask"], bottom - top, right - left)
    np.testing.assert_allclose(resized, golden["resized"], rtol=0, atol=1e-6)


def test_mean_pixel() -> None:
    golden = Case("pure", "mold_image")
    mean = tuple(value / 255 for value in golden["mean_pixel"].tolist())
    config = ModelConfig(pixel_mean=mean, pixel_std=(1 / 255, 1 / 255, 1 / 255), padding="black")
    images = golden.tensor("image").permute(2, 0, 1)[None]
    windows = image_windows(torch.tensor([images.shape[2:]]), (images.shape[2], images.shape[3]), "centre")
    molded = normalise(images, windows, config)[0].permute(1, 2, 0)
    # The original takes the mean off in float64, ours in float32.
    torch.testing.assert_close(molded, golden.tensor("out"), rtol=0, atol=1e-5)


def test_a_box_that_covers_the_image_is_normalised_to_one() -> None:
    box = normalise_pixels(torch.tensor([[0.0, 0.0, 150.0, 100.0]]), 100, 150)
    torch.testing.assert_close(box, torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    torch.testing.assert_close(to_normalised(torch.tensor([[0.0, 0.0, 149.0, 99.0]]), 100, 150), box)
