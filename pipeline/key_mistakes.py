"""What is wrong with a key or its value, in words: what it may be, and which key was most likely meant."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipeline.config import ExperimentConfig

# What others call it, by the last name of a key of ours.
OTHER_NAMES = {
    "batch": "batch_size_per_worker",
    "batch_size": "batch_size_per_worker",
    "gpus": "num_workers",
    "image_size": "canvases",
    "iterations": "max_steps",
    "lr": "learning_rate",
    "max_epochs": "epochs",
    "max_iter": "max_steps",
    "num_epochs": "epochs",
    "num_gpus": "num_workers",
    "output": "storage_path",
    "output_dir": "storage_path",
    "pretrained": "weights",
    "steps": "max_steps",
    "warmup": "warmup_steps",
    "workers": "num_workers",
}
# What is looked for and has no key.
NO_KEY = {
    "annotations": "the annotation files stand in data.sources",
    "images": "the folders of images stand in data.sources",
    "classes": "the classes are those of the annotation files",
    "num_classes": "the classes are those of the annotation files",
    "resume": "the same command goes on by itself",
}
# The parser's names of types in ours.
PLAIN_TYPES = {"a <class 'tuple'>": "a list", "a <class 'bool'>": "true or false", "a <class 'NoneType'>": "null"}


def known_keys(model: type[BaseModel] = ExperimentConfig, prefix: str = "") -> Iterator[str]:
    """Full names of all keys of the configuration."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        for part in (annotation, *getattr(annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel) and "tuple" not in str(annotation):
                yield from known_keys(part, f"{prefix}{name}.")
                break
        else:
            yield f"{prefix}{name}"


def explain(message: str, config_type: type[BaseModel] = ExperimentConfig) -> str:
    """The parser's message as one line that names the key and what is allowed."""
    # An optional group is reported as a key within a key.
    keys = list(dict.fromkeys(re.findall(r"(?:Parser|Problem with given) key \"([\w.]+)\"", message)))
    refused = re.search(r"Option '([\w.]+)' is not accepted", message)
    if refused:
        return unknown_key(".".join([*keys, refused[1]]), config_type)
    unknown = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message) or re.search(
        r"(?:[Uu]nrecognized arguments?: --|Key \"|Key ')()([\w.]+)", message
    )
    if unknown:
        return unknown_key(".".join(filter(None, unknown.groups())), config_type)
    wrong = re.match(r"(?:Parser|Problem with given) key \"[\w.]+\":?\s*(.*)", message, flags=re.DOTALL)
    if wrong:
        key, rest = ".".join(keys), wrong[1]
        findings = re.findall(
            r"(?:\n *(\d+[\w.]*)\n)?\s*((?:Input|Value|Tuple|Field|Extra|String)\b.*?)(?: \[type=| For further|$)", rest
        )
        findings = [(place, _plain_finding(text, _field_of(key, config_type))) for place, text in findings]
        inputs = [f"{place}: {text}" if place else text for place, text in findings]
        if len(inputs) > 1:  # pydantic also finds a list of bad items too short
            inputs = [text for text in inputs if not text.startswith("Tuple should have at least")]
        inputs = inputs[:1] if all("should be a list" in text for text in inputs) else inputs  # each entry says it
        value = re.search(r"G(?:ot|iven) value: (.*?)(?:\n +- |$)", rest, flags=re.DOTALL)
        choices = _choices_of(key, config_type)
        if choices and value:
            return f"{key}: {one_line(value[1])} is none of {', '.join(choices)}"
        steps = {found[1] for text in inputs if (found := re.search(r"should be a multiple of (\d+)$", text))}
        if len(steps) == 1 and value and all("a multiple of" in text for text in inputs):
            return f"{key}: {_nearest_multiples(value[1], int(steps.pop()))}, got {one_line(value[1])}"
        length = re.match(r"Expected a tuple with (\d+) elements", rest)
        default = getattr(_field_of(key, config_type), "default", None)
        if length and isinstance(default, tuple) and value:
            return f"{key}: should be a list of {length[1]}, as in {json.dumps(default)}, got {one_line(value[1])}"
        expected = "; ".join(dict.fromkeys(inputs)) or one_line(re.sub(r"Got value: .*$", "", rest, flags=re.DOTALL))
        if expected.startswith("Does not validate against any of the Union subtypes"):
            expected = "Expected " + " or ".join(re.findall(r"- Expected (.*?)(?= - | Given value|$)", expected))
        for type_name, words in PLAIN_TYPES.items():
            expected = expected.replace(type_name, words)
        return f"{key}: {expected.rstrip('. ')}{range_of(key, config_type)}" + (
            f", got {one_line(value[1])}" if value else ""
        )
    return one_line(message)


