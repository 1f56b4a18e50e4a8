"""Whose configuration and data an evaluation goes by, told before anything is computed."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.checkpoint import DESCRIPTION_FILE
from pipeline.command_line import parse
from pipeline.config import ExperimentConfig
from pipeline.errors import UserError
from pipeline.evaluation_subject import Training, basis, check_data_known, find_training, title_of
from tests.pipeline.small import write_small_checkpoint


def write_run(storage_path: Path, data: dict[str, Any] | None, **sections: Any) -> Path:
    """A run named own_data with one checkpoint, of 972 steps, that was trained on some data."""
    checkpoint = write_small_checkpoint(storage_path / "own_data" / "checkpoint-0000972")
    (storage_path / "own_data" / "run.json").write_text("{}")
    description = json.loads((checkpoint / DESCRIPTION_FILE).read_text())
    config = {**description["config"], "run": {"name": "own_data", "storage_path": "/of/another/machine"}, **sections}
    config = config | {"data": data} if data is not None else {k: v for k, v in config.items() if k != "data"}
    (checkpoint / DESCRIPTION_FILE).write_text(json.dumps({**description, "config": config, "step": 972}))
    return checkpoint


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with annotations, of which only the names are looked at here."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "annotations.json").write_text("{}")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path, data: Path) -> Path:
    stored = {"root": str(data), "sources": [{"annotations": "annotations.json"}], "validation_fraction": 0.1}
    return write_run(tmp_path / "runs", stored, scaling={"num_workers": 2, "min_workers": 1})


def resolved(*arguments: str) -> tuple[ExperimentConfig, Training]:
    """As jobs/evaluate.py reads its command line."""
    training = find_training(arguments)
    assert training is not None
    options = parse("", arguments, optional={"checkpoint": ""}, base=training.base)
    check_data_known(options.experiment, training, training.checkpoint, arguments)
    return options.experiment, training


def yaml_file(folder: Path, settings: dict[str, Any], name: str = "mine.yaml") -> str:
    (folder / name).write_text(yaml.safe_dump(settings))
    return str(folder / name)


@pytest.mark.parametrize("reference", ["own_data", "{runs}/own_data", "{runs}/own_data/checkpoint-0000972"])
def test_a_checkpoint_brings_its_configuration(tmp_path: Path, data: Path, checkpoint: Path, reference: str) -> None:
    runs = tmp_path / "runs"
    where = ("--run.storage_path", str(runs)) if reference == "own_data" else ()
    arguments = ("--checkpoint", reference.format(runs=runs), *where, "--predict.flip=true")
    config, training = resolved(*arguments)
    stored = json.loads((checkpoint / DESCRIPTION_FILE).read_text())["config"]
    expected = ExperimentConfig.model_validate({**stored, "predict": {"flip": True}})
    assert training.checkpoint == str(checkpoint)
    assert config.run.storage_path == str(runs), "where the run is, whatever it was called when it was trained"
    assert config.model_copy(update={"run": expected.run}) == expected
    keys = "--run.storage_path, --predict.flip" if where else "--predict.flip"
    assert basis(config, training, arguments) == f"configuration of its training, {keys}; data in {data}"
    assert title_of(training.checkpoint) == "own_data, checkpoint 972"


def test_keys_make_sense_on_top_of_the_training(checkpoint: Path, tmp_path: Path) -> None:
    """Of the defaults, one worker, they would be refused."""
    arguments = ("--checkpoint", str(checkpoint), "--scaling.min_workers", "2", "--data.root", str(tmp_path))
    config, training = resolved(*arguments)
    assert (config.scaling.min_workers, config.data.root) == (2, str(tmp_path))
    assert config.data.validation_fraction == 0.1
    line = f"configuration of its training, --scaling.min_workers, --data.root; data in {tmp_path}"
    assert basis(config, training, arguments) == line


def test_a_configuration_replaces_that_of_the_training(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    """As without any checkpoint, but for data.root where nothing names it."""
    file = yaml_file(tmp_path, {"data": {"sources": [{"annotations": "annotations.json"}]}, "train": {"seed": 5}})
    arguments = ("--config", file, "--checkpoint", str(checkpoint))
    there = (*arguments, "--data.root", str(tmp_path))
    config, training = resolved(*there)
    assert config == parse("", there, optional={"checkpoint": ""}).experiment
    assert basis(config, training, there) == f"configuration {file}, --data.root; data in {tmp_path}"
    config, training = resolved(*arguments)
    expected = parse("", (*arguments, "--data.root", str(data)), optional={"checkpoint": ""}).experiment
    assert config == expected
    line = f"configuration {file}; data of its training in {data}, as no data.root is given"
    assert basis(config, training, arguments) == line
    rooted = ("--config", yaml_file(tmp_path, {"data": {"root": "there"}}, "rooted.yaml"), *arguments[2:])
    assert resolved(*rooted)[0].data.root == "there"
    shards = (*arguments, "--data.shards", str(tmp_path / "shards"))
    assert resolved(*shards)[0] == parse("", shards, optional={"checkpoint": ""}).experiment


def test_a_configuration_makes_sense_with_its_keys(tmp_path: Path, checkpoint: Path) -> None:
    """Without them it would be refused."""
    file = yaml_file(tmp_path, {"scaling": {"min_workers": 4}})
    arguments = ("--config", file, "--checkpoint", str(checkpoint), "--scaling.num_workers", "4")
    assert resolved(*arguments)[0].scaling.min_workers == 4


def test_nothing_is_written_over_the_data_of_the_training(tmp_path: Path, data: Path) -> None:
    """Not other rows into its shards, and no shapes into folders that were not made for them."""
    shapes = {"training_images": 8, "validation_images": 4}
    stored = {"root": str(data), "shards": str(tmp_path / "shards"), "synthetic": shapes}
    checkpoint = str(write_run(tmp_path / "runs", stored))
    for where in ("--checkpoint", checkpoint), ("--checkpoint", checkpoint, "--predict.flip=true"):
        same = resolved(*where)[0].data
        assert (same.shards, same.synthetic is not None) == (stored["shards"], True)
    for change in ("--data.root", str(tmp_path)), ("--data.canvases", "[[64, 64]]"), ("--augment.hue", "0.1"):
        assert resolved("--checkpoint", checkpoint, *change)[0].data.shards is None
    assert resolved("--checkpoint", checkpoint, "--data.root", str(tmp_path))[0].data.synthetic is None
    file = yaml_file(tmp_path, {"data": {"synthetic": shapes}})
    assert resolved("--checkpoint", checkpoint, "--config", file)[0].data.root == ExperimentConfig().data.root


def test_weights_of_others_bring_nothing(tmp_path: Path) -> None:
    assert find_training(["--checkpoint", "torchvision:nowhere.pth"]) is None
    assert find_training(["--model.weights", "matterport:nowhere.h5"]) is None
    config = ExperimentConfig.model_validate({"data": {"root": str(tmp_path)}})
    source = "torchvision:nowhere.pth"
    arguments = ["--checkpoint", source, "--data.root", str(tmp_path)]
    assert title_of(source) == source
    assert basis(config, None, arguments) == f"default configuration, --data.root; data in {tmp_path}"
    check_data_known(ExperimentConfig(), None, source, ["--checkpoint", source])  # their reader tells what is missing


def test_weights_of_ours_are_a_checkpoint_too(checkpoint: Path) -> None:
    training = find_training(["--model.weights", str(checkpoint)])
    assert training is not None
    assert training.checkpoint == str(checkpoint)


def test_data_that_are_gone_or_were_never_named_are_told(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    (data / "annotations.json").unlink()
    with pytest.raises(UserError) as gone:
        resolved("--checkpoint", str(checkpoint))
    assert str(gone.value) == (
        f"own_data, checkpoint 972: what it was trained on is not there (no {data}/annotations.json); "
        "say with --data.root where it lies, or with --config on what else to evaluate"
    )
    resolved("--checkpoint", str(checkpoint), "--data.root", "elsewhere")  # what is not there is told by its reader
    silent = str(write_run(tmp_path / "silent", None))
    with pytest.raises(UserError) as unknown:
        resolved("--checkpoint", silent)
    assert str(unknown.value) == (
        "own_data, checkpoint 972: does not say what it was trained on; name a configuration of the data with --config"
    )
    resolved("--checkpoint", silent, "--data.root", str(tmp_path))
    with pytest.raises(UserError) as predictions:
        check_data_known(ExperimentConfig(), None, str(tmp_path / "found"), ["--predictions", "found"])
    assert str(predictions.value) == (
        "predictions in found: do not say what they are to be compared with; "
        "name a configuration of the data with --config"
    )
