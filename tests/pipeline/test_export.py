import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from model.config import ModelConfig
from model.export import ExportableDetector, export_program
from model.mask_rcnn import MaskRCNN
from model.products import usual_route
from model.structures import Detections
from pipeline.checkpoint import Description, write_checkpoint
from pipeline.config import ExperimentConfig
from pipeline.errors import UserError
from pipeline.export import _pictures, compare_detections, export_checkpoint

CANVAS = (96, 128)
ROOT = Path(__file__).parents[2]

THIN: dict[str, Any] = {
    "backbone": {"depth": 18},
    "fpn": {"channels": 32},
    "rpn": {"channels": 32, "pre_nms_top_k": 200, "proposals_inference": 50},
    "box_head": {"channels": 32},
    "mask_head": {"channels": 16},
    "anchors": {"scales": [8, 16, 32, 64, 128]},
}


def lively_model(preset: str | None = None, **detections: Any) -> MaskRCNN:
    """Random weights, large enough in the heads that scores and boxes spread."""
    values = THIN if preset is None else yaml.safe_load((ROOT / "configs" / f"{preset}.yaml").read_text())["model"]
    if preset is not None:
        sizes = {key: {**values.get(key, {}), **change} for key, change in THIN.items()}
        sizes["backbone"] = {**values["backbone"], "depth": 18} if preset != "matterport" else values["backbone"]
        sizes["anchors"]["scales"] = THIN["anchors"]["scales"]
        values = {**values, **sizes}
    values = {**values, "detections": {**values.get("detections", {}), "score_threshold": 0.3, **detections}}
    torch.manual_seed(0)
    model = MaskRCNN(ModelConfig.model_validate(values), 4)
    for layer, spread in (
        (model.rpn.class_logits, 0.1),
        (model.rpn.box_deltas, 0.1),
        (model.mask_head.mask_logits, 0.1),
    ):
        torch.nn.init.normal_(layer.weight, std=spread)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    model.eval()
    # Scores that spread, whatever the size of the features: logits of a standard deviation of 2, deltas of 1.
    for predictor, says, spread in (
        (model.box_head.class_logits, model.box_head.class_logits, 2.0),
        (model.box_head.box_deltas, model.box_head.box_deltas, 1.0),
        (model.mask_head.mask_logits, model.mask_head, 2.0),  # computed for the class that counts alone
    ):
        assert isinstance(predictor.weight, torch.Tensor)
        seen: list[torch.Tensor] = []
        handle = says.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        model.detect(*_pictures(CANVAS, 1))
        handle.remove()
        if seen[0].numel():
            with torch.no_grad():
                predictor.weight *= spread / seen[0].std()
    return model


def write(model: MaskRCNN, folder: Path) -> None:
    config = ExperimentConfig.model_validate(
        {"model": model.config.model_dump(mode="json"), "data": {"canvases": [list(CANVAS)]}}
    )
    folder.mkdir()
    description = Description(1, 1.0, 1.0, {}, ["a", "b", "c"], "digest", config.model_dump(mode="json"))
    write_checkpoint(str(folder), model, None, description)


@pytest.mark.parametrize(
    ("preset", "score"),
    [(None, "class"), (None, "class_times_mask"), ("matterport", "class"), ("torchvision_v1", "class"),
     ("torchvision_v2", "class")],
)  # fmt: skip
def test_an_exportable_model_finds_what_the_model_finds(preset: str | None, score: str) -> None:
    model = lively_model(preset, score=score)
    images, sizes = _pictures(CANVAS, 3)
    with usual_route():
        expected = model.detect(images, sizes)
    assert sum(map(len, expected)) > 5
    program = export_program(model, CANVAS, 3)
    outputs = program.module()(images, sizes)
    boxes, _ = compare_detections(expected, outputs, "program")
    assert boxes <= 1e-2
    assert (outputs[1][:, :-1] >= outputs[1][:, 1:]).all(), "best score first"


