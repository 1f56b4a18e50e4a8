"""The preflight report: what is in a data set, what is wrong with it, what was done about that.

Of each split `findings.json` (and `objects.parquet`) lie beside its shards; `report.json`, `report.html`,
`quarantine.parquet` and `anchor_search.yaml` bring the splits together.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from model.config import AnchorConfig
from pipeline import storage
from pipeline.anchor_advice import Objects, advise, search_space
from pipeline.coco import ImageRecord
from pipeline.contact_sheet import Tile
from pipeline.preprocess import choose_canvas
from pipeline.problems import Problem, Quarantined, count_kinds, quarantine_file
from pipeline.report_page import render

FINDINGS, OBJECTS = "findings.json", "objects.parquet"
REPORT, PAGE, QUARANTINE, ANCHOR_SEARCH = "report.json", "report.html", "quarantine.parquet", "anchor_search.yaml"
NUM_EXAMPLES = 20
PERCENTILES = (0, 25, 50, 75, 100)

Json = dict[str, Any]


@dataclass(frozen=True)
class Findings:
    """What the checks of a split gave."""

    report: Json
    """See `describe`."""
    tiles: list[Tile]
    """Contact sheet."""
    quarantined: list[Quarantined]
    objects: Objects
    """Boxes for the anchor advice."""


def describe(
    split: str,
    read: tuple[int, int],
    records: Sequence[ImageRecord],
    problems: Sequence[Problem],
    quarantined: Sequence[Quarantined],
    class_names: Sequence[str],
    annotation_files: Sequence[str],
    stopped: str | None = None,
) -> Json:
    """A split's part of the report.

    Args:
        split: training or validation.
        read: images and annotations that the files list.
        records: those that are kept, with what is kept of their annotations.
        problems: all that was found.
        quarantined: what is left out.
        class_names: of classes 1..C-1.
        annotation_files: paths.
        stopped: the error that ended the preparation, if one did; then the counts are those up to there, and what
            stops the job is counted too, with the annotations of images that do.

    Raises:
        RuntimeError: read is not kept and quarantined together.
    """
    kept = len(records), sum(len(record.annotations) for record in records)
    left_out = tuple(sum(entry.level == level for entry in quarantined) for level in ("image", "annotation"))
    if stopped is None and read != (kept[0] + left_out[0], kept[1] + left_out[1]):
        raise RuntimeError(f"{split}: read {read}, kept {kept}, left out {left_out}; this is a defect of the program")
    counts = {
        what: {"read": read[i], "kept": kept[i], "quarantined": left_out[i]}
        | ({"stopping": read[i] - kept[i] - left_out[i]} if stopped is not None else {})
        for i, what in enumerate(("images", "annotations"))
    }
    return {
        "split": split,
        "annotation_files": list(annotation_files),
        "stopped": stopped,
        **counts,
        "quarantined_by_kind": count_kinds(quarantined),
        "problems": _problems(problems),
        "classes": _classes(records, class_names),
        "image_sizes": _image_sizes(records),
        "instances_per_image": _histogram([_num_objects(record) for record in records]),
    }


def _problems(problems: Sequence[Problem]) -> list[Json]:
    """For each kind the number, the policy and the first examples; errors first, then the most frequent."""
    by_kind: dict[str, list[Problem]] = {}
    for problem in problems:
        by_kind.setdefault(problem.kind, []).append(problem)
    rank = {"error": 0, "drop": 1, "fix": 2, "keep": 3}
    order = sorted(by_kind, key=lambda kind: (rank[by_kind[kind][0].policy], -len(by_kind[kind]), kind))
    names = ("file_name", "image_id", "annotation_id", "reason")
    return [
        {
            "kind": kind,
            "policy": by_kind[kind][0].policy,
            "count": len(by_kind[kind]),
            "first": [{name: getattr(problem, name) for name in names} for problem in by_kind[kind][:NUM_EXAMPLES]],
        }
        for kind in order
    ]


def _num_objects(record: ImageRecord) -> int:
    return sum(not annotation.is_crowd for annotation in record.annotations)


def _classes(records: Sequence[ImageRecord], class_names: Sequence[str]) -> list[Json]:
    """Instances, sizes (square root of the box's area, original pixels) and aspect ratios (width / height)."""
    sizes: dict[int, list[float]] = {}
    ratios: dict[int, list[float]] = {}
    crowds: Counter[int] = Counter()
    images: Counter[int] = Counter()
    for record in records:
        images.update({annotation.class_id for annotation in record.annotations})
        for annotation in record.annotations:
            if annotation.is_crowd:
                crowds[annotation.class_id] += 1
                continue
            _, _, width, height = annotation.bbox
            if width > 0 and height > 0:
                sizes.setdefault(annotation.class_id, []).append((width * height) ** 0.5)
                ratios.setdefault(annotation.class_id, []).append(width / height)
    return [
        {
            "name": name,
            "images": images[index],
            "instances": len(sizes.get(index, [])),
            "crowds": crowds[index],
            "size_percentiles": _percentiles(sizes.get(index, []), 1),
            "aspect_ratio_percentiles": _percentiles(ratios.get(index, []), 2),
        }
        for index, name in enumerate(class_names, start=1)
    ]


def _percentiles(values: Sequence[float], digits: int) -> list[float]:
    """At `PERCENTILES`; empty where there are no values."""
    return [round(float(number), digits) for number in np.percentile(values, PERCENTILES)] if values else []


def _image_sizes(records: Sequence[ImageRecord]) -> Json:
    counts = Counter(f"{record.width} x {record.height}" for record in records)
    common = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[:NUM_EXAMPLES]
    return {
        "different": len(counts),
        "most_common": [{"size": size, "images": number} for size, number in common],
        "width_percentiles": _percentiles([record.width for record in records], 0),
        "height_percentiles": _percentiles([record.height for record in records], 0),
    }


def _histogram(numbers: Sequence[int]) -> list[Json]:
    """Images by number of objects, in bins that double: 0, 1, 2, 3-4, 5-8, ..."""
    bins: list[Json] = []
    low, high = 0, 0
    while numbers and low <= max(numbers):
        name = str(low) if low == high else f"{low}-{high}"
        bins.append({"objects": name, "images": sum(low <= number <= high for number in numbers)})
        low, high = high + 1, max(1, 2 * high)
    return bins


def boxes_on_canvas(
    records: Sequence[ImageRecord],
    objects: npt.NDArray[np.float64],
    canvases: Sequence[tuple[int, int]],
    short_side: int | None = None,
) -> Objects:
    """Boxes of `Written.objects` in input pixels, as training sees them; crowds left out."""
    chosen = objects[objects[:, 2] == 0]
    scales, limits, sizes = (np.zeros((len(records), n)) for n in (4, 4, 2))
    for index, record in enumerate(records):
        canvas, height, width = choose_canvas(record.height, record.width, canvases, short_side)
        scales[index] = [width / record.width, height / record.height] * 2
        limits[index] = [width, height] * 2
        sizes[index] = canvases[canvas]
    rows = chosen[:, 0].astype(np.int64)
    boxes = np.concatenate([chosen[:, 3:5], chosen[:, 3:5] + chosen[:, 5:7]], axis=1) * scales[rows]
    return Objects(np.clip(boxes, 0, limits[rows]), sizes[rows].astype(np.int64))


def write_findings(folder: str, findings: Findings) -> None:
    """Keep the findings of a split beside its shards."""
    columns = {
        **{name: findings.objects.boxes[:, i] for i, name in enumerate(("x0", "y0", "x1", "y1"))},
        **{name: findings.objects.canvases[:, i] for i, name in enumerate(("canvas_height", "canvas_width"))},
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    storage.write_bytes(storage.join(folder, OBJECTS), buffer.getvalue())
    content = {
        "report": findings.report,
        "tiles": [asdict(tile) for tile in findings.tiles],
        "quarantined": [asdict(entry) for entry in findings.quarantined],
    }
    storage.write_bytes(storage.join(folder, FINDINGS), json.dumps(content).encode())


def read_findings(folder: str) -> Findings:
    """Inverse of `write_findings`."""
    content = json.loads(storage.read_bytes(storage.join(folder, FINDINGS)))
    table = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(folder, OBJECTS))))
    columns = [table[name].to_numpy() for name in table.column_names]
    return Findings(
        content["report"],
        [Tile(**tile) for tile in content["tiles"]],
        [Quarantined(**entry) for entry in content["quarantined"]],
        Objects(np.stack(columns[:4], axis=1), np.stack(columns[4:], axis=1)),
    )


