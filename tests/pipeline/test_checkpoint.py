import copy
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import BackboneConfig, FpnConfig, ModelConfig
from model.mask_rcnn import MaskRCNN
from pipeline import mlflow_models
from pipeline.checkpoint import (
    AVERAGE_FILE,
    DESCRIPTION_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    Description,
    build_model,
    capture,
    check_same_classes,
    load_model_state,
    load_optimizer_state,
    read_description,
    verify_checkpoint,
    write_checkpoint,
    write_state,
)
from pipeline.checkpoint_reference import best_checkpoint_of_run, resolve_checkpoint
from pipeline.config import ExperimentConfig, OptimSettings
from pipeline.ema import averaged_copy
from pipeline.errors import UserError
from pipeline.optim import build_optimizer
from pipeline.run_state import RESULT_FILE, RUN_FILE
from tests.pipeline.factories import CLASS_NAMES, thin_model

CONFIG = ExperimentConfig(model=thin_model())


def describe(step: int = 12, **metrics: float) -> Description:
    return Description(step, 1.5, 20.0, metrics, list(CLASS_NAMES), "digest", CONFIG.model_dump(mode="json"))


def thin(seed: int = 0, config: ModelConfig = CONFIG.model, num_classes: int = 4) -> MaskRCNN:
    torch.manual_seed(seed)
    return MaskRCNN(config, num_classes)


def trained(name: str, seed: int = 0) -> tuple[MaskRCNN, torch.optim.Optimizer]:
    """A model after two steps on made-up gradients, so that the optimiser has a state."""
    model = thin(seed)
    optimizer = build_optimizer(model, OptimSettings.model_validate({"name": name, "learning_rate": 0.01}))
    for step in range(2):
        take_step(model, optimizer, step)
    return model, optimizer


