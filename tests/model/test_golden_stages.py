"""The proposal layer, the detection layer and ROIAlign alone, on made-up inputs."""

import pytest
import torch
from torch import Tensor

from model.config import BoxHeadConfig, DetectionConfig, RoiConfig, RpnConfig
from model.postprocess import select_detections
from model.proposals import propose
from model.roi_align import pyramid_levels, pyramid_roi_align
from tests.model.golden import Case, cases, delta_scale, needs_golden, to_normalised, to_pixels

pytestmark = needs_golden

SIDE = 1024  # of the canvas that normalised boxes are taken to be of, where nothing depends on it


def test_proposals() -> None:
    golden = Case("stages", "proposal")
    # Proposals are ordered by the probability itself, as if the background's logit were zero.
    scores = golden.tensor("rpn_class")[..., 1]
    logits = torch.stack([torch.zeros_like(scores), scores], dim=-1)
    anchors, deltas = golden.boxes("anchors"), golden.boxes("rpn_bbox")
    # The thresholds that the file was made with.
    config = RpnConfig(nms_threshold=0.7, min_size=0, delta_scale=delta_scale("RPN_BBOX_STD_DEV"))
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    for name in ("rois_full", "rois_padded"):
        expected = golden.boxes(name)
        number = expected.shape[1]
        for image in range(len(expected)):  # each has its own anchors
            rows = slice(image, image + 1)
            proposals, valid = propose(
                logits[rows], deltas[rows], anchors[image], [anchors.shape[1]], whole, config, 200, number
            )
            assert valid.sum() == expected[image].any(dim=1).sum()
            torch.testing.assert_close(proposals, expected[rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", cases("stages", "detection_"))
def test_detections(name: str) -> None:
    golden = Case("stages", name)
    metas, rois, deltas = golden["image_meta"], golden.boxes("rois"), golden.boxes("deltas")
    logits = golden.tensor("probs").log()
    config = DetectionConfig(
        score_threshold=float(golden["min_confidence"]),
        nms_threshold=0.3,
        max_per_image=int(golden["max_instances"]),
        min_size=0,
        best_class_only=True,
    )
    expected = golden.tensor("detections")
    for image, meta in enumerate(metas):
        height, width = (int(value) for value in meta[4:6])
        window = torch.tensor([meta[8], meta[7], meta[10] - 1, meta[9] - 1])  # pixels, the last one inside
        boxes, scores, classes = select_detections(
            logits[image],
            deltas[image],
            to_pixels(rois[image], height, width),
            window,
            BoxHeadConfig(delta_scale=delta_scale("BBOX_STD_DEV")),
            config,
        )
        number = len(scores)
        assert number == int((expected[image, :, 4] > 0).sum())
        assert not expected[image, number:].any()
        torch.testing.assert_close(classes, expected[image, :number, 4].long())
        torch.testing.assert_close(scores, expected[image, :number, 5], rtol=0, atol=1e-6)
        normalised = to_normalised(boxes, height, width)
        torch.testing.assert_close(normalised, expected[image, :number][:, [1, 0, 3, 2]], rtol=0, atol=1e-6)


def roi_align_inputs(golden: Case) -> tuple[list[Tensor], Tensor, Tensor, tuple[int, int]]:
    """P2..P5 that want a gradient, regions in pixels, the image of each, and the canvas."""
    meta = golden["image_meta"][0]
    canvas = (int(meta[4]), int(meta[5]))
    pyramid = [golden.tensor(f"feat_p{level}").permute(0, 3, 1, 2).requires_grad_() for level in (2, 3, 4, 5)]
    boxes = golden.boxes("boxes")
    image_index = torch.arange(len(boxes)).repeat_interleave(boxes.shape[1])
    # In float64: a float32 pixel of 1024 has lost bits that the normalised number still has.
    return pyramid, to_pixels(boxes.double(), *canvas).flatten(0, 1), image_index, canvas


@pytest.mark.parametrize("product", ["sparse", "gathered"])
@pytest.mark.parametrize("name", sorted({name.split("__")[0] for name in cases("roialign", "")}))
def test_roi_align(name: str, product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if product == "gathered":  # what a GPU does
        monkeypatch.setattr("model.weighted_cells.has_sparse_product", lambda device: False)
    golden = Case("roialign", name)
    pyramid, regions, image_index, canvas = roi_align_inputs(golden)
    config = RoiConfig(pooling="crop_and_resize")
    levels = pyramid_levels(regions, config, canvas)
    torch.testing.assert_close(levels + 2, golden.tensor("level").flatten().long())
    for size in (7, 14):
        pooled = pyramid_roi_align(pyramid, regions, image_index, size, config, canvas)
        expected = golden.tensor(f"pool{size}").flatten(0, 1).permute(0, 3, 1, 2)
        torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)
        if size == 7:
            cotangent = golden.tensor("cotangent7").flatten(0, 1).permute(0, 3, 1, 2)
            (pooled * cotangent).sum().backward()  # type: ignore[no-untyped-call]
            for level, features in zip((2, 3, 4, 5), pyramid, strict=True):
                gradient = golden.tensor(f"grad7_p{level}").permute(0, 3, 1, 2)
                torch.testing.assert_close(features.grad, gradient, rtol=0, atol=1e-5)
