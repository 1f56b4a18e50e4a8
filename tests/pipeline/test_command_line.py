import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from pipeline.command_line import (
    ConfigurationError,
    options_given,
    parse,
    run_job,
)
from pipeline.config import CocoSource, ExperimentConfig, SyntheticSettings
from pipeline.errors import UserError
from pipeline.key_mistakes import OTHER_NAMES, explain_validation, known_keys, unknown_key

ROOT = Path(__file__).resolve().parents[2]


def parsed(*arguments: str) -> ExperimentConfig:
    experiment = parse("A job.", arguments).experiment
    assert isinstance(experiment, ExperimentConfig)
    return experiment


def yaml_file(tmp_path: Path, text: str, name: str = "config.yaml") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def error_of(arguments: Sequence[str]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        parse("A job.", arguments)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def test_without_arguments_the_defaults_hold() -> None:
    options = parse("A job.", [])
    assert options.experiment == ExperimentConfig()
    assert options.debug is False


def test_file_and_overrides(tmp_path: Path) -> None:
    first = yaml_file(tmp_path, "train: {epochs: 3, seed: 5}\nmodel: {rpn: {nms_threshold: 0.6}}", "first.yaml")
    second = yaml_file(tmp_path, "train: {epochs: 4}", "second.yaml")
    config = parsed("--config", first, "--config", second, "--optim.learning_rate", "0.5", "--scaling.num_workers=3")
    assert (config.train.epochs, config.train.seed) == (4, 5)
    assert config.model.rpn.nms_threshold == 0.6
    assert (config.optim.learning_rate, config.scaling.num_workers) == (0.5, 3)
    assert parsed("--config", first, "--train.seed", "7").train.seed == 7
    assert parsed("--config", first).model.rpn.channels == ExperimentConfig().model.rpn.channels


def test_lists_and_optional_groups(tmp_path: Path) -> None:
    text = "data: {sources: [{annotations: a.json}, {annotations: b.json, images: c}], canvases: [[64, 96], [96, 64]]}"
    config = parsed("--config", yaml_file(tmp_path, text), "--data.synthetic.training_images", "7")
    assert config.data.sources == (CocoSource(annotations="a.json"), CocoSource(annotations="b.json", images="c"))
    assert config.data.canvases == ((64, 96), (96, 64))
    assert config.data.synthetic == SyntheticSettings(training_images=7)
    assert parsed("--data.sources", '[{"annotations": "x.json"}]').data.sources == (CocoSource(annotations="x.json"),)
    assert parsed("--data.canvases", "[[64, 64]]").data.canvases == ((64, 64),)


def test_files_and_keys_change_what_is_there_already(tmp_path: Path) -> None:
    there = {"data": {"root": "/there", "synthetic": {"seed": 5}, "sources": [{"annotations": "a.json"}]}}
    base = ExperimentConfig.model_validate({**there, "scaling": {"num_workers": 2, "min_workers": 1}})
    assert parse("A job.", [], base=base).experiment == base
    arguments = ["--config", yaml_file(tmp_path, "train: {seed: 7}"), "--data.synthetic.training_images", "9"]
    changed = parse("A job.", arguments, base=base).experiment
    assert changed.data.synthetic == SyntheticSettings(training_images=9, seed=5)
    assert (changed.train.seed, changed.data.root, changed.data.sources) == (7, "/there", base.data.sources)
    assert parse("A job.", ["--data.synthetic", "null"], base=base).experiment.data.synthetic is None


@pytest.mark.parametrize(
    ("arguments", "names", "expected"),
    [
        (["--checkpoint", "a", "--config=x=y", "--run.name", "b"], ("checkpoint", "config"),
         [("checkpoint", "a"), ("config", "x=y")]),
        (["--run.name", "b", "--running", "c", "--run={}"], ("run",), [("run.name", "b"), ("run", "{}")]),
        (["checkpoint", "--checkpoint"], ("checkpoint",), [("checkpoint", "")]),
        ([], ("run",), []),
    ],
)  # fmt: skip
def test_options_given(arguments: list[str], names: tuple[str, ...], expected: list[tuple[str, str]]) -> None:
    assert options_given(arguments, *names) == expected


def test_names_that_others_rely_on(tmp_path: Path) -> None:
    options = parse(
        "A job.",
        [
            "--data.root", "/data", "--run.name", "mine", "--run.storage_path", "/runs",
            "--run.mlflow_uri", "http://127.0.0.1:5000", "--scaling.num_workers", "4", "--train.max_steps", "9",
            "--checkpoint", "best", "--debug",
        ],
        {"checkpoint": "which one"},
    )  # fmt: skip
    config = options.experiment
    assert (config.data.root, config.run.name, config.run.storage_path) == ("/data", "mine", "/runs")
    assert (config.run.mlflow_uri, config.scaling.num_workers) == ("http://127.0.0.1:5000", 4)
    assert (config.train.max_steps, options.checkpoint, options.debug) == (9, "best", True)


def test_required_option_is_asked_for() -> None:
    with pytest.raises(ConfigurationError, match="checkpoint"):
        parse("A job.", [], {"checkpoint": "which one"})


# YAML, the same on the command line, and what the one line has to say.
UNKNOWN = [
    ("model: {rpn: {nms_treshold: 0.6}}", ["--model.rpn.nms_treshold", "0.6"], "model.rpn.nms_threshold"),
    ("optim: {lerning_rate: 1}", ["--optim.lerning_rate", "1"], "optim.learning_rate"),
    ("train: {num_workers: 2}", ["--train.num_workers", "2"], "scaling.num_workers"),
    ("modle: {fpn: {channels: 3}}", ["--modle.fpn.channels", "3"], "model.fpn.channels"),
    ("data: {synthetic: {trainingimages: 3}}", ["--data.synthetic.trainingimages", "3"],
     "data.synthetic.training_images"),
    ("nms_threshold: 0.6", ["--nms_threshold", "0.6"], "model.rpn.nms_threshold"),
    ("optim: {lr: 0.1}", ["--optim.lr", "0.1"], "optim.learning_rate"),
    ("train: {batch_size: 4}", ["--train.batch_size", "4"], "train.batch_size_per_worker"),
    ("train: {epoch: 4}", ["--train.epoch", "4"], "train.epochs"),  # and not taken for a short form of it
]  # fmt: skip


@pytest.mark.parametrize(("text", "arguments", "nearest"), UNKNOWN)
def test_unknown_key_is_named_with_the_nearest_one(
    tmp_path: Path, text: str, arguments: list[str], nearest: str
) -> None:
    key = arguments[0].removeprefix("--")
    for given in (["--config", yaml_file(tmp_path, text)], arguments):
        assert error_of(given) == f"{key}: no such key; did you mean {nearest}?"


def test_key_that_is_like_no_other() -> None:
    assert error_of(["--xyzzy", "1"]) == "xyzzy: no such key; see --help for all keys"


def test_key_that_nobody_needs() -> None:
    assert error_of(["--model.num_classes", "4"]) == (
        "model.num_classes: no such key; the classes are those of the annotation files"
    )


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("sources", "[{annotations: a.json, image: b}]",
         "data.sources: 0.image: no such key; an entry has annotations, images, "
         "got [{'annotations': 'a.json', 'image': 'b'}]"),
        ("sources", "{annotations: a.json, images: b}", "data.sources: should be a list, got {'annotations': 'a.json', "
         "'images': 'b'}"),
        ("canvases", "[192, 256]",
         "data.canvases: 0: should be a list, as in [[800, 1344], [1344, 800], [1088, 1088]], got [192, 256]"),
        ("canvases", "5", "data.canvases: should be a list, as in [[800, 1344], [1344, 800], [1088, 1088]], got 5"),
    ],
)  # fmt: skip
def test_lists_are_told_in_plain_words(tmp_path: Path, key: str, value: str, expected: str) -> None:
    for given in (["--config", yaml_file(tmp_path, f"data: {{{key}: {value}}}")], [f"--data.{key}", value]):
        assert error_of(given) == expected


