"""What a prediction will do, written down before it begins: its images cut into parts, and what it is a function of.

An output folder holds

    plan.parquet     every image with its part; written first, never changed
    run.json         written next: identity of the run, digest of the plan
    parts/           one file a part, see `pipeline.prediction_schema`
    errors.parquet   what could not be predicted, when all parts are there, or the job had to stop
    manifest.json    written last: counts and digests; without one the output is not whole
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import UserError
from pipeline.mlflow_runs import flatten
from pipeline.prediction_inputs import Entry, Inputs, Kind
from pipeline.prediction_schema import SCHEMA_VERSION, read_plain_table

PLAN_FILE, RUN_FILE, ERRORS_FILE, MANIFEST_FILE = "plan.parquet", "run.json", "errors.parquet", "manifest.json"
PARTS_PER_PROCESS = 8
"""At least, where there are images enough: so processes end at about the same time, and progress is told often."""
LEAST_IMAGES_PER_PART = 8
_SCHEMA = pa.schema(
    [
        ("part", pa.int32()), ("key", pa.string()), ("path", pa.string()), ("row", pa.int64()),
        ("image_id", pa.int64()), ("height", pa.int32()), ("width", pa.int32()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The parts of a prediction."""

    output: str
    """Absolute path or URL."""
    kind: Kind
    parts: list[list[Entry]]
    categories: dict[str, int] | None
    """See `Inputs`."""
    model_id: str
    config_digest: str

    @property
    def identity(self) -> str:
        """What every part is a function of, beside its images."""
        return f"{self.model_id} {self.config_digest}"

    @property
    def num_images(self) -> int:
        """Of all parts."""
        return sum(len(part) for part in self.parts)


def images_per_part(num_images: int, num_processes: int, most: int, batch_size: int) -> int:
    """How many images a part of a new prediction gets.

    Args:
        num_images: of the prediction.
        num_processes: that can run at once.
        most: see `PredictSettings.images_per_part`.
        batch_size: of a forward pass, which a part should fill.
    """
    share = math.ceil(num_images / (PARTS_PER_PROCESS * num_processes))
    return min(most, max(share, batch_size, LEAST_IMAGES_PER_PART))


def cut_parts(entries: Sequence[Entry], part_size: int) -> list[list[Entry]]:
    """Consecutive entries; a part never reaches over the end of a table file."""
    parts: list[list[Entry]] = []
    for entry in entries:
        same_file = parts and (entry.row < 0 or parts[-1][-1].path == entry.path)
        if not same_file or len(parts[-1]) == part_size:
            parts.append([])
        parts[-1].append(entry)
    return parts


def digest_of(settings: dict[str, Any]) -> str:
    """SHA-256 of settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def begin(output: str, images: str, inputs: Inputs, part_size: int, run: dict[str, Any]) -> Plan:
    """Write the plan of a new prediction.

    Args:
        output: absolute path or URL.
        images: as the user named them.
        inputs: what is there.
        part_size: images of a part, see `images_per_part`.
        run: model_id, and the settings that the results are a function of.
    """
    parts = cut_parts(inputs.entries, part_size)
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for number, part in enumerate(parts):
        for entry in part:
            columns["part"].append(number)
            for name in _SCHEMA.names[1:]:
                columns[name].append(getattr(entry, name))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=_SCHEMA), sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    storage.write_bytes(storage.join(output, PLAN_FILE), content)
    written = {
        "schema_version": SCHEMA_VERSION,
        "images": images,
        "kind": inputs.kind,
        "categories": inputs.categories,
        "num_images": len(inputs.entries),
        "num_parts": len(parts),
        "plan_sha256": hashlib.sha256(content).hexdigest(),
        "tables": {
            path: storage.stamp(path)
            for path in (sorted({entry.path for entry in inputs.entries}) if inputs.kind == "table" else ())
        },
        **run,
    }
    storage.write_bytes(storage.join(output, RUN_FILE), json.dumps(written, indent=1).encode())
    return Plan(output, inputs.kind, parts, inputs.categories, run["model_id"], digest_of(run["settings"]))


def resume(output: str, images: str, run: dict[str, Any]) -> Plan | None:
    """The plan of a prediction that was begun here; None where none was.

    Raises:
        UserError: begun with another model, other images or settings, or its files are damaged.
    """
    path = storage.join(output, RUN_FILE)
    try:
        before = json.loads(storage.read_bytes(path))
        differences = _differences(before, {"schema_version": SCHEMA_VERSION, "images": images, **run})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); choose another --output") from error
    if differences:
        raise UserError(
            f"{output}: was begun otherwise: {'; '.join(differences)}. Take the change back, or choose another --output"
        )
    for table, stamp in before.get("tables", {}).items():
        if storage.stamp(table) not in (stamp, None):
            raise UserError(
                f"{table}: was written again since {output} was begun, and the plan names its rows by their numbers; "
                "choose another --output"
            )
    plan_path = storage.join(output, PLAN_FILE)
    try:
        content = storage.read_bytes(plan_path)
        if hashlib.sha256(content).hexdigest() != before["plan_sha256"]:
            raise ValueError("its SHA-256 is not that of run.json")
        parts: list[list[Entry]] = [[] for _ in range(before["num_parts"])]
        for values in read_plain_table(content, plan_path).to_pylist():
            parts[values.pop("part")].append(Entry(**values))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{plan_path}: missing or damaged ({error}); choose another --output") from error
    return Plan(output, before["kind"], parts, before["categories"], run["model_id"], digest_of(run["settings"]))


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    old, new = flatten({key: before.get(key) for key in after}), flatten(after)
    return [f"{key} {old.get(key)} -> {new.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key)]
