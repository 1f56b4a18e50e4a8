"""The whole network with the original's weights: forward pass stage by stage, detection, one training step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import losses
from model.boxes import encode_boxes, last_pixel_inside, last_pixel_outside, pairwise_iou
from model.canvas import image_windows, move_to_windows, normalise
from model.mask_rcnn import MaskRCNN
from model.mask_targets import crop_mask_targets
from model.masks import paste_masks
from model.postprocess import to_original
from model.weights import import_weights
from pipeline.preprocess import resize_image
from tests.model.factories import box_batch
from tests.model.golden import (
    SLICES,
    Array,
    Case,
    class_names,
    delta_scale,
    manifest,
    model_config,
    needs_golden,
    original_config,
    swapped,
    to_normalised,
    to_pixels,
    weight_maker,
)
from tests.model.test_golden_targets import with_masks

pytestmark = needs_golden


@pytest.fixture(scope="module")
def weight_file(folder: Path) -> Path:
    path = folder / "weights.h5"
    weight_maker().write_h5(manifest(), str(path))
    return path


@pytest.fixture(scope="module")
def model(weight_file: Path) -> MaskRCNN:
    model = MaskRCNN(model_config(), original_config()["NUM_CLASSES"])
    import_weights(f"matterport:{weight_file}", model, class_names())
    return model.eval()


def canvas_of(images: Tensor) -> tuple[int, int]:
    return images.shape[2], images.shape[3]


def channels_first(values: Array) -> Tensor:
    return torch.from_numpy(np.array(values)).movedim(-1, 1)


def assert_slice(golden: Case, name: str, actual: Tensor, atol: float | None = None) -> None:
    """Compare (N, C, ...) with the slice of an (N, ..., C) tensor that the file holds, and with the sums of the whole.

    Args:
        golden: the file.
        name: of the tensor.
        actual: ours, whole.
        atol: by default 1e-5 of the largest value.
    """
    whole = actual.movedim(1, -1)
    expected = golden.tensor(name)
    if f"{name}__full_shape" in golden:
        assert list(whole.shape) == golden[f"{name}__full_shape"].tolist()
        part = whole[tuple(slice(None, None, step) for step in SLICES.get(name, ()))]
        absolute = float(golden[f"{name}__abs_sum"])
        values = whole.double()
        assert float(values.sum()) == pytest.approx(float(golden[f"{name}__sum"]), abs=1e-5 * absolute)
        assert float(values.abs().sum()) == pytest.approx(absolute, rel=1e-5)
        assert float(values.square().sum()) == pytest.approx(float(golden[f"{name}__sq_sum"]), rel=2e-5)
    else:
        part = whole
    atol = 1e-5 * float(expected.abs().max()) if atol is None else atol
    torch.testing.assert_close(part, expected, rtol=0, atol=atol)


def sizes_of(windows: Tensor) -> Tensor:
    """(B, 2) height and width of (y1, x1, y2, x2) windows."""
    return torch.stack([windows[:, 2] - windows[:, 0], windows[:, 3] - windows[:, 1]], dim=1)


@pytest.fixture(scope="module")
def stages(model: MaskRCNN) -> dict[str, Any]:
    golden = Case("forward")
    images = channels_first(golden["images"])
    canvas = canvas_of(images)
    windows = image_windows(sizes_of(golden.tensor("windows")), canvas, "centre")
    with torch.no_grad():
        molded = normalise(images, windows, model.config)
        pyramid = model.features(images, windows)
        logits, deltas = model.rpn(pyramid)
        anchors = model.anchors(canvas, pyramid)
        proposals, valid = model.propose(logits, deltas, anchors, windows, canvas)
        number = proposals.shape[1]
        image_index = torch.arange(len(images)).repeat_interleave(number)
        regions = proposals.flatten(0, 1)
        pooled = model.pool(pyramid, regions, image_index, model.config.box_head.pool_size, canvas)
        class_logits, box_deltas = model.box_head(pooled)
    return {
        "images": images,
        "canvas": canvas,
        "windows": windows,
        "molded": molded,
        "pyramid": pyramid,
        "logits": logits,
        "deltas": deltas,
        "anchors": torch.cat(anchors),
        "proposals": proposals,
        "valid": valid,
        "pooled": pooled,
        "class_logits": class_logits,
        "box_deltas": box_deltas,
    }


class TestForward:
    """`forward.npz`: a batch of images that fill their canvas."""

    @staticmethod
    def golden() -> Case:
        return Case("forward")

    def test_input(self, stages: dict[str, Any]) -> None:
        golden = self.golden()
        torch.testing.assert_close(stages["molded"].movedim(1, -1), golden.tensor("molded"), rtol=0, atol=1e-5)
        torch.testing.assert_close(stages["windows"].long(), golden.boxes("windows"))
        metas, canvas = golden["image_metas"], stages["canvas"]
        np.testing.assert_array_equal(metas[:, 4:6], [canvas] * len(metas))
        np.testing.assert_array_equal(metas[:, 7:11], golden["windows"])
        np.testing.assert_array_equal(metas[:, 1:3], sizes_of(golden.tensor("windows")))

    def test_anchors(self, stages: dict[str, Any]) -> None:
        golden = self.golden()
        torch.testing.assert_close(stages["anchors"], golden.boxes("anchors_px").float(), rtol=0, atol=0)
        normalised = to_normalised(last_pixel_inside(stages["anchors"]), *stages["canvas"])
        torch.testing.assert_close(normalised, golden.boxes("anchors"), rtol=0, atol=1e-6)

    def test_backbone(self, model: MaskRCNN, stages: dict[str, Any]) -> None:
        with torch.no_grad():
            assert_slice(self.golden(), "C1", model.backbone.stem(stages["molded"]))
            for name, features in zip(("C2", "C3", "C4", "C5"), model.backbone(stages["molded"]), strict=True):
                assert_slice(self.golden(), name, features)

    def test_pyramid(self, stages: dict[str, Any]) -> None:
        for name, level in zip(("P2", "P3", "P4", "P5", "P6"), stages["pyramid"], strict=True):
            assert_slice(self.golden(), name, level, atol=1e-4)

    def test_rpn(self, stages: dict[str, Any]) -> None:
        golden = self.golden()
        torch.testing.assert_close(stages["logits"], golden.tensor("rpn_class_logits"), rtol=0, atol=1e-4)
        probabilities = stages["logits"].softmax(dim=2)
        torch.testing.assert_close(probabilities, golden.tensor("rpn_class"), rtol=0, atol=5e-5)
        torch.testing.assert_close(stages["deltas"], golden.boxes("rpn_bbox"), rtol=0, atol=1e-4)

    def test_proposals(self, model: MaskRCNN, stages: dict[str, Any]) -> None:
        golden = self.golden()
        expected, canvas = golden.boxes("rois"), stages["canvas"]
        assert stages["valid"].sum() == expected.any(dim=2).sum()
        torch.testing.assert_close(to_normalised(stages["proposals"], *canvas), expected, rtol=0, atol=1e-5)
        # From the original's own scores and deltas.
        scores = golden.tensor("rpn_class")[..., 1].logit()
        logits = torch.stack([torch.zeros_like(scores), scores], dim=2)
        levels = model.anchors(canvas, stages["pyramid"])
        proposals, _ = model.propose(logits, golden.boxes("rpn_bbox"), levels, stages["windows"], canvas)
        torch.testing.assert_close(to_normalised(proposals, *canvas), expected, rtol=0, atol=1e-6)

    def test_box_head(self, stages: dict[str, Any]) -> None:
        golden = self.golden()
        number = stages["proposals"].shape[1]

        def by_image(values: Tensor) -> Tensor:
            return values.reshape(-1, number, *values.shape[1:])

        assert_slice(golden, "pooled_class", by_image(stages["pooled"]).movedim(2, 1), atol=1e-4)
        logits = by_image(stages["class_logits"])
        torch.testing.assert_close(logits, golden.tensor("mrcnn_class_logits"), rtol=0, atol=2e-4)
        torch.testing.assert_close(logits.softmax(dim=2), golden.tensor("mrcnn_class"), rtol=0, atol=1e-4)
        torch.testing.assert_close(by_image(stages["box_deltas"]), golden.boxes("mrcnn_bbox"), rtol=0, atol=1e-4)

    def test_detections(self, model: MaskRCNN, stages: dict[str, Any]) -> None:
        golden = self.golden()
        expected = golden.tensor("detections")
        canvas, images = stages["canvas"], stages["images"]
        found = model.detect(images, sizes_of(golden.tensor("windows")))
        for image, detections in enumerate(found):
            number = len(detections)
            assert number == int((expected[image, :, 4] > 0).sum())
            boxes = detections.boxes + stages["windows"][image, :2].repeat(2)
            normalised = to_normalised(last_pixel_inside(boxes), *canvas)
            torch.testing.assert_close(normalised, swapped(expected[image, :number, :4].numpy()), rtol=0, atol=5e-5)
            torch.testing.assert_close(detections.classes, expected[image, :number, 4].long())
            torch.testing.assert_close(detections.scores, expected[image, :number, 5], rtol=0, atol=5e-5)
            of_class = golden.tensor("mrcnn_mask")[image, torch.arange(number), :, :, detections.classes]
            torch.testing.assert_close(detections.mask_probabilities, of_class, rtol=0, atol=5e-5)

    @torch.no_grad()
    def test_mask_head(self, model: MaskRCNN, stages: dict[str, Any]) -> None:
        """Masks of all classes for all rows, empty ones too."""
        golden = self.golden()
        rows = golden.tensor("detections")
        regions = to_pixels(swapped(rows[..., :4].numpy()), *stages["canvas"]).flatten(0, 1)
        image_index = torch.arange(len(rows)).repeat_interleave(rows.shape[1])
        pooled = model.pool(stages["pyramid"], regions, image_index, model.config.mask_head.pool_size, stages["canvas"])
        assert_slice(golden, "pooled_mask", pooled.reshape(*rows.shape[:2], *pooled.shape[1:]).movedim(2, 1), atol=1e-4)
        classes = [torch.full((len(regions),), index) for index in range(model.num_classes)]
        masks = torch.stack([model.mask_head(pooled, of_class).sigmoid() for of_class in classes], dim=-1)
        expected = golden.tensor("mrcnn_mask").flatten(0, 1)
        torch.testing.assert_close(masks, expected, rtol=0, atol=5e-5)


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Images in the corner of their canvas, their sizes there, and their original sizes."""
    golden = Case("detect")
    windows = golden.tensor("windows")
    sizes = sizes_of(windows)
    side = original_config()["IMAGE_MAX_DIM"]
    images = torch.zeros(len(sizes), 3, side, side, dtype=torch.uint8)
    originals = []
    for index, (height, width) in enumerate(sizes.tolist()):
        image = golden[f"image_{index}"]
        assert max(height, width) == side  # "square": as large as the canvas allows
        resized = resize_image(image, height, width, "original")
        images[index, :, :height, :width] = torch.from_numpy(resized).movedim(-1, 0)
        originals.append((image.shape[0], image.shape[1]))
    return images, sizes, originals