def test_other_names_lead_to_keys() -> None:
    assert set(OTHER_NAMES.values()) <= {key.split(".")[-1] for key in known_keys()}


# YAML, the same on the command line, the key, and the range or the kind of value.
WRONG = [
    ("model: {rpn: {nms_threshold: 1.5}}", ["--model.rpn.nms_threshold", "1.5"], ">= 0 and <= 1"),
    ("train: {epochs: -1}", ["--train.epochs", "-1"], "> 0"),
    ("train: {epochs: .inf}", ["--train.epochs", "inf"], "finite"),
    ("train: {epochs: abc}", ["--train.epochs", "abc"], "a valid number"),
    ("train: {max_steps: 0}", ["--train.max_steps", "0"], "greater than or equal to 1"),
    ("train: {batch_size_per_worker: 2.5}", ["--train.batch_size_per_worker", "2.5"], "a valid integer"),
    ("train: {seed: -3}", ["--train.seed", "-3"], ">= 0"),
    ("scaling: {num_workers: 0}", ["--scaling.num_workers", "0"], ">= 1"),
    ("checkpoints: {keep_last: 1}", ["--checkpoints.keep_last", "1"], ">= 2"),
    ("optim: {momentum: 1.0}", ["--optim.momentum", "1.0"], ">= 0 and < 1"),
    ("optim: {name: adam}", ["--optim.name", "adam"], "adam is none of sgd, adamw"),
    ("model: {backbone: {depth: 19}}", ["--model.backbone.depth", "19"], "19 is none of 18, 34, 50, 101"),
    ("data: {policies: {missing_file: skip}}", ["--data.policies.missing_file", "skip"], "skip is none of error, drop"),
    ("data: {verify_shards: maybe}", ["--data.verify_shards", "maybe"], "true or false, got maybe"),
    ("train: {deterministic: maybe}", ["--train.deterministic", "maybe"], "true or false or null, got maybe"),
    ("augment: {short_side: 3}", ["--augment.short_side", "3"], "a list or null, got 3"),
    ("model: {anchors: {scales: [1, 2]}}", ["--model.anchors.scales", "[1, 2]"], "a list of 5, as in [32, 64,"),
    ("data: {canvases: [[128, 100]]}", ["--data.canvases", "[[128, 100]]"], "replace 100 by 96 or 128"),
    ("data: {canvases: []}", ["--data.canvases", "[]"], "at least 1 item"),
    ("data: {sources: []}", ["--data.sources", "[]"], "at least 1 item"),
    ("data: {sources: [{annotations: 3}]}", ["--data.sources", '[{"annotations": 3}]'], "0.annotations"),
    ("data: {sources: [{annotation: a}]}", ["--data.sources", '[{"annotation": "a"}]'], "0.annotation"),
    ("data: {synthetic: {training_images: 0}}", ["--data.synthetic.training_images", "0"], ">= 1"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "arguments", "allowed"), WRONG)
