"""Defects of the original that no configuration of ours repeats: one test a row of docs/defects.md."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from model import losses
from model.anchors import level_anchors
from model.config import ModelConfig
from model.mask_rcnn import MaskRCNN
from model.structures import Batch
from model.targets import match_anchors, sample_regions
from tests.model.factories import Thing, box_batch, fill_empty_slots, make_batch, painted_scene, rectangle

ROOT = Path(__file__).resolve().parents[2]
LOSSES_OF_THE_HEADS = ("mrcnn_class_loss", "mrcnn_bbox_loss", "mrcnn_mask_loss")


def matterport(**changes: object) -> ModelConfig:
    """The preset, thin enough for a test."""
    values = yaml.safe_load((ROOT / "configs" / "matterport.yaml").read_text())["model"]
    values["fpn"] = {"channels": 16}
    values["rpn"] |= {"channels": 16, "pre_nms_top_k": 200, "proposals_training": 50, "proposals_inference": 50}
    values["roi"] |= {"rois_per_image": 32}
    values["box_head"] |= {"channels": 16}
    values["mask_head"] |= {"channels": 16}
    return ModelConfig.model_validate(values).model_copy(update=changes)


def batch_of_two() -> Batch:
    things = [Thing(rectangle((8, 8, 40, 36), 64, 64), class_id=1), Thing(rectangle((30, 30, 60, 60), 64, 64), 2)]
    return make_batch([painted_scene(things, key=1), painted_scene(things[:1], key=2)])


@pytest.fixture(scope="module")
def model() -> MaskRCNN:
    torch.manual_seed(0)
    model = MaskRCNN(matterport(), num_classes=3)
    # Proposals of about the ground truth, so that there are positives: anchors that score by chance will do.
    torch.nn.init.normal_(model.rpn.class_logits.weight, std=0.5)
    return model.train()


def test_the_losses_of_the_heads_do_not_reach_the_rpn(model: MaskRCNN) -> None:
    batch = batch_of_two()
    model.zero_grad()
    values = model(batch)
    torch.stack([values[name] for name in LOSSES_OF_THE_HEADS]).sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in model.rpn.parameters())
    assert model.box_head.class_logits.weight.grad is not None


def test_every_image_has_the_flags_of_its_own_data_set(model: MaskRCNN) -> None:
    """Whatever image comes first, the mean over both is the same."""
    batch = batch_of_two()
    active = torch.tensor([[True, True, True], [True, True, False]])
    batch = replace(batch, active_class_ids=active)
    image_index = torch.tensor([0, 0, 1, 1])
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
    classes, valid = torch.tensor([1, 2, 1, 0]), torch.ones(4, dtype=torch.bool)
    # By hand: the last region's best class, 2, is not labelled in its image, so it does not count.
    expected = -logits.log_softmax(dim=1)[torch.arange(3), classes[:3]].mean()
    found = losses.mrcnn_class_loss(
        logits, classes, valid, image_index, batch.active_class_ids, "positives", "by_prediction"
    )
    torch.testing.assert_close(found, expected)
    exchanged = losses.mrcnn_class_loss(
        logits, classes, valid, 1 - image_index, active.flip(0), "positives", "by_prediction"
    )
    torch.testing.assert_close(exchanged, expected)


@pytest.mark.parametrize("inactive_classes", ["masked", "by_prediction"])
def test_a_loss_over_nothing_is_zero(inactive_classes: str) -> None:
    logits = torch.tensor([[0.0, 5.0]], requires_grad=True)
    nothing = torch.tensor([inactive_classes == "by_prediction"])
    loss = losses.mrcnn_class_loss(
        logits,
        torch.tensor([0]),
        nothing,
        torch.tensor([0]),
        torch.tensor([[True, False]]),
        "positives",
        inactive_classes,  # type: ignore[arg-type]
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_an_object_that_no_anchor_overlaps_makes_none_positive() -> None:
    anchors = torch.tensor([[0.0, 0.0, 16.0, 16.0], [16.0, 0.0, 32.0, 16.0]])
    batch = box_batch([[[100.0, 100.0, 120.0, 120.0]]], [[1]])
    positive, negative, _ = match_anchors(anchors, batch, matterport())
    assert not positive.any()
    assert negative.all()


def test_padding_is_no_background() -> None:
    """Rows of zeros behind the proposals are not drawn, not even as negatives."""
    batch = box_batch([[[0.0, 0.0, 32.0, 32.0]]], [[1]])
    proposals = torch.zeros(1, 8, 4)
    proposals[0, 0], proposals[0, 1] = torch.tensor([0.0, 0.0, 30.0, 30.0]), torch.tensor([50.0, 50.0, 60.0, 60.0])
    valid = torch.tensor([[True, True] + [False] * 6])
    config = matterport()
    targets = sample_regions(proposals, valid, batch, config)
    assert targets.boxes[targets.valid].tolist() == proposals[0, :2].tolist()
    assert targets.classes[targets.valid].tolist() == [1, 0]


def test_what_stands_in_padding_changes_nothing(model: MaskRCNN) -> None:
    batch = batch_of_two()
    expected = model(batch)
    for name, loss in model(fill_empty_slots(batch)).items():
        torch.testing.assert_close(loss, expected[name], rtol=0, atol=0, msg=name)


def test_a_ratio_of_one_half_is_a_tall_anchor() -> None:
    left, top, right, bottom = level_anchors([16], [0.5], (1, 1), (4, 4), 1)[0].tolist()
    assert bottom - top == pytest.approx(2 * (right - left))
    assert (bottom - top) * (right - left) == pytest.approx(16 * 16)