class TestDetect:
    """`detect.npz`: images of two sizes, resized and padded, to masks of their own size."""

    def test_input(self, model: MaskRCNN, batch: tuple[Tensor, Tensor, list[tuple[int, int]]]) -> None:
        golden, (images, sizes, originals) = Case("detect"), batch
        windows = image_windows(sizes, canvas_of(images), "centre")
        torch.testing.assert_close(windows.long(), golden.boxes("windows"))
        molded = normalise(move_to_windows(images, windows), windows, model.config).movedim(1, -1)
        difference = (molded - golden.tensor("molded")).abs()
        assert float(difference.max()) <= 1.001  # fractions are cut off
        assert float((difference > 0.5).float().mean()) <= 0.01
        metas = golden["image_metas"]
        np.testing.assert_array_equal(metas[:, 1:3], originals)
        np.testing.assert_array_equal(metas[:, 4:6], [canvas_of(images)] * len(metas))
        np.testing.assert_array_equal(metas[:, 7:11], golden["windows"])

    def test_results(self, model: MaskRCNN, batch: tuple[Tensor, Tensor, list[tuple[int, int]]]) -> None:
        golden, (images, sizes, originals) = Case("detect"), batch
        # The original's own input, so that a step of one in a pixel of the resized image does not count.
        canvas = canvas_of(images)
        windows = image_windows(sizes, canvas, "centre")
        mean = torch.tensor(original_config()["MEAN_PIXEL"])
        molded = (golden.tensor("molded") + mean).round().to(torch.uint8).movedim(-1, 1)
        in_corner = torch.zeros_like(images)
        for index, ((left, top, right, bottom), (height, width)) in enumerate(
            zip(windows.int().tolist(), sizes.tolist(), strict=True)
        ):
            in_corner[index, :, :height, :width] = molded[index, :, top:bottom, left:right]
        found = model.detect(in_corner, sizes)

        with torch.no_grad():
            pyramid = model.features(molded, windows)
            logits, deltas = model.rpn(pyramid)
            proposals, _ = model.propose(logits, deltas, model.anchors(canvas, pyramid), windows, canvas)
        torch.testing.assert_close(to_normalised(proposals, *canvas), golden.boxes("rois"), rtol=0, atol=1e-5)

        for image, detections in enumerate(found):
            expected = golden.tensor("detections")[image]
            number = len(detections)
            assert number == int((expected[:, 4] > 0).sum())
            boxes = detections.boxes + windows[image, :2].repeat(2)
            normalised = to_normalised(last_pixel_inside(boxes), *canvas)
            torch.testing.assert_close(normalised, swapped(expected[:number, :4].numpy()), rtol=0, atol=5e-5)
            torch.testing.assert_close(detections.scores, expected[:number, 5], rtol=0, atol=5e-5)
            selected = golden.tensor("mrcnn_mask_selected")[image, :number]
            torch.testing.assert_close(detections.mask_probabilities, selected, rtol=0, atol=5e-5)

            height, width = originals[image]
            results = to_original(
                detections, (int(sizes[image, 0]), int(sizes[image, 1])), (height, width), model.config
            )
            torch.testing.assert_close(results.boxes.int(), golden.boxes(f"result_{image}_rois"))
            torch.testing.assert_close(results.classes.int(), golden.tensor(f"result_{image}_class_ids"))
            torch.testing.assert_close(results.scores, golden.tensor(f"result_{image}_scores"), rtol=0, atol=5e-5)
            masks = paste_masks(results, height, width, model.config.detections.whole_pixels)
            expected_masks = golden[f"result_{image}_masks"].transpose(2, 0, 1)
            assert masks.shape == expected_masks.shape
            assert (masks != expected_masks).sum() <= 0.001 * masks.size  # there may be none


