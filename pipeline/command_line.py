"""Command line of the jobs: YAML and overrides to a checked configuration, errors as one line."""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pipeline import cluster
from pipeline.config import SECRET_ADVICE, ExperimentConfig, has_secret
from pipeline.errors import Terminated, UserError

CONFIG_EXIT_CODE = 2
FAILURE_EXIT_CODE = 1
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


class ConfigurationError(UserError):
    """A key or value that the configuration does not have: exit code 2."""


def run_job(main: Callable[[list[str]], None]) -> None:
    """Run a job's main function; whatever goes wrong becomes one line and an exit code; --debug adds the traceback."""
    arguments = sys.argv[1:]
    try:
        main(arguments)
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"error: {_explain_failure(error)}", file=sys.stderr)  # noqa: T201 - what a job says to a person
        sys.exit(CONFIG_EXIT_CODE if isinstance(error, ConfigurationError) else FAILURE_EXIT_CODE)
    except KeyboardInterrupt as interrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)  # noqa: T201
        sys.exit(143 if isinstance(interrupt, Terminated) else 130)


def _explain_failure(error: BaseException) -> str:
    """One line: the user's mistake as it is worded, anything else with its type and how to see more."""
    cause = getattr(error, "cause", None)  # of a Ray task's error, whose own text is a traceback
    if isinstance(cause, BaseException):
        return _explain_failure(cause)
    if isinstance(error, UserError):
        return _one_line(str(error))
    text = _one_line(str(error).strip().splitlines()[-1]) if str(error).strip() else "no message"
    return f"{type(error).__name__}: {text} (--debug shows where)"


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)  # noqa: T201 - what a job says to a person


def say_summary(summary: Mapping[str, Any]) -> None:
    """Print what a program reads, as the last line: Ray, which may still tell of a lost node, is left first."""
    cluster.leave()
    say(json.dumps(summary))


def parse(
    description: str,
    arguments: Sequence[str],
    extra: dict[str, str] | None = None,
    optional: dict[str, str] | None = None,
    flags: dict[str, str] | None = None,
    config_type: type[ExperimentConfig] = ExperimentConfig,
    base: ExperimentConfig | None = None,
) -> SimpleNamespace:
    """Parse a job's command line.

    Args:
        description: of the job, for --help.
        arguments: without the program's name.
        extra: further required options of the job (`--checkpoint`) and their help.
        optional: further options that may be left out, which are None then.
        flags: further options without a value, which are True or False, and their help.
        config_type: of `experiment`, for jobs whose configuration has more sections.
        base: what files and keys change; None for the defaults.

    Returns:
        Namespace with `experiment` (a `config_type`), `debug`, and one entry for each further option.

    Raises:
        ConfigurationError: unknown key, wrong type, value out of range, file that cannot be read.
    """
    from jsonargparse import ArgumentError

    parser = _make_parser(
        description, extra or {}, optional or {}, flags or {}, base or config_type(), asks_for_help(arguments)
    )
    files = [file for _, file in options_given(arguments, "config")]
    for file in files:
        refuse_repeated_keys(file)
    print_config = any(argument.startswith("--print_config") for argument in arguments)
    try:
        namespace = parser.parse_args([a for a in arguments if not a.startswith("--print_config")])
    except ArgumentError as error:
        where = f"{', '.join(files)}: " if files and not _names_key(str(error)) else ""
        raise ConfigurationError(where + _without_secrets(explain(str(error), config_type))) from error
    except ValueError as error:  # of YAML's numbers
        raise ConfigurationError(_one_line(str(error))) from error
    values = namespace.as_dict()
    parts = {name: values[name] for name in config_type.model_fields}
    try:
        experiment = config_type.model_validate(parts)
    except ValidationError as error:
        raise ConfigurationError(explain_validation(error, config_type)) from error
    if print_config:  # not the parser's own, which cannot write lists of sources
        say(yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False).rstrip())
        sys.exit(0)
    further = {name: values[name] for name in (*(extra or {}), *(optional or {}), *(flags or {}))}
    for name, value in further.items():
        if isinstance(value, str) and has_secret(value):
            raise ConfigurationError(f"--{name} has a password or key in its address; {SECRET_ADVICE}")
    return SimpleNamespace(experiment=experiment, debug=values["debug"], **further)