def test_wrong_value_is_named_with_what_is_allowed(
    tmp_path: Path, text: str, arguments: list[str], allowed: str
) -> None:
    key = arguments[0].removeprefix("--")
    for given in (["--config", yaml_file(tmp_path, text)], arguments):
        message = error_of(given)
        assert message.startswith(f"{key}: ")
        assert allowed in message
        for noise in ("pydantic", "input_value", "NoneType", "NestedArg", "Parser key", "<class", "typing."):
            assert noise not in message


def test_checks_between_keys_name_both(tmp_path: Path) -> None:
    for given in (
        ["--config", yaml_file(tmp_path, "model: {rpn: {positive_iou: 0.1}}")],
        ["--model.rpn.positive_iou=0.1"],
    ):
        assert error_of(given) == "model.rpn: negative_iou 0.3 is above positive_iou 0.1"
    for given in (["--config", yaml_file(tmp_path, "run: {name: a/b}")], ["--run.name", "a/b"]):
        assert error_of(given) == "run: name 'a/b' has to be a plain folder name"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("[1, 2", "parsing"), ("- 1", "- 1"), ("train: 5", "train: "), ("train: {epochs: 3\n x", "parsing")],
)
def test_broken_file_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in error_of(["--config", yaml_file(tmp_path, text)])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", "/nowhere/a.yaml"], "/nowhere/a.yaml"),
        (["--data.root"], "--data.root"),
        (["stray"], "stray"),
    ],
)
def test_other_mistakes_are_one_line(arguments: list[str], expected: str) -> None:
    assert expected in error_of(arguments)


def test_all_findings_of_a_stored_configuration_are_one_line() -> None:
    stored = ExperimentConfig().model_dump(mode="json")
    stored["train"]["epochs"] = -1
    stored["optim"]["lerning_rate"] = 1
    with pytest.raises(ValidationError) as caught:
        ExperimentConfig.model_validate(stored)
    assert explain_validation(caught.value) == (
        "optim.lerning_rate: no such key; did you mean optim.learning_rate?; "
        "train.epochs: Input should be greater than 0 (allowed: > 0)"
    )