@pytest.fixture(scope="module")
def step(model: MaskRCNN) -> dict[str, Any]:
    golden = Case("train_step")
    config = model.config
    images = channels_first(golden["in__images"])
    canvas = canvas_of(images)
    metas = golden["in__image_metas"]
    windows = swapped(metas[:, 7:11]).float()
    np.testing.assert_array_equal(metas[:, 4:6], [canvas] * len(metas))
    active = torch.from_numpy(metas[:, 12:]).bool()
    active = active[:1].expand_as(active)  # the original's defect: the first image's flags for all
    model.zero_grad()
    pyramid = model.features(images, windows)
    rpn_logits, rpn_deltas = model.rpn(pyramid)

    match = golden.tensor("in__rpn_match")[..., 0]
    target = torch.zeros_like(rpn_deltas)
    for image in range(len(match)):  # the first rows belong to the positive anchors
        rows = torch.nonzero(match[image] == 1).flatten()
        target[image, rows] = golden.boxes("in__rpn_bbox_target")[image, : len(rows)]

    regions = to_pixels(golden.boxes("target__rois"), *canvas)
    classes = golden.tensor("target__class_ids").long()
    target_deltas = golden.boxes("target__deltas")
    target_masks = golden.tensor("target__masks").float()
    image_index = torch.arange(len(images)).repeat_interleave(regions.shape[1])
    flat_regions, flat_classes = regions.flatten(0, 1), classes.flatten()
    everything = torch.ones_like(flat_classes).bool()  # zero rows count as background in the original
    positive = flat_classes > 0
    pooled = model.pool(pyramid, flat_regions, image_index, config.box_head.pool_size, canvas)
    class_logits, box_deltas = model.box_head(pooled)
    mask_size = config.mask_head.pool_size
    pooled = model.pool(pyramid, flat_regions, image_index, mask_size, canvas)
    masks = torch.stack(
        [model.mask_head(pooled, torch.full_like(flat_classes, index)) for index in range(model.num_classes)],
        dim=-1,
    )
    mask_logits = masks[torch.arange(len(masks)), :, :, flat_classes]
    count, beta, kind = len(images), config.losses.smooth_l1_beta, config.losses.normalizer
    values = {
        "rpn_class_loss": losses.rpn_class_loss(rpn_logits, match == 1, match != 0, kind),
        "rpn_bbox_loss": losses.rpn_bbox_loss(rpn_deltas, target, match == 1, match != 0, beta, kind),
        "mrcnn_class_loss": losses.mrcnn_class_loss(
            class_logits, flat_classes, everything, image_index, active, kind, config.losses.inactive_classes
        ),
        "mrcnn_bbox_loss": losses.mrcnn_bbox_loss(
            box_deltas, target_deltas.flatten(0, 1), flat_classes, everything, image_index, count, beta, kind
        ),
        "mrcnn_mask_loss": losses.mrcnn_mask_loss(
            mask_logits, target_masks.flatten(0, 1), positive, image_index, count, kind
        ),
    }
    total = torch.stack(list(values.values())).sum()
    total.backward()  # type: ignore[no-untyped-call]
    return {
        "golden": golden,
        "canvas": canvas,
        "windows": windows,
        "regions": regions,
        "classes": classes,
        "class_logits": class_logits.detach(),
        "box_deltas": box_deltas.detach(),
        "masks": masks.detach().sigmoid(),
        "losses": {name: float(value.detach()) for name, value in values.items()},
        "total": float(total.detach()),
    }


