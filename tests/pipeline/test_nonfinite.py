"""The record of a step that is not finite holds all that is needed to compute it again."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from model.mask_rcnn import MaskRCNN
from pipeline.errors import UserError
from pipeline.nonfinite import (
    computed_again,
    is_bad,
    read_batch,
    read_record,
    record_path,
    write_batches,
    write_record,
)
from pipeline.replay import replay
from pipeline.training import STEP_METRICS
from tests.pipeline.small import small_batch, small_config

CONFIG = small_config()
BATCHES = [[small_batch(4, slice(0, 2))], [small_batch(4, slice(2, 4))]]  # of two workers


def make_model(poison: str | None = None) -> MaskRCNN:
    torch.manual_seed(0)
    model = MaskRCNN(CONFIG.model, num_classes=4)
    if poison is not None:
        with torch.no_grad():
            model.get_parameter(poison).view(-1)[0] = math.nan
    return model


def record(folder: Path, model: MaskRCNN, step: int = 12) -> str:
    workers = [
        {
            "rank": rank,
            "images": [
                {"row": 2 * rank + i, "image_id": 100 + 2 * rank + i, "boxes": [], "classes": []} for i in (0, 1)
            ],
            "batches": write_batches(str(folder), step, rank, batches),
            **computed_again(model, batches, CONFIG, None),
        }
        for rank, batches in enumerate(BATCHES)
    ]
    further = {
        "learning_rate": 0.5, "loss_scale": None, "weights_of_step": step, "device": "cpu", "precision": "fp32",
        "class_names": ["a", "b", "c"], "config": CONFIG.model_dump(mode="json"),
    }  # fmt: skip
    return write_record(str(folder), step, [math.nan, 1.0, 2.0, 3.0, 4.0, math.inf, math.nan], workers, model, further)


def test_the_record_is_json_without_nan(tmp_path: Path) -> None:
    path = record(tmp_path, make_model("box_head.class_logits.weight"))
    assert path == record_path(str(tmp_path), 12) == str(tmp_path / "nonfinite" / "step-12.json")

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    content = json.loads(Path(path).read_text(), parse_constant=refuse)
    assert content["loss"] == "nan"
    assert content["mrcnn_mask_loss"] == "inf"
    assert {name: content[name] for name in STEP_METRICS[1:3]} == {"rpn_class_loss": 1.0, "rpn_bbox_loss": 2.0}
    assert content["learning_rate"] == 0.5
    assert [image["image_id"] for worker in content["workers"] for image in worker["images"]] == [100, 101, 102, 103]
    assert content["workers"][0]["losses"]["mrcnn_class_loss"] == "nan"
    assert content["workers"][0]["gradient_norms"].keys() == {"backbone", "fpn", "rpn", "box_head", "mask_head"}


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_come_back_as_they_were(tmp_path: Path, rank: int) -> None:
    names = write_batches(str(tmp_path), 3, rank, BATCHES[rank])
    found = read_batch(str(tmp_path), names[0])
    for name, expected in vars(BATCHES[rank][0]).items():
        tensor = getattr(found, name)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
        assert tensor.dtype == expected.dtype


@pytest.mark.parametrize("poison", ["box_head.class_logits.weight", None])
def test_it_is_computed_again_to_the_same_numbers(tmp_path: Path, poison: str | None) -> None:
    outcome = replay(record(tmp_path, make_model(poison)))
    assert outcome["step"] == 12
    assert outcome["same_losses"]
    assert outcome["is_finite"] == (poison is None)
    assert [worker["image_ids"] for worker in outcome["workers"]] == [[100, 101], [102, 103]]
    for worker in outcome["workers"]:
        assert math.isfinite(worker["losses"]["mrcnn_class_loss"]) == (poison is None)
        assert math.isfinite(worker["losses"]["rpn_class_loss"])
        assert (worker["first_bad_gradient"] is None) == (poison is None)
        assert worker["gradient_norms"]["rpn"] > 0 or poison is not None


def test_computing_it_again_changes_nothing() -> None:
    model = make_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = computed_again(model, BATCHES[0], CONFIG, None)
    assert first == computed_again(model, BATCHES[0], CONFIG, None)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_what_is_bad() -> None:
    assert not is_bad([0.0, -1.0, 3e38])
    for value in (math.nan, math.inf, -math.inf):
        assert is_bad([1.0, value])


def test_a_record_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step-1\.json: there is no such file"):
        replay(str(tmp_path / "nonfinite" / "step-1.json"))
    path = Path(record(tmp_path, make_model()))
    (tmp_path / "nonfinite" / "step-12-weights.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"step-12-weights\.safetensors: cannot be read"):
        replay(str(path))
    for content in ("{", "[]", "{}"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"step-12\.json: not the record of a step"):
            read_record(str(path))