def test_an_image_without_objects_has_empty_slots_alone() -> None:
    model = lively_model(score_threshold=1.0)
    images, sizes = _pictures(CANVAS, 2)
    program = export_program(model, CANVAS, 2)
    boxes, scores, classes, masks = (output.detach() for output in program.module()(images, sizes))
    number = model.config.detections.max_per_image
    assert boxes.shape == (2, number, 4)
    assert masks.shape == (2, number, 28, 28)
    for output in (boxes, scores, classes, masks):
        assert not output.any()
    compare_detections(model.detect(images, sizes), (boxes, scores, classes, masks), "program")


@pytest.mark.parametrize("score", ["class", "class_times_mask"])
def test_a_job_writes_both_forms_and_says_how_close_they_are(tmp_path: Path, score: str) -> None:
    write(lively_model(score=score), tmp_path / "checkpoint")
    told: list[str] = []
    summary = export_checkpoint(str(tmp_path / "checkpoint"), str(tmp_path / "out"), 2, told.append)
    names = {"description.json", "model-96x128.onnx", "model-96x128.pt2"}
    assert {Path(path).name for path in summary["files"]} == names
    assert set(summary["files"]) == {str(path) for path in (tmp_path / "out").iterdir()}
    assert len(told) == 2
    assert 0 <= summary["largest_box_difference"] <= 1e-2
    description = json.loads((tmp_path / "out" / "description.json").read_text())
    assert description["class_names"] == ["a", "b", "c"]
    assert description["canvases"] == [list(CANVAS)]
    assert (description["short_side"], description["resize_method"]) == (None, "antialiased")

    with pytest.raises(UserError, match="exists already"):
        export_checkpoint(str(tmp_path / "checkpoint"), str(tmp_path / "out"), 2, told.append)


def test_nothing_is_left_of_an_export_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(lively_model(), tmp_path / "checkpoint")
    run = ExportableDetector.forward

    def a_pixel_off(self: ExportableDetector, images: torch.Tensor, sizes: torch.Tensor) -> Any:
        boxes, *others = run(self, images, sizes)
        return boxes + 1, *others

    monkeypatch.setattr(ExportableDetector, "forward", a_pixel_off)
    with pytest.raises(UserError, match=r"model-96x128.pt2: differs from the model by 1.00e\+00 pixels"):
        export_checkpoint(str(tmp_path / "checkpoint"), str(tmp_path / "out"), 1, lambda line: None)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def outputs_of(detections: Detections) -> list[torch.Tensor]:
    return [detections.boxes, detections.scores, detections.classes, detections.mask_probabilities]


def test_other_objects_are_told_from_close_ones() -> None:
    found = Detections(
        boxes=torch.tensor([[0.0, 0.0, 4.0, 4.0]]),
        scores=torch.tensor([0.5]),
        classes=torch.tensor([2]),
        mask_probabilities=torch.full((1, 2, 2), 0.5),
    )
    outputs = [value[None] for value in outputs_of(found)]
    assert compare_detections([found], outputs, "x") == (0.0, 0.0)
    with pytest.raises(UserError, match="finds other objects"):
        compare_detections([replace(found, classes=torch.tensor([1]))], outputs, "x")
    with pytest.raises(UserError, match=r"1 against 0"):
        compare_detections([found.where(torch.tensor([False]))], outputs, "x")
    # Of two with equal scores either may come first.
    both = Detections(*(torch.cat([value, value + 1]) for value in outputs_of(found)))
    swapped = [value.flip(0)[None] for value in outputs_of(both)]
    assert compare_detections(
        [replace(both, scores=found.scores.repeat(2))], [swapped[0], found.scores.repeat(2)[None], *swapped[2:]], "x"
    ) == (0.0, 0.0)
    with pytest.raises(UserError, match="scores or masks"):
        compare_detections([replace(found, scores=torch.tensor([0.6]))], outputs, "x")
