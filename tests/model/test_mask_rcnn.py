from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from model.boxes import encode_boxes, pairwise_iou
from model.canvas import image_windows
from model.config import ModelConfig, NormKind, RoiConfig
from model.losses import LOSS_NAMES
from model.mask_rcnn import MaskRCNN
from model.mask_targets import crop_mask_targets
from model.masks import paste_masks
from model.structures import Batch, Detections
from tests.model.factories import (
    Scene,
    Thing,
    ellipse,
    fill_empty_slots,
    make_batch,
    noise_image,
    painted_scene,
    rectangle,
    take_images,
    tiny_config,
)

ROOT = Path(__file__).resolve().parents[2]


def make_model(config: ModelConfig | None = None, num_classes: int = 3) -> MaskRCNN:
    torch.manual_seed(0)
    return MaskRCNN(config or tiny_config(), num_classes)


def scenes() -> list[Scene]:
    """Two objects; one object and a crowd on a smaller image; nothing."""
    return [
        painted_scene(
            [Thing(rectangle((4, 6, 30, 40), 64, 64), 1), Thing(ellipse((34, 20, 62, 60), 64, 64), 2)], key=3
        ),
        painted_scene(
            [Thing(ellipse((2, 4, 40, 44), 48, 56), 2), Thing(rectangle((38, 4, 54, 46), 48, 56), 1, is_crowd=True)],
            height=48,
            width=56,
            key=4,
        ),
        painted_scene([], height=64, width=40, key=5),
    ]


