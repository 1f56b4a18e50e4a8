"""Columns of files from outside, as plain values: none that would bring code along.

Ray Data and Arrow keep Python objects in columns as pickles under an extension type, and reading such a column as
Python values unpickles them: whoever wrote the file could run code here.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipeline.errors import UserError


def check_plain(schema: pa.Schema, path: str, columns: list[str] | None = None) -> None:
    """Refuse extension types, also within lists and structs.

    Args:
        schema: of the file.
        path: of the file, for the message.
        columns: those that are going to be read, None for all.

    Raises:
        UserError: with the column.
    """
    for field in schema:
        if (columns is None or field.name in columns) and (kind := _extension(field.type)) is not None:
            raise UserError(
                f"{path}: column {field.name} is of the extension type {kind}, which may hold code; "
                "write it with plain values (bytes, strings, numbers, lists, structs)"
            )


def _extension(kind: Any) -> str | None:
    """Name of an extension type in a type; None where there is none."""
    if isinstance(kind, pa.BaseExtensionType):
        return str(kind.extension_name)
    inner = [kind.value_type] if pa.types.is_dictionary(kind) else []
    inner += [kind.field(index).type for index in range(kind.num_fields)]
    return next((found for part in inner if (found := _extension(part)) is not None), None)
