"""What `model.weights` means for a run, and what is evaluated where no checkpoint is named."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torchvision import models

from model.mask_rcnn import MaskRCNN
from pipeline import storage
from pipeline.checkpoint import Description, write_checkpoint
from pipeline.command_line import ConfigurationError
from pipeline.config import ExperimentConfig
from pipeline.errors import UserError
from pipeline.inference import find_weights, load_weights
from pipeline.initial_weights import (
    INITIAL_WEIGHTS_FILE,
    InitialWeights,
    check_source,
    initial_weights,
    load_initial_weights,
)
from pipeline.run_state import RunState, run_folder, write_run
from pipeline.search_space import apply_point
from tests.pipeline.factories import thin_model

NAMES = ("circle", "square")


def config_with(folder: Path, weights: str, seed: int = 3) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "model": {**thin_model().model_dump(), "weights": weights},
            "run": {"name": "run", "storage_path": str(folder / "runs")},
            "train": {"seed": seed},
        }
    )


def drawn(config: ExperimentConfig, num_classes: int = 3) -> MaskRCNN:
    """Initial values as a worker draws them."""
    torch.manual_seed(config.train.seed)
    return MaskRCNN(config.model, num_classes)


def begin(config: ExperimentConfig) -> None:
    write_run(run_folder(config), RunState(config.model_dump(mode="json"), "a", "b", None))


@pytest.fixture
def resnet(tmp_path: Path) -> str:
    torch.manual_seed(11)
    torch.save(models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    return f"torchvision:{tmp_path / 'resnet18.pth'}"


def checkpoint(folder: Path, names: tuple[str, ...], seed: int = 5) -> dict[str, torch.Tensor]:
    """A checkpoint of ours, and its weights."""
    config = config_with(folder, "none", seed)
    model = drawn(config, len(names) + 1)
    folder.mkdir(parents=True)
    description = Description(1, 1.0, 1.0, {}, list(names), "digest", config.model_dump(mode="json"))
    write_checkpoint(str(folder), model, None, description)
    return dict(model.state_dict())


def written(weights: InitialWeights | None) -> dict[str, torch.Tensor]:
    assert weights is not None
    weights.write()
    return load_file(weights.path)


def test_none_is_none(tmp_path: Path) -> None:
    said: list[str] = []
    assert initial_weights(config_with(tmp_path, "none"), NAMES, said.append) is None
    assert said == []


def test_a_backbone_from_a_file_and_the_rest_as_workers_draw_it(tmp_path: Path, resnet: str) -> None:
    config = config_with(tmp_path, resnet)
    said: list[str] = []
    before = torch.random.get_rng_state()
    weights = initial_weights(config, NAMES, said.append)
    assert torch.equal(torch.random.get_rng_state(), before), "no draw of anybody else changes"
    assert not (tmp_path / "runs").exists(), "nothing is written before the training begins"
    state = written(weights)
    assert weights is not None
    assert weights.path == str(tmp_path / "runs" / "run" / INITIAL_WEIGHTS_FILE)
    theirs = torch.load(tmp_path / "resnet18.pth", weights_only=True)
    assert torch.equal(state["backbone.stem.0.weight"], theirs["conv1.weight"])
    assert torch.equal(state["backbone.stages.3.1.bn2.running_var"], theirs["layer4.1.bn2.running_var"])
    expected = drawn(config).state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert name.startswith("backbone.") or torch.equal(tensor, expected[name]), name
    assert said[0].startswith(f"weights: {resnet}: 100 tensors loaded (backbone 100)")
    assert said == (weights.report.lines() if weights.report else None)


def test_workers_load_what_was_written(tmp_path: Path, resnet: str) -> None:
    config = config_with(tmp_path, resnet)
    state = written(initial_weights(config, NAMES, lambda line: None))
    model = drawn(config_with(tmp_path, resnet, seed=8))
    load_initial_weights(str(tmp_path / "runs" / "run" / INITIAL_WEIGHTS_FILE), model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_a_run_that_was_begun_keeps_its_weights(tmp_path: Path, resnet: str) -> None:
    config = config_with(tmp_path, resnet)
    written(initial_weights(config, NAMES, lambda line: None))
    path = tmp_path / "runs" / "run" / INITIAL_WEIGHTS_FILE
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    begin(config)
    (tmp_path / "resnet18.pth").unlink()
    said: list[str] = []
    again = initial_weights(config, NAMES, said.append)
    assert again == InitialWeights(str(path), None, None)
    assert again is not None
    again.write()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert said == []


def test_a_file_of_a_run_that_never_began_is_replaced(tmp_path: Path, resnet: str) -> None:
    config = config_with(tmp_path, resnet)
    path = tmp_path / "runs" / "run" / INITIAL_WEIGHTS_FILE
    storage.write_bytes(str(path), b"of another attempt")
    state = written(initial_weights(config, NAMES, lambda line: None))
    assert "backbone.stem.0.weight" in state


def test_a_lost_file_is_made_anew(tmp_path: Path, resnet: str) -> None:
    config = config_with(tmp_path, resnet)
    begin(config)
    assert "backbone.stem.0.weight" in written(initial_weights(config, NAMES, lambda line: None))


def test_remote_storage(tmp_path: Path, resnet: str) -> None:
    """Through the same file systems as a bucket."""
    config = config_with(tmp_path, resnet)
    config = config.model_copy(
        update={"run": config.run.model_copy(update={"storage_path": f"file://{tmp_path / 'bucket'}"})}
    )
    weights = initial_weights(config, NAMES, lambda line: None)
    assert weights is not None
    (tmp_path / "bucket" / "run").mkdir(parents=True)
    weights.write()
    model = drawn(config)
    load_initial_weights(weights.path, model)
    theirs = torch.load(tmp_path / "resnet18.pth", weights_only=True)
    assert torch.equal(model.state_dict()["backbone.stem.0.weight"], theirs["conv1.weight"])


@pytest.mark.parametrize("as_name", [True, False])
def test_a_checkpoint_of_ours_with_other_classes(tmp_path: Path, as_name: bool) -> None:
    theirs = checkpoint(tmp_path / "runs" / "earlier" / "checkpoint-1", ("square", "star", "triangle"))
    reference = "earlier" if as_name else str(tmp_path / "runs" / "earlier" / "checkpoint-1")
    config = config_with(tmp_path, reference)
    said: list[str] = []
    state = written(initial_weights(config, NAMES, said.append))
    expected = drawn(config).state_dict()
    assert torch.equal(state["mask_head.upsampling.weight"], theirs["mask_head.upsampling.weight"])
    logits = "box_head.class_logits.weight"
    assert torch.equal(state[logits][0], theirs[logits][0])
    assert torch.equal(state[logits][1], expected[logits][1])
    assert torch.equal(state[logits][2], theirs[logits][1])
    assert "weights: classes: by name (those of the checkpoint), 1 of 2" in said


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        ("nowhere", "nowhere: neither a checkpoint folder, nor a run"),
        ("model.h5", "model.h5: no checkpoint of ours; say whose file it is: matterport:model.h5"),
        ("a/model.pth", "a/model.pth: no checkpoint of ours; say whose file it is: torchvision:a/model.pth"),
        ("matterport:model.h5", "matterport:model.h5: no such file"),
        ("0" * 32, f"{'0' * 32}: no MLflow store in "),
        ("models:/cells@champion", "models:/cells@champion: no MLflow store in "),
        ("torchvision:", "torchvision:FILE or torchvision:NAME: which one is missing"),
        ("torchvision:" + "x" * 300, "torchvision:xxx"),
        ("torchvision:COCO_V8", "torchvision:COCO_V8: no such file, nor the name of weights"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path: Path, weights: str, found: str) -> None:
    with pytest.raises(UserError) as caught:
        initial_weights(config_with(tmp_path, weights), NAMES, lambda line: None)
    assert str(caught.value).startswith(found)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_source_is_looked_at_before_a_sweep(tmp_path: Path, resnet: str) -> None:
    config = config_with(tmp_path, "none")
    checkpoint(tmp_path / "runs" / "earlier" / "checkpoint-1", NAMES)
    for source in ("none", resnet, "earlier"):
        check_source(config, source)
    for source in ("nowhere", "matterport:model.h5"):
        with pytest.raises(UserError, match=rf"^{source}: "):
            check_source(config, source)


def test_a_checkpoint_of_ours_with_a_changed_byte(tmp_path: Path) -> None:
    checkpoint(tmp_path / "checkpoint", NAMES)
    path = tmp_path / "checkpoint" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    config = config_with(tmp_path, str(tmp_path / "checkpoint"))
    with pytest.raises(UserError, match=rf"^{path}: damaged"):
        initial_weights(config, NAMES, lambda line: None)
    with pytest.raises(UserError, match=rf"^{path}: damaged"):
        load_weights(config, str(tmp_path / "checkpoint"), NAMES, lambda line: None)


def test_a_checkpoint_of_a_model_that_computes_otherwise_is_noted(tmp_path: Path) -> None:
    checkpoint(tmp_path / "checkpoint", NAMES)
    config = apply_point(config_with(tmp_path, str(tmp_path / "checkpoint")), {"model.padding": "black"})
    said: list[str] = []
    initial_weights(config, NAMES, said.append)
    assert any("model.padding black (there mean)" in line for line in said)


@pytest.mark.parametrize("content", [None, b"", b"no weights", "others"])
def test_a_file_that_is_not_what_was_written(tmp_path: Path, content: Any) -> None:
    path = tmp_path / INITIAL_WEIGHTS_FILE
    model = drawn(config_with(tmp_path, "none"))
    if content == "others":
        others = drawn(config_with(tmp_path, "none"), num_classes=7).state_dict()
        InitialWeights(str(path), dict(others), None).write()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path}: cannot be loaded \([^\n]+\); begin a new run with --run\.name$"):
        load_initial_weights(str(path), model)


class TestEvaluation:
    def test_nothing_to_evaluate(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"^checkpoint: nothing to evaluate; name one with --checkpoint"):
            find_weights(config_with(tmp_path, "none"), None)

    def test_the_named_checkpoint_goes_before_the_initial_weights(self, tmp_path: Path, resnet: str) -> None:
        folder = tmp_path / "runs" / "earlier" / "checkpoint-1"
        checkpoint(folder, NAMES)
        config = config_with(tmp_path, resnet)
        assert find_weights(config, "earlier") == str(folder)
        assert find_weights(config, "matterport:a.h5") == "matterport:a.h5"
        assert find_weights(config, None) == resnet
        assert find_weights(config_with(tmp_path, "earlier"), None) == str(folder)

    def test_a_checkpoint_that_there_is_not(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"^nowhere: neither a checkpoint folder"):
            find_weights(config_with(tmp_path, "none"), "nowhere")

    def test_weights_of_others_are_reported(self, tmp_path: Path, resnet: str) -> None:
        said: list[str] = []
        model = load_weights(config_with(tmp_path, "none"), resnet, NAMES, said.append)
        theirs = torch.load(tmp_path / "resnet18.pth", weights_only=True)
        assert torch.equal(model.state_dict()["backbone.stem.0.weight"], theirs["conv1.weight"])
        assert said[0].startswith(f"weights: {resnet}: 100 tensors loaded")

    def test_a_checkpoint_of_ours_is_of_the_same_classes(self, tmp_path: Path) -> None:
        theirs = checkpoint(tmp_path / "checkpoint", NAMES)
        config = config_with(tmp_path, "none")
        model = load_weights(config, str(tmp_path / "checkpoint"), NAMES, lambda line: None)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
        with pytest.raises(UserError, match="trained on other classes: class 1 is 'circle' there, 'square' in the"):
            load_weights(config, str(tmp_path / "checkpoint"), ("square", "circle"), lambda line: None)

    def test_a_model_that_would_compute_otherwise_is_refused(self, tmp_path: Path) -> None:
        checkpoint(tmp_path / "checkpoint", NAMES)
        config = config_with(tmp_path, "none")

        def load(changes: dict[str, Any]) -> None:
            changed = apply_point(config, changes)
            load_weights(changed, str(tmp_path / "checkpoint"), NAMES, lambda line: None)

        load({"model.rpn.nms_threshold": 0.5, "model.detections.score_threshold": 0.3, "model.roi.rois_per_image": 8})
        with pytest.raises(UserError, match=r"another model than .*: model\.anchors\.scales \[1\.0, 2"):
            load({"model.anchors.scales": [1.0, 2.0, 4.0, 8.0, 16.0]})