def _nearest_multiples(value: str, step: int) -> str:
    """What to take for the numbers of a value that are no multiples of a step."""
    wrong = dict.fromkeys(number for number in map(int, re.findall(r"\d+", value)) if number % step)
    ways = []
    for number in wrong:
        below, above = number // step * step, (number // step + 1) * step
        ways.append(f"{number} by {below} or {above}" if below else f"{number} by {above}")
    return f"should be multiples of {step}: replace {', '.join(ways)}"


def _choices_of(key: str, config_type: type[BaseModel]) -> list[str]:
    """What a key may be set to, where these are a few words or numbers; else empty."""
    annotation = getattr(_field_of(key, config_type), "annotation", None)
    return [str(choice) for choice in get_args(annotation)] if get_origin(annotation) is Literal else []


def _field_of(key: str, config_type: type[BaseModel]) -> Any:
    """Declaration of a key, None where there is no such key."""
    models, field = [config_type], None
    for part in key.split("."):
        if not models or part not in models[0].model_fields:
            return None
        field = models[0].model_fields[part]
        models = _models_within(field.annotation)
    return field


def _models_within(annotation: Any) -> list[type[BaseModel]]:
    """Sections in a type, however deep, such as that of the entries of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_within(part)]


def _plain_finding(text: str, field: Any) -> str:
    """Pydantic's words in ours.

    Args:
        text: a finding.
        field: declaration of the key that it is about, if that is known.
    """
    models = _models_within(field.annotation) if field is not None else []
    if text.startswith("Extra inputs") and models:
        return f"no such key; an entry has {', '.join(models[0].model_fields)}"
    if text.startswith("Input should be a valid tuple"):
        is_given = field is not None and isinstance(field.default, tuple) and field.default
        return f"should be a list, as in {json.dumps(field.default)}" if is_given and not models else "should be a list"
    return text


def names_key(message: str) -> bool:
    """Whether the parser's message is about a key, and not about the syntax of a file."""
    return not message.startswith(("Problems parsing config", "Unexpected config"))


def explain_validation(error: ValidationError, config_type: type[BaseModel] = ExperimentConfig) -> str:
    """Pydantic's findings as one line."""
    findings = []
    for finding in error.errors():
        key = ".".join(str(part) for part in finding["loc"])
        if finding["type"] == "extra_forbidden":
            findings.append(unknown_key(key, config_type))
        else:
            text = f"{finding['msg'].removeprefix('Value error, ')}{range_of(key, config_type)}"
            findings.append(f"{key}: {text}" if key else text)
    return "; ".join(findings)


def unknown_key(key: str, config_type: type[BaseModel] = ExperimentConfig) -> str:
    """That there is no such key, and which one may be meant."""
    keys = list(known_keys(config_type))
    name = key.split(".")[-1]
    inner = [known for known in keys if known.startswith(f"{key}.")]
    if inner:
        return f"{key}: is a section; name one of its keys, such as {inner[0]}"
    if name in NO_KEY:
        return f"{key}: no such key; {NO_KEY[name]}"
    closest = [known for known in keys if known.split(".")[-1] == OTHER_NAMES.get(name, name)][:1]  # perhaps elsewhere
    closest = closest or difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
    hint = f"; did you mean {closest[0]}?" if closest else "; see --help for all keys"
    return f"{key}: no such key{hint}"


def range_of(key: str, config_type: type[BaseModel]) -> str:
    """What the field allows, from its declaration."""
    field = _field_of(key, config_type)
    limits = []
    parts = getattr(getattr(field, "annotation", None), "__args__", ())  # of `Annotated[float, ...] | None`
    declared = [
        *getattr(field, "metadata", ()),
        *(entry for part in parts for entry in getattr(part, "__metadata__", ())),
    ]
    constraints = [inner for entry in declared for inner in (entry, *getattr(entry, "metadata", ()))]
    for constraint in constraints:
        for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"), ("multiple_of", "a multiple of")):
            if getattr(constraint, attribute, None) is not None:
                limits.append(f"{sign} {getattr(constraint, attribute):g}")
    return f" (allowed: {' and '.join(dict.fromkeys(limits))})" if limits else ""


def one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.split())