def gradients(model: MaskRCNN, batch: Batch) -> dict[str, Tensor]:
    """Gradient of the sum of the five losses."""
    model.zero_grad()
    torch.autograd.backward(torch.stack(list(model(batch).values())).sum())
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def assert_same_detections(a: Sequence[Detections], b: Sequence[Detections]) -> None:
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.classes, other.classes)
        torch.testing.assert_close(one.boxes, other.boxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(one.mask_probabilities, other.mask_probabilities, rtol=1e-4, atol=1e-4)


class TestTraining:
    def test_five_finite_losses_by_name(self) -> None:
        losses = make_model().train()(make_batch(scenes()))
        assert tuple(losses) == LOSS_NAMES
        for loss in losses.values():
            assert loss.shape == ()
            assert loss.isfinite()
            assert loss > 0

    def test_the_same_batch_gives_the_same_losses(self) -> None:
        model = make_model().train()
        batch = make_batch(scenes())
        torch.testing.assert_close(model(batch), model(batch), rtol=0, atol=0)

    def test_another_key_draws_other_samples(self) -> None:
        model = make_model().train()
        batch = make_batch(scenes())
        other = model(replace(batch, random_keys=batch.random_keys + 1))
        assert not torch.equal(model(batch)["rpn_class_loss"], other["rpn_class_loss"])

    def test_losses_of_a_batch_are_the_mean_over_its_images(self) -> None:
        model = make_model().train()
        batch = make_batch(scenes())
        alone = [model(take_images(batch, [i])) for i in range(3)]
        expected = {name: torch.stack([losses[name] for losses in alone]).mean() for name in LOSS_NAMES}
        torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-5)
        assert alone[2]["mrcnn_mask_loss"] == alone[2]["mrcnn_bbox_loss"] == alone[2]["rpn_bbox_loss"] == 0

    @pytest.mark.usefixtures("everything_in_float64")
    def test_accumulation_over_images_gives_the_gradient_of_the_batch(self) -> None:
        model = make_model().train()
        batch = make_batch(scenes())
        batch = replace(batch, boxes=batch.boxes.double())
        together = gradients(model, batch)
        alone = [gradients(model, take_images(batch, [i])) for i in range(3)]
        for name, gradient in together.items():
            expected = torch.stack([g[name] for g in alone]).mean(dim=0)
            # Sums in another order: relative to the largest number of the tensor.
            tolerance = 1e-7 * float(gradient.abs().max())
            torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=tolerance)

    def test_order_of_the_images_does_not_matter(self) -> None:
        model = make_model().train()
        batch = make_batch(scenes())
        torch.testing.assert_close(model(take_images(batch, [2, 0, 1])), model(batch), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("backbone_norm", "head_norm"),
        [("batch", "batch"), ("frozen", "batch"), ("frozen", "group"), ("frozen", "none"), ("frozen", "frozen")],
    )
    def test_images_without_objects_train_every_parameter(
        self, backbone_norm: Literal["batch", "frozen"], head_norm: NormKind
    ) -> None:
        model = make_model(tiny_config(backbone_norm, head_norm)).train()
        batch = make_batch([scenes()[2], replace(scenes()[2], key=9)])
        losses = model(batch)
        assert losses["rpn_bbox_loss"] == losses["mrcnn_bbox_loss"] == losses["mrcnn_mask_loss"] == 0
        assert losses["rpn_class_loss"] > 0
        found = gradients(model, batch)
        assert all(gradient.isfinite().all() for gradient in found.values())
        assert found["rpn.class_logits.weight"].any()
        assert not found["mask_head.mask_logits.weight"].any()

    def test_no_region_at_all_trains_every_parameter(self) -> None:
        # Without ground truth among them and with nothing left of the proposals, both heads run on zero regions.
        config = tiny_config(head_norm="batch")
        config = config.model_copy(
            update={
                "roi": RoiConfig(rois_per_image=16, add_ground_truth=False),
                "rpn": config.rpn.model_copy(update={"min_size": 1000.0}),
            }
        )
        model = make_model(config).train()
        found = gradients(model, make_batch(scenes()))
        assert not found["box_head.class_logits.weight"].any()
        assert all(gradient.isfinite().all() for gradient in found.values())

    def test_every_parameter_learns_where_there_are_objects(self) -> None:
        found = gradients(make_model().train(), make_batch(scenes()))
        assert len(found) > 50
        for name, gradient in found.items():
            assert gradient.any(), name

    def test_empty_slots_change_nothing(self) -> None:
        model = make_model().train()
        few = make_batch(scenes(), slots=2)
        many = make_batch(scenes(), slots=9)
        expected = model(few)
        torch.testing.assert_close(model(many), expected)
        for as_crowd in (False, True):
            torch.testing.assert_close(model(fill_empty_slots(many, as_crowd)), expected)

    def test_what_lies_outside_of_the_image_changes_nothing(self) -> None:
        model = make_model().train()
        batch = make_batch(scenes())
        images = batch.images.clone()
        for image, (height, width) in zip(images, batch.image_sizes.tolist(), strict=True):
            image[:, height:] = 255
            image[:, :, width:] = 123
        assert not torch.equal(images, batch.images)
        torch.testing.assert_close(model(replace(batch, images=images)), model(batch))

    def test_crowds_are_no_objects(self) -> None:
        model = make_model().train()
        crowd = painted_scene([Thing(rectangle((4, 4, 60, 60), 64, 64), is_crowd=True)])
        losses = model(make_batch([crowd]))
        assert losses["rpn_bbox_loss"] == losses["mrcnn_bbox_loss"] == losses["mrcnn_mask_loss"] == 0

    def test_inactive_classes_get_no_gradient(self) -> None:
        model = make_model().train()
        first = replace(scenes()[1], active=(0, 2))
        found = gradients(model, make_batch([first, replace(scenes()[2], active=(0, 2))]))
        for name in ("box_head.class_logits.weight", "box_head.class_logits.bias"):
            per_class = found[name].reshape(3, -1)
            assert per_class.any(dim=1).tolist() == [True, False, True]

    def test_regions_are_trained_towards_the_object_they_match(self, monkeypatch: pytest.MonkeyPatch) -> None:
        config = tiny_config(roi=RoiConfig(rois_per_image=16, add_ground_truth=False))
        model = make_model(config).train()
        batch = make_batch(scenes()[:1])
        # The two objects, moved, in the opposite order, and one region of background.
        proposals = torch.stack(
            [batch.boxes[0, 1] + 3, batch.boxes[0, 0] + torch.tensor([2.0, -1, 4, 1]), torch.tensor([40.0, 0, 60, 15])]
        )
        monkeypatch.setattr(model, "propose", lambda *_: (proposals[None], torch.ones(1, 3, dtype=torch.bool)))
        with torch.no_grad():  # heads that predict the same everywhere: no change of the box, and logits of 2
            for layer in (model.box_head.box_deltas, model.mask_head.mask_logits):
                assert layer.bias is not None
                layer.weight.zero_()
                layer.bias.fill_(0.0 if layer is model.box_head.box_deltas else 2.0)
        losses = model(batch)

        target_deltas = encode_boxes(batch.boxes[0, [1, 0]], proposals[:2], config.box_head.delta_scale)
        expected = F.smooth_l1_loss(torch.zeros(2, 4), target_deltas, reduction="sum") / 3  # regions
        torch.testing.assert_close(losses["mrcnn_bbox_loss"], expected)
        zero = torch.zeros(2, dtype=torch.int64)
        windows = image_windows(batch.image_sizes, (64, 64), "top_left")
        masks = crop_mask_targets(batch, windows, zero, torch.tensor([1, 0]), proposals[:2], 28, "thresholded")
        expected = F.binary_cross_entropy_with_logits(torch.full((2, 28, 28), 2.0), masks)
        torch.testing.assert_close(losses["mrcnn_mask_loss"], expected)

    @pytest.mark.parametrize("head_norm", ["batch", "none"])
    def test_fixed_slots_of_a_gpu_give_what_the_compact_form_gives(
        self, head_norm: NormKind, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a GPU the heads run on all slots and leave the empty ones out; here a CPU does the same."""
        config = tiny_config(head_norm=head_norm)
        compact, fixed = make_model(config).train(), make_model(config).train()
        for batch in (make_batch(scenes()), make_batch(scenes()[2:])):
            expected_losses, expected_gradients = compact(batch), gradients(compact, batch)
            with monkeypatch.context() as patch:
                patch.setattr("model.mask_rcnn._slots", all_slots)
                patch.setattr("model.mask_rcnn._rows_to_mask", lambda valid: valid)
                losses, found = fixed(batch), gradients(fixed, batch)
            torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=1e-5)
            for name, gradient in expected_gradients.items():
                scale = max(float(gradient.abs().max()), 1e-3)
                torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * scale)
        statistics = {name: buffer for name, buffer in compact.named_buffers() if "running" in name}
        torch.testing.assert_close(
            {name: dict(fixed.named_buffers())[name] for name in statistics}, statistics, rtol=1e-4, atol=1e-5
        )

    def test_overfits_two_images(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The proposals stay the same, so that the losses of all steps can be compared.
        model = make_model(tiny_config(backbone_norm="batch", head_norm="none")).train()
        batch = make_batch(scenes()[:2])
        shift = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0)) * 3
        proposals = (batch.boxes[:, :2].repeat(1, 10, 1) + shift).clamp(min=0, max=64)
        monkeypatch.setattr(model, "propose", lambda *_: (proposals, torch.ones(2, 20, dtype=torch.bool)))
        history = train(model, batch, steps=30)
        for name, before, after in zip(LOSS_NAMES, history[0], history[-3:].mean(dim=0), strict=True):
            assert after < 0.6 * before, f"{name}: {before} to {after}"


def train(model: MaskRCNN, batch: Batch, steps: int) -> Tensor:
    """Losses of every step, (steps, 5)."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    history = []
    for _ in range(steps):
        losses = torch.stack(list(model(batch).values()))
        history.append(losses.detach())
        optimizer.zero_grad()
        torch.autograd.backward(losses.sum())
        optimizer.step()
    return torch.stack(history)


def all_slots(valid: Tensor) -> tuple[Tensor, Tensor]:
    image_index, slot = torch.nonzero(torch.ones_like(valid), as_tuple=True)
    return image_index, slot


class TestDetection:
    def batch(self) -> Batch:
        return make_batch(scenes())

    def test_detections_lie_inside_their_image(self) -> None:
        model, batch = make_model().eval(), self.batch()
        found = model.detect(batch.images, batch.image_sizes)
        assert len(found) == 3
        for image, (height, width) in zip(found, batch.image_sizes.tolist(), strict=True):
            assert 0 < len(image) <= 10
            assert (image.boxes >= 0).all()
            assert (image.boxes <= torch.tensor([width, height, width, height])).all()
            assert ((image.classes > 0) & (image.classes < 3)).all()
            assert ((image.scores > 0.05) & (image.scores <= 1)).all()
            assert (image.scores[:-1] >= image.scores[1:]).all()
            assert image.mask_probabilities.shape == (len(image), 28, 28)
            assert ((image.mask_probabilities >= 0) & (image.mask_probabilities <= 1)).all()
            assert not image.mask_probabilities.requires_grad

    def test_alone_equals_batched(self) -> None:
        model, batch = make_model().eval(), self.batch()
        together = model.detect(batch.images, batch.image_sizes)
        alone = [model.detect(batch.images[i : i + 1], batch.image_sizes[i : i + 1])[0] for i in range(3)]
        assert_same_detections(alone, together)

    def test_order_of_the_images_does_not_matter(self) -> None:
        model, batch = make_model().eval(), self.batch()
        together = model.detect(batch.images, batch.image_sizes)
        order = [2, 0, 1]
        moved = model.detect(batch.images[order], batch.image_sizes[order])
        assert_same_detections(moved, [together[i] for i in order])

    def test_nothing_found(self) -> None:
        config = tiny_config()
        config = config.model_copy(
            update={"detections": config.detections.model_copy(update={"score_threshold": 0.999})}
        )
        model, batch = make_model(config).eval(), self.batch()
        for found in model.detect(batch.images, batch.image_sizes):
            assert len(found) == 0
            assert found.boxes.shape == (0, 4)
            assert found.mask_probabilities.shape[0] == 0

    def test_nothing_proposed(self) -> None:
        config = tiny_config()
        config = config.model_copy(update={"rpn": config.rpn.model_copy(update={"min_size": 1000.0})})
        model, batch = make_model(config).eval(), self.batch()
        assert [len(found) for found in model.detect(batch.images, batch.image_sizes)] == [0, 0, 0]

    def test_an_overfitted_model_finds_the_objects(self) -> None:
        model = make_model(tiny_config(backbone_norm="batch", head_norm="none")).train()
        scene = scenes()[0]
        batch = make_batch([scene])
        train(model, batch, steps=40)
        found = model.eval().detect(batch.images, batch.image_sizes)[0]
        assert len(found) >= 2
        masks = paste_masks(found, 64, 64)
        for class_id, box, thing in zip((1, 2), batch.boxes[0, :2], scene.things, strict=True):
            best = int(torch.nonzero(found.classes == class_id)[0])  # the highest score of the class
            assert found.scores[best] > 0.4
            assert pairwise_iou(found.boxes[best][None], box[None]) > 0.5
            overlap = (masks[best] & thing.bitmap).sum() / (masks[best] | thing.bitmap).sum()
            assert overlap > 0.5


def thin(name: str, **changes: dict[str, Any]) -> ModelConfig:
    """A shipped preset with every knob that decides on numbers, as thin and small as `tiny_config`."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())["model"]
    sizes: dict[str, dict[str, Any]] = {
        "backbone": {"depth": 50},
        "fpn": {"channels": 16},
        "anchors": {"scales": (8, 16, 32, 48, 64)},
        "rpn": {"channels": 16, "anchors_per_image": 32, "pre_nms_top_k": 100, "proposals_training": 40}
        | {"proposals_inference": 20},
        "roi": {"rois_per_image": 16, "canonical_size": 32},
        "box_head": {"channels": 32, "convolution_channels": 8},
        "mask_head": {"channels": 16, "num_convolutions": 2},
        "detections": {"max_per_image": 10, "score_threshold": 0.05},
    }
    for section in sizes | changes:
        values[section] = values.get(section, {}) | sizes.get(section, {}) | changes.get(section, {})
    return ModelConfig.model_validate(values)


@pytest.mark.parametrize("name", ["matterport", "torchvision_v1", "torchvision_v2"])
class TestPresets:
    def test_losses_and_gradients_with_and_without_objects(self, name: str) -> None:
        # With ground truth among the proposals, since those of an untrained network hit nothing.
        model = make_model(thin(name, roi={"add_ground_truth": True})).train()
        batch = make_batch(scenes())
        losses = model(batch)
        assert tuple(losses) == LOSS_NAMES
        assert all(loss.isfinite() and loss > 0 for loss in losses.values())
        found = gradients(model, batch)
        assert all(gradient.isfinite().all() for gradient in found.values())
        assert all(gradient.any() for gradient in found.values())
        nothing = make_batch([scenes()[2], replace(scenes()[2], key=9)])
        losses = model(nothing)
        assert losses["rpn_bbox_loss"] == losses["mrcnn_bbox_loss"] == losses["mrcnn_mask_loss"] == 0
        assert bool(losses["mrcnn_class_loss"] == 0) is (name == "matterport")  # which draws no negatives alone
        assert all(gradient.isfinite().all() for gradient in gradients(model, nothing).values())

    def test_detections_lie_inside_their_image_and_images_do_not_see_each_other(self, name: str) -> None:
        model, batch = make_model(thin(name)).eval(), make_batch(scenes())
        together = model.detect(batch.images, batch.image_sizes)
        for image, (height, width) in zip(together, batch.image_sizes.tolist(), strict=True):
            assert 0 < len(image) <= 10
            assert (image.boxes >= -1e-4).all()
            assert (image.boxes <= torch.tensor([width, height, width, height]) + 1e-4).all()
        alone = [model.detect(batch.images[i : i + 1], batch.image_sizes[i : i + 1])[0] for i in range(3)]
        assert_same_detections(alone, together)


def moved_to_the_centre(batch: Batch) -> Batch:
    """Everything where the original has it, by padding on all sides; each image then covers its canvas."""
    images, shifts = torch.zeros_like(batch.images), torch.zeros(batch.num_images, 1, 4)
    for row, (height, width) in enumerate(batch.image_sizes.tolist()):
        top, left = (64 - height) // 2, (64 - width) // 2
        images[row, :, top : top + height, left : left + width] = batch.images[row, :, :height, :width]
        shifts[row] = torch.tensor([left, top, left, top])
    return replace(
        batch,
        images=images,
        image_sizes=torch.full_like(batch.image_sizes, 64),
        boxes=batch.boxes + shifts,
        mask_boxes=batch.mask_boxes + shifts,
    )


class TestImagesInTheCentre:
    def test_training_is_that_of_images_padded_on_all_sides(self) -> None:
        config = thin("matterport", roi={"add_ground_truth": True})
        centre = make_model(config).train()
        top_left = make_model(config.model_copy(update={"image_position": "top_left"})).train()
        assert centre.config.image_position == "centre"
        batch = make_batch(scenes())
        expected = top_left(moved_to_the_centre(batch))
        torch.testing.assert_close(centre(batch), expected, rtol=1e-5, atol=1e-6)
        assert not torch.isclose(top_left(batch)["mrcnn_mask_loss"], expected["mrcnn_mask_loss"])

    @pytest.mark.parametrize(("frame", "edge"), [("exclusive", 0), ("inclusive", 1)])
    def test_detections_come_back_where_the_image_was_given(
        self, frame: str, edge: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = make_model(thin("matterport").model_copy(update={"boxes": frame})).eval()
        images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
        images[:, :, :32, :41] = noise_image(32, 41)
        # On the canvas the image covers 11 to 52 and 16 to 48; the last pixel counts inside, or does not.
        found_there = torch.tensor([[11.0, 16, 52, 48], [20, 20, 30, 40]]) - torch.tensor([0.0, 0, edge, edge])
        windows = []

        def select(*arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            windows.append(arguments[3])
            return found_there, torch.tensor([0.9, 0.8]), torch.tensor([1, 2])

        monkeypatch.setattr("model.mask_rcnn.select_detections", select)
        found = model.detect(images, torch.tensor([[32, 41]]))[0]
        torch.testing.assert_close(found.boxes, torch.tensor([[0.0, 0, 41, 32], [9, 4, 19, 24]]))
        torch.testing.assert_close(windows[0], torch.tensor([11.0, 16, 52 - edge, 48 - edge]))

    def test_the_network_sees_the_image_in_the_centre(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = make_model(thin("matterport")).eval()
        batch = make_batch(scenes())
        seen: list[Tensor] = []
        forward = model.backbone.forward

        def look(images: Tensor) -> list[Tensor]:
            seen.append(images)
            return forward(images)

        monkeypatch.setattr(model.backbone, "forward", look)
        model.detect(batch.images, batch.image_sizes)
        mean = 255 * torch.tensor(model.config.pixel_mean)[:, None, None]
        expected = moved_to_the_centre(batch).images.float() - mean
        torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-3)


class TestProposals:
    @pytest.mark.parametrize(
        ("clip_to", "frame", "expected"),
        [
            ("image", "exclusive", [12, 8, 52, 56]),
            ("canvas", "exclusive", [0, 0, 64, 64]),
            ("image", "inclusive", [12, 8, 51, 55]),
            ("canvas", "inclusive", [0, 0, 63, 63]),
        ],
    )
    def test_they_are_clipped_to_the_image_or_the_canvas(self, clip_to: str, frame: str, expected: list[int]) -> None:
        config = thin("matterport", rpn={"clip_to": clip_to}).model_copy(update={"boxes": frame})
        model = make_model(config).eval()
        anchors = [torch.tensor([[-90.0, -90, 900, 900]])]
        windows = torch.tensor([[12.0, 8, 52, 56]])
        proposals, valid = model.propose(torch.zeros(1, 1, 2), torch.zeros(1, 1, 4), anchors, windows, (64, 64))
        torch.testing.assert_close(proposals[0, 0], torch.tensor(expected).float())
        assert valid.sum() == 1
        torch.testing.assert_close(windows, torch.tensor([[12.0, 8, 52, 56]]))

    def test_training_and_inference_have_counts_of_their_own(self) -> None:
        knobs = {"pre_nms_top_k": 30, "pre_nms_top_k_inference": 7, "nms_threshold": 1.0}
        model = make_model(thin("torchvision_v1", rpn=knobs | {"proposals_inference": 50}))
        corner = torch.arange(0, 60, 1.5)
        levels = [torch.stack([corner, corner, corner + 5, corner + 5], dim=1)] * 2
        output = torch.randn(1, 80, 2), torch.zeros(1, 80, 4), levels, torch.tensor([[0.0, 0, 64, 64]]), (64, 64)
        assert [v.sum() for v in (model.eval().propose(*output)[1], model.train().propose(*output)[1])] == [14, 40]
        default = make_model(thin("torchvision_v1", rpn=knobs | {"pre_nms_top_k_inference": None})).eval()
        assert default.propose(*output)[1].sum() == 20


class TestAnchors:
    def test_they_are_kept_for_each_canvas(self) -> None:
        model = make_model()
        small, large = (64, 64), (64, 128)
        levels = {64: [torch.zeros(1, 1, s, s) for s in (16, 8, 4, 2, 1)]}
        levels[128] = [torch.zeros(1, 1, s, 2 * s) for s in (16, 8, 4, 2, 1)]
        first = model.anchors(small, levels[64])
        assert [tuple(level.shape) for level in first] == [(3 * cells, 4) for cells in (256, 64, 16, 4, 1)]
        wide = model.anchors(large, levels[128])
        assert [tuple(level.shape) for level in wide] == [(2 * 3 * cells, 4) for cells in (256, 64, 16, 4, 1)]
        assert model.anchors(small, levels[64]) is first

    def test_as_many_as_the_network_scores(self) -> None:
        model = make_model()
        for height, width in ((64, 64), (32, 96), (96, 160)):
            images = torch.zeros(1, 3, height, width, dtype=torch.uint8)
            pyramid = model.features(images, torch.tensor([[0, 0, width, height]]))
            anchors = torch.cat(model.anchors((height, width), pyramid))
            assert model.rpn(pyramid)[0].shape[1] == anchors.shape[0]


def test_pixels_are_normalised_with_mean_and_standard_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(pixel_mean=(0.5, 0.25, 0.0), pixel_std=(0.5, 0.25, 1.0))
    model = make_model(config)
    seen: list[Tensor] = []

    def look(images: Tensor) -> list[Tensor]:
        seen.append(images)
        return [torch.zeros(1, c, 64 // s, 64 // s) for c, s in zip((64, 128, 256, 512), (4, 8, 16, 32), strict=True)]

    monkeypatch.setattr(model.backbone, "forward", look)
    model.features(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8), torch.tensor([[0, 0, 50, 40]]))
    # 255 is 1: (1 - 0.5) / 0.5, (1 - 0.25) / 0.25, (1 - 0) / 1; zero, the mean, outside of the image.
    expected = torch.zeros(1, 3, 64, 64)
    expected[:, :, :40, :50] = torch.tensor([1.0, 3.0, 1.0])[:, None, None]
    torch.testing.assert_close(seen[0], expected)


def test_background_needs_company() -> None:
    with pytest.raises(ValueError, match="at least 2, got 1"):
        MaskRCNN(tiny_config(), 1)
