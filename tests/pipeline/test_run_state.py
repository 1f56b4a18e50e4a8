import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ExperimentConfig
from pipeline.errors import UserError
from pipeline.run_state import (
    RESULT_FILE,
    RUN_FILE,
    RunResult,
    RunState,
    annotation_digests,
    check_same_data,
    check_unchanged,
    read_result,
    read_run,
    run_folder,
    write_result,
    write_run,
)


def state_of(config: ExperimentConfig) -> RunState:
    return RunState(config.model_dump(mode="json"), "training digest", "validation digest", "0123")


def config_with(**parts: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate(parts)


def test_run_survives_its_file(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    assert read_run(folder) is None
    state = state_of(config_with(optim={"name": "adamw"}))
    write_run(folder, state)
    again = read_run(folder)
    assert again == state
    check_unchanged(state, config_with(optim={"name": "adamw"}), folder)
    write_run(folder, RunState({}, "a", "b", None))
    assert read_run(folder) == RunState({}, "a", "b", None)


def test_result_survives_its_file(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    assert read_result(folder) is None
    result = RunResult("5 epochs", {"segm_AP": 0.25, "checkpoint": "here"})
    write_result(folder, result)
    assert read_result(folder) == result


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": {}}', '{"config": {}, "other": 1}'])
def test_damaged_run_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / RUN_FILE).write_text(text)
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/{RUN_FILE}: damaged \([^\n]*\); begin a new run with --run.name$"
    ):
        read_run(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"summary": {}}', '{"segm_AP": 0.5}'])
def test_damaged_result_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / RESULT_FILE).write_text(text)
    with pytest.raises(UserError, match=rf"^{tmp_path}/{RESULT_FILE}: damaged \([^\n]*\); begin a new run with"):
        read_result(str(tmp_path))


def test_folder_of_a_run(tmp_path: Path) -> None:
    config = config_with(run={"storage_path": str(tmp_path), "name": "mine"})
    assert run_folder(config) == str(tmp_path / "mine")
    assert run_folder(config_with(run={"storage_path": "s3://bucket/runs", "name": "mine"})) == "s3://bucket/runs/mine"


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"epochs": 99}},
        {"train": {"max_steps": 7}},
        {"train": {"evaluate_every_epochs": 2, "log_every_steps": 3}},
        {"train": {"batch_size_per_worker": 4}, "scaling": {"num_workers": 1}},  # together 4, as before
        {"train": {"batch_size_per_worker": 1}, "scaling": {"num_workers": 4, "accelerator": "cpu"}},
        {"checkpoints": {"every_minutes": 1, "every_epochs": 2, "keep_last": 5}},
        {"data": {"root": "/elsewhere", "shards": "/shards", "object_store_megabytes": 64}},
        {"run": {"mlflow_uri": "http://127.0.0.1:5000", "max_failures": 0}},
    ],
)
def test_what_may_change(change: dict[str, Any]) -> None:
    assert config_with(**change) != config_with()
    check_unchanged(state_of(config_with()), config_with(**change), "folder")  # raises nothing


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": {"rpn": {"nms_threshold": 0.6}}}, "model.rpn.nms_threshold 0.7 -> 0.6"),
        ({"model": {"backbone": {"depth": 18}}}, "model.backbone.depth 50 -> 18"),
        ({"optim": {"learning_rate": 0.5}}, "optim.learning_rate 0.02 -> 0.5"),
        ({"optim": {"warmup_steps": 1}}, "optim.warmup_steps 1000 -> 1"),
        ({"train": {"seed": 9}}, "train.seed 0 -> 9"),
        ({"train": {"precision": "bf16"}}, "train.precision auto -> bf16"),
        ({"augment": {"vertical_flip": 0.5}}, "augment.vertical_flip 0.0 -> 0.5"),
        ({"data": {"shuffle_window": 2}}, "data.shuffle_window 16 -> 2"),
        ({"data": {"rows_per_shard": 2}}, "data.rows_per_shard 64 -> 2"),
        ({"data": {"canvases": [[64, 64]]}}, "data.canvases [[800, 1344], [1344, 800], [1088, 1088]] -> [[64, 64]]"),
        (
            {"train": {"batch_size_per_worker": 3}},
            "global batch (train.batch_size_per_worker * train.accumulation_steps * scaling.num_workers) 4 -> 6",
        ),
        (
            {"scaling": {"num_workers": 3}},
            "global batch (train.batch_size_per_worker * train.accumulation_steps * scaling.num_workers) 4 -> 6",
        ),
    ],
)
def test_what_may_not_change_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        check_unchanged(state_of(config_with()), config_with(**change), "/runs/mine")
    assert str(caught.value) == (
        f"/runs/mine: was begun with another configuration: {named}. "
        "Take the change back, or begin a new run with --run.name"
    )


def test_all_changes_are_named() -> None:
    changed = config_with(optim={"learning_rate": 0.5, "momentum": 0.5}, scaling={"num_workers": 1})
    with pytest.raises(UserError) as caught:
        check_unchanged(state_of(config_with()), changed, "/runs/mine")
    for part in ("optim.learning_rate 0.02 -> 0.5; ", "optim.momentum 0.9 -> 0.5; ", "4 -> 2"):
        assert part in str(caught.value)


def test_run_of_an_older_version_is_compared() -> None:
    """It may have keys that are no more: a difference, not a crash. What it lacks had what is the default now."""
    state = state_of(config_with())
    del state.config["model"]["detections"]["score"]
    del state.config["data"]["policies"]["duplicate_image"]
    check_unchanged(state, config_with(), "/runs/mine")  # raises nothing
    state.config["optim"]["dampening"] = 0.5
    changed = config_with(model={"detections": {"score": "class_times_mask"}}, data={"synthetic": {}})
    with pytest.raises(UserError) as caught:
        check_unchanged(state, changed, "/runs/mine")
    assert "optim.dampening 0.5 -> None" in str(caught.value)
    assert "model.detections.score class -> class_times_mask" in str(caught.value)
    assert "data.synthetic.seed None -> 0" in str(caught.value), "that a section was null is no default of its keys"


def test_other_data_are_refused() -> None:
    config = config_with()
    state = state_of(config)
    check_same_data(state, config, "training digest", "validation digest", "/runs/mine")
    with pytest.raises(UserError, match=r"^/runs/mine: was begun on other training data; begin a new run with --run"):
        check_same_data(state, config, "other", "validation digest", "/runs/mine")
    with pytest.raises(UserError, match="was begun on other validation data"):
        check_same_data(state, config, "training digest", "other", "/runs/mine")


def test_the_annotation_file_that_has_changed_is_named(tmp_path: Path) -> None:
    sources = {"sources": [{"annotations": "a.json"}, {"annotations": "b.json"}], "validation_fraction": 0.1}
    config = config_with(data={"root": str(tmp_path), **sources})
    assert annotation_digests(config) == {}
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(name)
    begun = dataclasses.replace(state_of(config), annotation_files=annotation_digests(config))
    assert begun.annotation_files is not None
    assert begun.annotation_files == {
        "sources.0": hashlib.sha256(b"a.json").hexdigest(),
        "sources.1": hashlib.sha256(b"b.json").hexdigest(),
    }
    (tmp_path / "b.json").write_text("mended")
    with pytest.raises(UserError, match=rf"other training data \({tmp_path}/b.json is not what it was\); begin"):
        check_same_data(begun, config, "other", "validation digest", "/runs/mine")
    synthetic = config_with(data={"root": str(tmp_path), "synthetic": {}})
    assert annotation_digests(synthetic) == {}, "they are made from the configuration"