def take_step(model: MaskRCNN, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def assert_same_state(found: Any, expected: Any) -> None:
    """Equal in structure and to the bit."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same_state(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same_state(ours, theirs)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A checkpoint; not to be changed."""
    write_checkpoint(str(folder), *trained("sgd"), describe(segm_AP=0.25))
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in whole.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_every_bit_comes_back_and_training_goes_on_the_same(tmp_path: Path, name: str) -> None:
    model, optimizer = trained(name)
    with torch.no_grad():
        next(model.parameters()).view(-1)[:3] = torch.tensor([1e-42, -0.0, 3e38])  # bits that a text would lose
    write_checkpoint(str(tmp_path), model, optimizer, describe(bbox_AP=0.1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [DESCRIPTION_FILE, MODEL_FILE, OPTIMIZER_FILE]

    again = thin(seed=1)
    again_optimizer = build_optimizer(again, OptimSettings.model_validate({"name": name, "learning_rate": 0.5}))
    load_model_state(str(tmp_path), again)
    load_optimizer_state(str(tmp_path), again_optimizer)
    assert_same_state(dict(again.state_dict()), dict(model.state_dict()))
    assert next(again.parameters()).view(-1)[1].signbit()
    assert_same_state(again_optimizer.state_dict(), optimizer.state_dict())
    assert read_description(str(tmp_path)) == describe(bbox_AP=0.1)
    for seed in (7, 8):
        take_step(model, optimizer, seed)
        take_step(again, again_optimizer, seed)
    assert_same_state(dict(again.state_dict()), dict(model.state_dict()))


def test_optimiser_state_cannot_run_code(whole: Path) -> None:
    state = torch.load(whole / OPTIMIZER_FILE, weights_only=True)
    assert set(state) == {"state", "param_groups"}
    assert len(state["state"]) > 20


def test_buffers_are_in_it(whole: Path) -> None:
    model = thin(seed=3)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.fill_(9.0)
    load_model_state(str(whole), model)
    expected = trained("sgd")[0].state_dict()
    names = [name for name, _ in model.named_buffers() if name in expected]
    assert len(names) > 20
    for name in names:
        torch.testing.assert_close(model.state_dict()[name], expected[name], rtol=0, atol=0)


def test_model_is_built_from_its_checkpoint_alone(whole: Path) -> None:
    model, description = build_model(str(whole))
    assert not model.training
    assert description.experiment() == CONFIG
    assert description.class_names == list(CLASS_NAMES)
    torch.testing.assert_close(dict(model.state_dict()), dict(trained("sgd")[0].state_dict()), rtol=0, atol=0)


def test_the_average_is_saved_beside_the_weights_and_predicted_with(tmp_path: Path) -> None:
    model, optimizer = trained("sgd")
    averaged = averaged_copy(thin(seed=5))
    write_checkpoint(str(tmp_path), model, optimizer, describe(), averaged)
    predicts, _ = build_model(str(tmp_path))
    assert_same_state(dict(predicts.state_dict()), dict(averaged.state_dict()))
    goes_on, goes_on_average = thin(seed=1), thin(seed=2)
    load_model_state(str(tmp_path), goes_on)
    load_model_state(str(tmp_path), goes_on_average, AVERAGE_FILE)
    assert_same_state(dict(goes_on.state_dict()), dict(model.state_dict()))
    assert_same_state(dict(goes_on_average.state_dict()), dict(averaged.state_dict()))
    (tmp_path / AVERAGE_FILE).unlink()
    with pytest.raises(UserError, match=r"ema\.safetensors: None bytes, expected \d+; the checkpoint is not whole"):
        build_model(str(tmp_path))


def test_checkpoint_without_an_optimiser_is_for_prediction(tmp_path: Path) -> None:
    model, optimizer = trained("sgd")
    write_checkpoint(str(tmp_path), model, None, describe())
    assert sorted(path.name for path in tmp_path.iterdir()) == [DESCRIPTION_FILE, MODEL_FILE]
    build_model(str(tmp_path))
    with pytest.raises(UserError, match=r"has no optimizer\.pt; it can be predicted with, but not trained on$"):
        load_optimizer_state(str(tmp_path), optimizer)


def test_description_is_written_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without it there is no checkpoint, so one that was cut off is never taken for whole."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    model, optimizer = trained("sgd")
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(str(tmp_path), model, optimizer, describe())
    with pytest.raises(UserError, match="no checkpoint"):
        read_description(str(tmp_path))


def description_with(**values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = json.loads((folder / DESCRIPTION_FILE).read_text())
        content = {key: value for key, value in (content | values).items() if value is not None}
        (folder / DESCRIPTION_FILE).write_text(json.dumps(content))

    return change


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "file", "expected"),
    [
        (lambda folder: (folder / DESCRIPTION_FILE).unlink(), "", "no checkpoint"),
        (lambda folder: (folder / DESCRIPTION_FILE).write_text("{"), DESCRIPTION_FILE, "damaged ("),
        (lambda folder: (folder / DESCRIPTION_FILE).write_bytes(b"\xff"), DESCRIPTION_FILE, "damaged ("),
        (lambda folder: (folder / DESCRIPTION_FILE).write_text("[]"), DESCRIPTION_FILE, "format version None"),
        (description_with(format_version=99), DESCRIPTION_FILE, "format version 99, expected 2"),
        (description_with(step=None), DESCRIPTION_FILE, "damaged (TypeError"),
        (description_with(more=1), DESCRIPTION_FILE, "damaged (TypeError"),
        (description_with(files=None), DESCRIPTION_FILE, "damaged (KeyError 'files')"),
        (description_with(files=3), DESCRIPTION_FILE, "damaged (TypeError"),
        (description_with(files={MODEL_FILE: {}}), DESCRIPTION_FILE, "damaged (ValueError files without a size"),
        (lambda folder: (folder / MODEL_FILE).unlink(), MODEL_FILE, "None bytes, expected"),
        (lambda folder: (folder / OPTIMIZER_FILE).unlink(), OPTIMIZER_FILE, "None bytes, expected"),
        (cut(MODEL_FILE), MODEL_FILE, "bytes, expected"),
        (cut(OPTIMIZER_FILE), OPTIMIZER_FILE, "the checkpoint is not whole, take another one"),
    ],
)
def test_damaged_checkpoint_is_named(copied: Path, damage: Callable[[Path], object], file: str, expected: str) -> None:
    damage(copied)
    for use in (read_description, build_model):
        with pytest.raises(UserError) as caught:
            use(str(copied))
        assert str(caught.value).startswith(str(copied / file) if file else str(copied))
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [MODEL_FILE, OPTIMIZER_FILE])
def test_a_flipped_bit_is_named(copied: Path, name: str) -> None:
    """The length is right and the file can be loaded: only the digest tells."""
    assert verify_checkpoint(str(copied)) == read_description(str(copied))
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    read_description(str(copied))
    for use in (verify_checkpoint, build_model):
        with pytest.raises(UserError) as caught:
            use(str(copied))
        assert str(caught.value) == (
            f"{copied / name}: damaged (its SHA-256 is not that of checkpoint.json); take another checkpoint"
        )


def test_a_checkpoint_from_before_there_were_digests_is_read(copied: Path) -> None:
    content = json.loads((copied / DESCRIPTION_FILE).read_text())
    files = content.pop("files")
    content |= {"format_version": 1, "file_sizes": {name: entry["bytes"] for name, entry in files.items()}}
    (copied / DESCRIPTION_FILE).write_text(json.dumps(content))
    assert verify_checkpoint(str(copied)) == describe(segm_AP=0.25)
    cut(MODEL_FILE)(copied)
    with pytest.raises(UserError, match="bytes, expected"):
        verify_checkpoint(str(copied))


def test_a_captured_state_is_what_it_was_when_it_was_captured(tmp_path: Path) -> None:
    """It is written by a thread while the training changes the weights."""
    model, optimizer = trained("adamw")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected_state = copy.deepcopy(optimizer.state_dict())
    state = capture(model, optimizer)
    take_step(model, optimizer, 7)
    write_state(str(tmp_path), state, describe())
    again, again_optimizer = trained("adamw", seed=1)
    load_model_state(str(tmp_path), again)
    load_optimizer_state(str(tmp_path), again_optimizer)
    assert_same_state(dict(again.state_dict()), expected)
    assert_same_state(again_optimizer.state_dict(), expected_state)


def test_place_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "nowhere", tmp_path / "file", tmp_path):
        with pytest.raises(UserError, match=f"^{re.escape(str(place))}: no checkpoint"):
            read_description(str(place))