class TestTrainingStep:
    """`train_step.npz`: given proposals and sampled rows, to losses and gradients."""

    def test_targets_of_the_given_rows(self, step: dict[str, Any]) -> None:
        """Classes, deltas and masks of the rows that the original has drawn, from our own matching."""
        golden, canvas = step["golden"], step["canvas"]
        gt_boxes = last_pixel_inside(golden.boxes("in__gt_boxes_px").double())
        gt_classes = golden.tensor("in__gt_class_ids").long()
        proposals = to_pixels(golden.boxes("in__proposals").double(), *canvas)
        seen = 0
        for image in range(len(gt_boxes)):
            number = int((gt_classes[image] > 0).sum())
            rows = torch.nonzero(step["classes"][image] > 0).flatten()
            regions = to_pixels(golden.boxes("target__rois")[image, rows].double(), *canvas)
            # Every row is one of the proposals.
            drawn = step["regions"][image][step["regions"][image].any(dim=1)]
            distance = (drawn[:, None] - proposals[image][None]).abs().amax(dim=2).amin(dim=1)
            assert float(distance.max()) < 1e-3
            iou = pairwise_iou(regions, gt_boxes[image, :number])
            best, index = iou.max(dim=1)
            assert bool((best >= 0.5).all())
            torch.testing.assert_close(gt_classes[image, index], step["classes"][image, rows])
            deltas = encode_boxes(gt_boxes[image, index], regions, delta_scale("BBOX_STD_DEV"))
            expected = golden.boxes("target__deltas")[image, rows]
            torch.testing.assert_close(deltas.float(), expected, rtol=0, atol=1e-5)
            batch = box_batch([gt_boxes[image, :number].tolist()], [gt_classes[image, :number].tolist()])
            mini = golden["in__gt_masks_mini"][image][:, :, :number]
            batch = with_masks(batch, mini, last_pixel_outside(gt_boxes[image, :number]))
            expected_masks = golden.tensor("target__masks")[image, rows].float()
            masks = crop_mask_targets(
                batch,
                step["windows"][image : image + 1],
                torch.zeros_like(index),
                index,
                regions,
                expected_masks.shape[-1],
                "crop_and_resize",
            )
            torch.testing.assert_close(masks, expected_masks)
            seen += len(rows)
        assert seen > 0

    def test_outputs(self, step: dict[str, Any]) -> None:
        golden, number = step["golden"], step["regions"].shape[1]
        logits = step["class_logits"].unflatten(0, (-1, number))
        torch.testing.assert_close(logits, golden.tensor("out__mrcnn_class_logits"), rtol=0, atol=2e-4)
        deltas = step["box_deltas"].unflatten(0, (-1, number))
        torch.testing.assert_close(deltas, golden.boxes("out__mrcnn_bbox"), rtol=0, atol=1e-4)
        masks = step["masks"].unflatten(0, (-1, number))[:, ::4, ::2, ::2]
        torch.testing.assert_close(masks, golden.tensor("out__mrcnn_mask_sub"), rtol=0, atol=5e-5)

    def test_losses(self, step: dict[str, Any]) -> None:
        golden = step["golden"]
        for name, value in step["losses"].items():
            assert value == pytest.approx(float(golden[f"loss__{name}"]), rel=1e-5), name
        assert step["total"] == pytest.approx(float(golden["loss__total"]), rel=1e-5)

    def test_weight_decay(self, step: dict[str, Any], model: MaskRCNN) -> None:
        """The original's L2 term, over what was imported: kernels and biases, each by its size."""
        norms = {
            f"{path}.{name}"
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.BatchNorm2d)
            for name, _ in module.named_parameters()
        }
        terms = [
            original_config()["WEIGHT_DECAY"] * float(parameter.detach().double().square().mean())
            for name, parameter in model.named_parameters()
            if name not in norms
        ]
        assert sum(terms) == pytest.approx(float(step["golden"]["loss__l2"]), rel=1e-5)

    def test_gradients(self, step: dict[str, Any], model: MaskRCNN, tmp_path: Path) -> None:
        golden = step["golden"]
        gradients = keras_gradients(model, tmp_path)
        names = [str(name) for name in golden["grad__names"]]
        assert sorted(gradients) == sorted(names)
        norms = {name: float(np.linalg.norm(gradients[name].astype(np.float64))) for name in names}
        expected = dict(zip(names, golden["grad__norms"].tolist(), strict=True))
        largest = max(expected.values())
        for name in names:
            # A convolution's bias before a norm has a gradient of its own here: the norm's statistics are frozen.
            assert norms[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-6 * largest), name
        global_norm = float(np.sqrt(sum(value**2 for value in norms.values())))
        assert global_norm == pytest.approx(float(golden["grad__global_norm"]), rel=2e-3)
        samples = [name for name in names if f"grad_sample__{name.replace('/', '|')}" in golden]
        assert samples
        for name in samples:
            key = name.replace("/", "|")
            sample, every = golden[f"grad_sample__{key}"], int(golden[f"grad_step__{key}"])
            actual = gradients[name].ravel()[::every]
            np.testing.assert_allclose(actual, sample, rtol=0, atol=5e-3 * np.abs(sample).max(), err_msg=name)


