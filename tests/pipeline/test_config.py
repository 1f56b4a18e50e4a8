import ast
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

import model.config
import pipeline.config
import pipeline.predict_config
from model.config import Config
from pipeline.command_line import parse
from pipeline.config import CocoSource, DataSettings, ExperimentConfig
from pipeline.key_mistakes import known_keys
from pipeline.space_parsing import check_search, parse_space
from pipeline.sweep_config import SweepConfig, SweepSettings

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


def config_classes() -> list[type[Config]]:
    found = {
        value
        for module in (model.config, pipeline.config, pipeline.predict_config)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Config) and value is not Config
    }
    return sorted(found, key=lambda kind: kind.__name__)


def docstrings(kind: type[Config]) -> dict[str, str]:
    """The line below each field, from the source."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for statement, following in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            has_one = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            text = following.value.value if has_one else ""  # type: ignore[union-attr]
            found[statement.target.id] = str(text)
    return found


def parts_of(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The class and all classes of its fields, wherever they stand in a type."""
    yield kind
    for field in kind.model_fields.values():
        waiting: list[object] = [field.annotation]
        while waiting:
            annotation = waiting.pop()
            waiting += typing.get_args(annotation)
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from parts_of(annotation)


def test_every_class_is_a_part_of_the_experiment() -> None:
    assert {kind.__name__ for kind in parts_of(ExperimentConfig)} == {kind.__name__ for kind in config_classes()}
    assert len(config_classes()) > 15


@pytest.mark.parametrize("kind", [*config_classes(), SweepSettings])
def test_every_field_says_what_it_is(kind: type[Config]) -> None:
    found = docstrings(kind)
    assert set(found) == set(kind.model_fields)
    for name, text in found.items():
        assert len(text) > 4, f"{kind.__name__}.{name} has no docstring"
        assert text.endswith(".")
        assert "\n" not in text


def help_text(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse("A job.", arguments)
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_has_a_line_for_every_knob(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_text(capsys, "--help")
    for key in known_keys():
        if not key.startswith(("data.synthetic.", "predict.tiling.")):  # have a help of their own, see below
            assert f"--{key} " in shown, key
    visited = 0
    for kind in config_classes():
        text = {
            "CocoSource": help_text(capsys, "--data.sources.help"),
            "SyntheticSettings": help_text(capsys, "--data.synthetic.help"),
            "TilingSettings": help_text(capsys, "--predict.tiling.help"),
        }.get(kind.__name__, shown)
        for name, line in docstrings(kind).items():
            if not is_group(kind, name):
                assert line.rstrip(".") in text, f"{kind.__name__}.{name}"
                visited += 1
    assert visited > 80


def is_group(kind: type[Config], name: str) -> bool:
    annotation = kind.model_fields[name].annotation
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def test_defaults_are_a_configuration() -> None:
    config = ExperimentConfig()
    assert config.global_batch_size == 4
    assert ExperimentConfig.model_validate(config.model_dump()) == config
    assert ExperimentConfig.model_validate(config.model_dump(mode="json")) == config
    assert ExperimentConfig.model_validate_json(config.model_dump_json()) == config


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(ExperimentConfig().train, "epochs", 3.0)  # noqa: B010 - to the type checker it is read-only as well


@pytest.mark.parametrize(
    "values",
    [
        {"train": {"epochs": 0}},
        {"train": {"epochs": float("inf")}},
        {"train": {"batch_size_per_worker": 0}},
        {"train": {"seed": -1}},
        {"optim": {"learning_rate": float("nan")}},
        {"optim": {"momentum": 1.0}},
        {"optim": {"name": "adam"}},
        {"augment": {"horizontal_flip": 1.5}},
        {"checkpoints": {"keep_last": 1}},
        {"data": {"canvases": []}},
        {"data": {"canvases": [[100, 128]]}},
        {"data": {"canvases": [[0, 128]]}},
        {"data": {"canvases": [[128]]}},
        {"data": {"sources": []}},
        {"data": {"sources": [{"images": "a"}]}},
        {"data": {"sources": [{"annotations": "a", "image": "b"}]}},
        {"run": {"name": ""}},
        {"run": {"name": ".."}},
        {"run": {"name": "a/b"}},
        {"scaling": {"num_workers": 0}},
        {"unknown": {}},
    ],
)
def test_what_is_no_configuration(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ExperimentConfig.model_validate(values)


def test_sources_are_a_list() -> None:
    settings = DataSettings.model_validate(
        {"sources": [{"annotations": "a.json"}, {"annotations": "b", "images": "c"}]}
    )
    assert settings.sources == (
        CocoSource(annotations="a.json", images="images"),
        CocoSource(annotations="b", images="c"),
    )


def test_there_are_configurations() -> None:
    assert {"demo.yaml", "nuclei.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configuration_in_the_tree_is_valid_and_says_what_it_is(path: Path) -> None:
    parsed = parse("A job.", ["--config", str(path)], config_type=SweepConfig).experiment  # jobs/tune.py takes them all
    if parsed.sweep.space:
        check_search(parse_space(parsed.sweep.space, parsed.base()), parsed.sweep, parsed.base())
    head = path.read_text().splitlines()[:10]
    assert head[0].startswith("# What:")
    assert any(line.startswith("# Command:") for line in head)