def test_configuration_of_another_version_is_named(copied: Path) -> None:
    config = CONFIG.model_dump(mode="json")
    config["model"]["rpn"]["nms"] = 0.5
    description_with(config=config)(copied)
    with pytest.raises(UserError, match=r"of another version: model\.rpn\.nms: Extra inputs are not permitted$"):
        build_model(str(copied))


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\x10" + bytes(200)])
def test_damaged_weights_are_named(copied: Path, content: bytes) -> None:
    (copied / MODEL_FILE).write_bytes(content)
    with pytest.raises(UserError, match=rf"{MODEL_FILE}: cannot be read \([^\n]*\)$"):
        load_model_state(str(copied), thin())


@pytest.mark.parametrize("content", [b"", b"no tensors", pickle.dumps(os.getcwd)])
def test_damaged_optimiser_state_is_named(copied: Path, content: bytes) -> None:
    (copied / OPTIMIZER_FILE).write_bytes(content)
    _, optimizer = trained("sgd")
    with pytest.raises(UserError, match=rf"{OPTIMIZER_FILE}: damaged \([^\n]*\); take another checkpoint$"):
        load_optimizer_state(str(copied), optimizer)


def test_optimiser_state_of_another_model_is_named(whole: Path) -> None:
    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimSettings())
    with pytest.raises(UserError, match=rf"{OPTIMIZER_FILE}: of another optimiser \("):
        load_optimizer_state(str(whole), optimizer)


@pytest.mark.parametrize(
    ("config", "num_classes", "expected"),
    [
        (
            CONFIG.model,
            5,
            r"of another architecture or number of classes: [\w.]+ is \(.*\), the configured model has \(",
        ),
        (
            CONFIG.model.model_copy(update={"fpn": FpnConfig(channels=16)}),
            4,
            r"of another architecture or number of classes: [\w.]+ is \(.*\), the configured model has \(",
        ),
        (
            CONFIG.model.model_copy(update={"backbone": BackboneConfig(depth=34)}),
            4,
            r"of another architecture: the checkpoint has no backbone[\w.]+$",
        ),
    ],
)
def test_weights_of_another_model_are_named_and_nothing_is_loaded(
    whole: Path, config: ModelConfig, num_classes: int, expected: str
) -> None:
    model = thin(5, config, num_classes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"^{re.escape(str(whole / MODEL_FILE))}: {expected}"):
        load_model_state(str(whole), model)
    assert_same_state(dict(model.state_dict()), before)