def keras_gradients(model: MaskRCNN, folder: Path) -> dict[str, Array]:
    """Gradients of the model by the names and in the layout of the Keras file.

    Which of our numbers is which of Keras's is asked of the import itself: once with files that hold the number of the
    tensor everywhere, once with files that hold the place in the tensor. So it is also seen that the import only moves
    numbers, each to one place.
    """
    maker, content = weight_maker(), manifest()
    trainable = [
        (group["layer"], entry["name"], tuple(entry["shape"]))
        for group in content["layers"]
        for entry in group["weights"]
        if "moving_" not in entry["name"]
    ]
    numbers = {(layer, name): index for index, (layer, name, _) in enumerate(trainable)}
    tensor_of = imported(model, maker, content, folder, lambda layer, name, size: np.full(size, numbers[layer, name]))
    place_of = imported(model, maker, content, folder, lambda layer, name, size: np.arange(size))
    gradients = {f"{layer}/{name}": np.full(int(np.prod(shape)), np.nan) for layer, name, shape in trainable}
    by_number = [f"{layer}/{name}" for layer, name, _ in trainable]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        which = np.unique(tensor_of[name])
        assert len(which) == 1, name
        gradients[by_number[int(which[0])]][place_of[name].ravel().astype(np.int64)] = parameter.grad.numpy().ravel()
    for name, gradient in gradients.items():
        assert not np.isnan(gradient).any(), name
    return gradients


def imported(model: MaskRCNN, maker: Any, content: Any, folder: Path, fill: Any) -> dict[str, Array]:
    """Parameters of a second model that a file of made-up numbers was imported into."""
    import h5py

    path = folder / "numbers.h5"
    maker.write_h5(content, str(path), check=False)
    with h5py.File(path, "r+") as file:
        for group in content["layers"]:
            for entry in group["weights"]:
                dataset = file[group["layer"]][entry["name"]]
                if "moving_" not in entry["name"]:
                    dataset[...] = fill(group["layer"], entry["name"], dataset.size).reshape(dataset.shape)
    other = MaskRCNN(model.config, model.num_classes)
    import_weights(f"matterport:{path}", other, class_names())
    return {name: parameter.detach().numpy() for name, parameter in other.named_parameters()}
