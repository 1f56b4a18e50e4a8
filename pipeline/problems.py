"""What can be wrong with an image or an annotation, and what is left out because of it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError

Level = Literal["image", "annotation", "category"]

QUARANTINE_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("source", pa.int32()),  # which of the split's annotation files
        ("level", pa.string()),
        ("image_id", pa.int64()),  # null where the record has none
        ("annotation_id", pa.int64()),
        ("file_name", pa.string()),
        ("kind", pa.string()),
        ("reason", pa.string()),
    ]
)


@dataclass(frozen=True)
class Problem:
    """One finding about one record; `policy` says what was done."""

    kind: str
    """A field of `PolicySettings`."""
    policy: str
    """error, drop, fix or keep."""
    level: Level
    source: int
    """Which of the split's annotation files."""
    reason: str
    image_id: int | None = None
    annotation_id: int | None = None
    file_name: str | None = None


@dataclass(frozen=True)
class Quarantined:
    """An image or annotation that is left out."""

    source: int
    level: Level
    image_id: int | None
    annotation_id: int | None
    file_name: str | None
    kind: str
    reason: str


def quarantined(problems: Iterable[Problem]) -> list[Quarantined]:
    """The records that problems with the policy `drop` leave out; a record has at most one such problem."""
    return [
        Quarantined(p.source, p.level, p.image_id, p.annotation_id, p.file_name, p.kind, p.reason)
        for p in problems
        if p.policy == "drop" and p.level != "category"
    ]


class PolicyError(UserError):
    """Data that the configured policies refuse."""

    def __init__(self, message: str, problems: Sequence[Problem]) -> None:
        super().__init__(message)
        self.problems = list(problems)
        """All that was found, whatever its policy."""


def raise_errors(place: str, problems: Sequence[Problem]) -> None:
    """Stop where a problem has the policy `error`.

    Raises:
        PolicyError: the first one, how many more there are, and what to do.
    """
    errors = [problem for problem in problems if problem.policy == "error"]
    if not errors:
        return
    more = f" (and {len(errors) - 1} more problems)" if len(errors) > 1 else ""
    advice = f"mend it or choose another --data.policies.{errors[0].kind}"
    raise PolicyError(f"{place}{errors[0].reason}{more}; {advice}", problems)


def quarantine_in_words(entries: Sequence[Quarantined]) -> str:
    """How many of each kind are left out; annotations that only go with their image are told as such."""
    images = {(entry.source, entry.image_id, entry.kind) for entry in entries if entry.level == "image"}
    with_image = [e for e in entries if e.level == "annotation" and (e.source, e.image_id, e.kind) in images]
    taken_along = count_kinds(with_image)
    texts = []
    for kind, number in count_kinds(entries).items():
        along = taken_along.get(kind, 0)
        alone = number - along
        whose = "its" if alone == 1 else "their"
        company = {0: "", 1: f" with {whose} annotation"}.get(along, f" with {whose} {along} annotations")
        texts.append(f"{alone} {kind}{company}")
    return ", ".join(texts)


def count_kinds(entries: Iterable[Problem | Quarantined]) -> dict[str, int]:
    """How many of each kind, by name."""
    return dict(sorted(Counter(entry.kind for entry in entries).items()))


def quarantine_file(entries: dict[str, Sequence[Quarantined]]) -> bytes:
    """Parquet file of what is left out, by split; the same entries give the same bytes."""
    rows: list[dict[str, Any]] = [{"split": split, **asdict(entry)} for split in entries for entry in entries[split]]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA), buffer)
    return buffer.getvalue()