def test_weights_that_the_model_lacks_are_named(tmp_path: Path) -> None:
    deeper = CONFIG.model.model_copy(update={"backbone": BackboneConfig(depth=34)})
    write_checkpoint(str(tmp_path), thin(0, deeper), None, describe())
    with pytest.raises(UserError, match=r"of another architecture: the configured model has no backbone[\w.]+$"):
        load_model_state(str(tmp_path), thin())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cat", "bird", "dog"], "class 2 is 'dog' there, 'bird' in the data (3 against 3 classes)"),
        (["cat", "dog"], "class 3 is 'bird' there, missing in the data (3 against 2 classes)"),
        ([*CLASS_NAMES, "owl"], "class 4 is missing there, 'owl' in the data (3 against 4 classes)"),
    ],
)
def test_other_classes_are_refused(names: list[str], expected: str) -> None:
    check_same_classes(describe(), list(CLASS_NAMES), "best")
    with pytest.raises(UserError) as caught:
        check_same_classes(describe(), names, "best")
    assert str(caught.value) == f"best: trained on other classes: {expected}"


def write_run(folder: Path, checkpoints: dict[str, tuple[int, dict[str, float]]], model: MaskRCNN) -> None:
    for name, (step, metrics) in checkpoints.items():
        (folder / name).mkdir(parents=True)
        write_checkpoint(str(folder / name), model, None, describe(step, **metrics))


def test_best_checkpoint_of_a_run(tmp_path: Path) -> None:
    model = thin()
    run = tmp_path / "runs" / "mine"
    write_run(
        run,
        {
            "a": (10, {"segm_AP": 0.3}),
            "b": (20, {"segm_AP": 0.4}),
            "c": (30, {"segm_AP": 0.4}),  # as good, and later
            "d": (40, {"segm_AP": 0.1, "bbox_AP": 0.9}),
            "e": (50, {"segm_AP": 0.9}),
            "f": (60, {}),
        },
        model,
    )
    (run / "notes").mkdir()
    (run / "run.json").write_text("{}")
    (run / "e" / MODEL_FILE).unlink()  # cut off
    assert best_checkpoint_of_run(str(run)) == str(run / "c")
    assert best_checkpoint_of_run(str(run / "notes")) is None
    assert best_checkpoint_of_run(str(tmp_path / "nowhere")) is None
    # By the name of the run, its folder, or the checkpoint's own folder.
    assert resolve_checkpoint("mine", str(tmp_path / "runs")) == str(run / "c")
    assert resolve_checkpoint(str(run), "/elsewhere") == str(run / "c")
    assert resolve_checkpoint(str(run / "a"), "/elsewhere") == str(run / "a")


def test_unevaluated_checkpoints_count_least_and_the_latest_of_them_is_taken(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"a": (10, {}), "b": (20, {})}, thin())
    assert best_checkpoint_of_run(str(tmp_path / "run")) == str(tmp_path / "run" / "b")
    write_run(tmp_path / "run", {"c": (5, {"segm_AP": 0.0})}, thin())
    assert best_checkpoint_of_run(str(tmp_path / "run")) == str(tmp_path / "run" / "c")


def test_reference_to_nothing_is_explained(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for reference in ("nowhere", "empty", str(tmp_path / "empty")):
        with pytest.raises(UserError) as caught:
            resolve_checkpoint(reference, str(tmp_path))
        assert str(caught.value).startswith(f"{reference}: neither a checkpoint folder, nor a run")
        assert str(caught.value).endswith("nor models:/NAME@ALIAS")


def test_the_runs_that_there_are_stand_behind_a_wrong_name(tmp_path: Path) -> None:
    for name in ("shapes", "boards", "boards-smoke", "a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / RESULT_FILE).write_text("{}")
        (tmp_path / name / RUN_FILE).write_text("{}")
    for name, file in (("prediction", RUN_FILE), ("sweep", RESULT_FILE)):  # these are no runs of a training
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    with pytest.raises(UserError, match=r"; runs there: boards, boards-smoke, [^,]+, [^,]+, [^,]+ and 1 more$"):
        resolve_checkpoint("bords", str(tmp_path))


def test_id_of_an_mlflow_run_is_looked_up_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(run_id: str, uri: str | None) -> str:
        asked.append((run_id, uri))
        return "/downloaded"

    monkeypatch.setattr(mlflow_models, "download_checkpoint", download)
    run_id = "0123456789abcdef" * 2
    assert resolve_checkpoint(run_id, str(tmp_path), "http://127.0.0.1:1") == "/downloaded"
    assert asked == [(run_id, "http://127.0.0.1:1")]
