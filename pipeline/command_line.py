"""Command line of the jobs: YAML and overrides to a checked configuration, errors as one line."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline import cluster
from pipeline.config import SECRET_ADVICE, ExperimentConfig, has_secret
from pipeline.errors import Terminated, UserError
from pipeline.key_mistakes import explain, explain_validation, names_key, one_line, range_of

CONFIG_EXIT_CODE = 2
FAILURE_EXIT_CODE = 1


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
        return one_line(str(error))
    text = one_line(str(error).strip().splitlines()[-1]) if str(error).strip() else "no message"
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
        where = f"{', '.join(files)}: " if files and not names_key(str(error)) else ""
        raise ConfigurationError(where + _without_secrets(explain(str(error), config_type))) from error
    except ValueError as error:  # of YAML's numbers
        raise ConfigurationError(one_line(str(error))) from error
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
                f"{range_of(action.dest, config_type).replace(' (allowed: ', ', ').rstrip(')')}, default:",
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