def test_keys_are_those_of_the_configuration() -> None:
    def leaves(values: dict[str, object], prefix: str = "") -> set[str]:
        found: set[str] = set()
        for name, value in values.items():
            found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}"}
        return found

    config = ExperimentConfig.model_validate({"data": {"synthetic": {}}, "predict": {"tiling": {}}})
    keys = list(known_keys())
    assert set(keys) == leaves(config.model_dump())
    assert len(keys) == len(set(keys)) > 70


SOURCES = '--data.sources=[{"annotations": "a.json"}, {"annotations": "b.json", "images": "c"}]'


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--config", "configs/demo.yaml"],
        ["--config", "configs/nuclei.yaml", "--train.max_steps", "5", "--run.mlflow_uri", "http://127.0.0.1:1"],
        [SOURCES, "--data.canvases", "[[64, 96]]", "--optim.learning_rate", "1e-5"],
    ],
)
def test_printed_configuration_loads_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        parse("A job.", [*arguments, "--print_config"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    expected = parsed(*arguments)
    assert parsed("--config", yaml_file(tmp_path, printed)) == expected
    assert ExperimentConfig.model_validate(yaml.safe_load(printed)) == expected


def exit_code(monkeypatch: pytest.MonkeyPatch, main: Callable[[list[str]], None], *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["job.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_job(main)
    return ended.value.code


def test_mistakes_end_with_a_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(arguments: list[str]) -> None:
        if "--bad" in arguments:
            raise UserError("a.json: no such annotation file")
        if "--stop" in arguments:
            raise KeyboardInterrupt
        parse("A job.", arguments)

    assert exit_code(monkeypatch, main, "--train.epochs", "-1") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ("error: train.epochs: Input should be greater than 0 (allowed: > 0), got -1\n")
    assert exit_code(monkeypatch, main, "--bad") == 1
    assert capsys.readouterr().err == "error: a.json: no such annotation file\n"
    assert exit_code(monkeypatch, main, "--bad", "--debug") == 1
    debugged = capsys.readouterr().err
    assert "Traceback" in debugged
    assert debugged.endswith("error: a.json: no such annotation file\n")
    assert exit_code(monkeypatch, main, "--stop") == 130
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["job.py"])
    run_job(main)  # nothing wrong: no exit
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("first\nours"), "error: RuntimeError: ours (--debug shows where)\n"),
        (OSError("disk full"), "error: OSError: disk full (--debug shows where)\n"),
        (AssertionError(), "error: AssertionError: no message (--debug shows where)\n"),
    ],
)  # fmt: skip
def test_what_is_no_mistake_of_the_user_names_its_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    def main(arguments: list[str]) -> None:
        raise error

    assert exit_code(monkeypatch, main) == 1
    assert capsys.readouterr().err == line
    assert exit_code(monkeypatch, main, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_mistake_found_in_a_task_reads_as_one_found_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class TaskError(Exception):
        cause = UserError("shard.arrow: missing")

    def main(arguments: list[str]) -> None:
        raise TaskError("Traceback\n of the other process")

    assert exit_code(monkeypatch, main) == 1
    assert capsys.readouterr().err == "error: shard.arrow: missing\n"


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("train:\n  epochs: 3\n  seed: 1\n  epochs: 4\n", 4, "epochs"),
        ("train: {epochs: 3}\nmodel: {}\ntrain: {seed: 1}\n", 3, "train"),
        ("data:\n  sources:\n  - {annotations: a.json, images: b, images: c}\n", 3, "images"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, line: int, key: str) -> None:
    file = yaml_file(tmp_path, text)
    for arguments in (["--config", file], [f"--config={file}"]):
        assert error_of(arguments) == f"{file}: line {line}: {key} stands there twice; leave one"


def test_an_optional_number_tells_its_range() -> None:
    assert error_of(["--train.max_steps", "0"]).startswith("train.max_steps: ")
    assert "(allowed: >= 1)" in error_of(["--train.max_steps", "0"])


def test_a_section_in_the_place_of_a_key_is_named_as_such() -> None:
    assert unknown_key("model.rpn") == "model.rpn: is a section; name one of its keys, such as model.rpn.channels"


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("model: [\n")
    with pytest.raises(ConfigurationError, match=re.escape(str(path))) as caught:
        parse("A job.", ["--config", str(path)])
    assert "\n" not in str(caught.value)


def test_a_job_reports_a_mistake_as_its_user_sees_it() -> None:
    result = subprocess.run(
        [sys.executable, "jobs/train.py", "--model.rpn.nms_treshold", "0.6"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == ("error: model.rpn.nms_treshold: no such key; did you mean model.rpn.nms_threshold?\n")
