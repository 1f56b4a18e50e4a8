"""Whether a part of a YAML file has the form that a JSON schema describes, in lines that name the key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
YES_OR_NO: Schema = {"type": "boolean"}
WHOLE: Schema = {"type": "integer", "minimum": 0}


def mapping(properties: Schema, required: Iterable[str] = (), is_closed: bool = False) -> Schema:
    """Schema of a mapping: what its keys hold, which have to be there, and whether there are no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        **({"additionalProperties": False} if is_closed else {}),
    }


def list_of(item: Schema, least: int = 0) -> Schema:
    """Schema of a list of at least so many of a kind."""
    return {"type": "array", "items": item, "minItems": least}


def form_problems(where: str, content: Any, schema: Schema) -> Iterator[str]:
    """A line for everything that has another form, in the order of the keys.

    Args:
        where: full name of the key that holds the content; may be empty.
        content: as YAML gives it.
        schema: of JSON Schema 2020-12; a part of it may `say` what its line is to be.
    """
    import jsonschema

    errors = jsonschema.Draft202012Validator(schema).iter_errors(content)
    for error in sorted(errors, key=lambda error: [str(part) for part in error.absolute_path]):
        place = ".".join(filter(None, [where, *map(str, error.absolute_path)]))
        if "say" in error.schema:
            yield f"{place}: {error.schema['say']}"
        elif error.validator == "type" and error.instance is None:
            yield f"{place}: is missing"
        elif error.validator == "enum":
            yield f"{place}: {error.instance} has to be {' or '.join(map(str, error.validator_value))}"
        elif error.validator == "additionalProperties":
            yield from unknown_keys(place, error.instance, tuple(error.schema["properties"]))
        elif error.validator == "required":
            yield f"{place}.{error.message.split(chr(39))[1]}: is missing".removeprefix(".")
        elif error.validator == "type":
            wanted = {"object": "a mapping", "array": "a list", "string": "text"}.get(
                str(error.validator_value), str(error.validator_value)
            )
            yield f"{place}: has to be {wanted}, got {error.instance!r:.60}"
        else:
            yield f"{place}: {error.message.splitlines()[0]:.200}"


def unknown_keys(where: str, given: Iterable[str], known: tuple[str, ...]) -> Iterator[str]:
    """Keys that there are not, with the ones that may be meant."""
    for key in given:
        if key not in known:
            closest = difflib.get_close_matches(str(key), known, n=1)
            yield f"{where}.{key}: no such key" + (f"; did you mean {closest[0]}?" if closest else "")