def options_given(arguments: Sequence[str], *names: str) -> list[tuple[str, str]]:
    """What a command line says of some options and of the keys below them.

    Args:
        arguments: without the program's name.
        names: `checkpoint`, `data.root`, or a section: `run`.

    Returns:
        Names and values in order, before any check.
    """
    found = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        option, equals, value = argument.partition("=")
        if any(f"{option}.".startswith(f"--{name}.") for name in names):
            found.append((option.removeprefix("--"), value if equals else following))
    return found


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether a command line wants to be explained and not done."""
    return any(argument in ("-h", "--help") or argument.split("=")[0].endswith(".help") for argument in arguments)


def refuse_repeated_keys(file: str) -> None:
    """YAML's reader would take the last of two, and say nothing."""
    try:
        waiting = [yaml.compose(Path(file).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)]
    except (OSError, ValueError, yaml.YAMLError):
        return  # the parser says it in its own words
    seen: set[int] = set()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:  # an alias may name what it is in
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    line = key.start_mark.line + 1
                    raise ConfigurationError(f"{file}: line {line}: {key.value} stands there twice; leave one")
                if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                    keys.add(key.value)
                waiting.append(value)
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def _make_parser(
    description: str,
    extra: Mapping[str, str],
    optional: Mapping[str, str],
    flags: Mapping[str, str],
    base: ExperimentConfig,
    for_help: bool,
) -> Any:
    """The parser of a job's options and of every key of the configuration."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    # Only help shows them, and reading them from the source is a quarter of a start.
    set_parsing_settings(docstring_parse_attribute_docstrings=for_help)
    parser = ArgumentParser(
        description=description,
        usage="%(prog)s [--config FILE] [--KEY VALUE ...]",
        formatter_class=_help_formatter(type(base)),
        exit_on_error=False,
        allow_abbrev=False,  # a key that is cut off is a mistake
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the keys below; may be given repeatedly"
    )
    parser.add_argument("--debug", action="store_true", help="show Ray's messages, and tracebacks of errors")
    for name, help_text in extra.items():
        parser.add_argument(f"--{name}", type=str, required=True, help=help_text)
    for name, help_text in optional.items():
        parser.add_argument(f"--{name}", type=str | None, default=None, help=help_text)
    for name, help_text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=help_text)
    for name, field in type(base).model_fields.items():
        parser.add_argument(f"--{name}", type=field.annotation, default=getattr(base, name))
    return parser


def _without_secrets(message: str) -> str:
    """A message that may quote what was typed, passwords in addresses left out."""
    return re.sub(r"\S*://\S*", "(an address)", message) if has_secret(message) else message


def _help_formatter(config_type: type[BaseModel]) -> type[argparse.HelpFormatter]:
    """Help that shows types and ranges as a person would write them, and the description as it stands."""
    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _expand_help(self, action: argparse.Action) -> str:
            text = _plain_types(str(super()._expand_help(action)))
            return text.replace(
                ", default:",
                f"{_range_of(action.dest, config_type).replace(' (allowed: ', ', ').rstrip(')')}, default:",
            )

    return Formatter


def _plain_types(text: str) -> str:
    """`Annotated[float, Ge(ge=0.0)]` as `float`, also nested."""
    while (start := text.find("Annotated[")) >= 0:
        depth, first_comma, position = 0, 0, start + len("Annotated[")
        while depth >= 0:
            character = text[position]
            depth += (character in "[(") - (character in "])")
            if character == "," and depth == 0 and not first_comma:
                first_comma = position
            position += 1
        text = text[:start] + text[start + len("Annotated[") : first_comma] + text[position:]
    return text


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
            return f"{key}: {_one_line(value[1])} is none of {', '.join(choices)}"
        expected = "; ".join(dict.fromkeys(inputs)) or _one_line(re.sub(r"Got value: .*$", "", rest, flags=re.DOTALL))
        if expected.startswith("Does not validate against any of the Union subtypes"):
            expected = "Expected " + " or ".join(re.findall(r"- Expected (.*?)(?= - | Given value|$)", expected))
        for type_name, words in PLAIN_TYPES.items():
            expected = expected.replace(type_name, words)
        return f"{key}: {expected.rstrip('. ')}{_range_of(key, config_type)}" + (
            f", got {_one_line(value[1])}" if value else ""
        )
    return _one_line(message)


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


def _names_key(message: str) -> bool:
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
            text = f"{finding['msg'].removeprefix('Value error, ')}{_range_of(key, config_type)}"
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


def _range_of(key: str, config_type: type[BaseModel]) -> str:
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
    return f" (allowed: {' and '.join(limits)})" if limits else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())