def has_report(folder: str, anchors: AnchorConfig) -> bool:
    """Whether a folder has the report of finished splits, and its advice is about these anchors."""
    if not all(storage.exists(storage.join(folder, name)) for name in (REPORT, PAGE, QUARANTINE, ANCHOR_SEARCH)):
        return False
    report = json.loads(storage.read_bytes(storage.join(folder, REPORT)))
    judged = report["anchors"]["configured"]
    return (
        (judged["scales"], judged["ratios"]) == (list(anchors.scales), list(anchors.ratios))
        and report["anchors"]["anchor_stride"] == anchors.anchor_stride
        and not any(split["stopped"] for split in report["splits"].values())
    )


def write_report(folder: str, splits: Sequence[Findings], anchors: AnchorConfig) -> Json:
    """Bring the findings of the splits together; files that would not change are left as they are.

    Args:
        folder: absolute path or URL.
        splits: training first, since the anchors are judged by it.
        anchors: as configured.

    Returns:
        What report.json holds.
    """
    report: Json = {
        "splits": {findings.report["split"]: findings.report for findings in splits},
        "anchors": advise(splits[0].objects, anchors),
    }
    tiles = {findings.report["split"]: findings.tiles for findings in splits}
    files = {
        REPORT: json.dumps(report, indent=1).encode(),
        PAGE: render(report, tiles).encode(),
        QUARANTINE: quarantine_file({findings.report["split"]: findings.quarantined for findings in splits}),
        ANCHOR_SEARCH: search_space(report["anchors"]).encode(),
    }
    for name, content in files.items():
        path = storage.join(folder, name)
        if not storage.exists(path) or storage.read_bytes(path) != content:
            storage.write_bytes(path, content)
    return report
