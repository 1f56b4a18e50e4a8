"""Data whose records were checked, and the report of what was found in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline import preflight, storage
from pipeline.anchor_advice import Objects
from pipeline.coco import ClassMap, CocoFile, ImageRecord
from pipeline.config import ExperimentConfig
from pipeline.contact_sheet import make_tiles
from pipeline.preflight import Findings, describe, read_findings, write_report
from pipeline.problems import PolicyError, Problem, Quarantined
from pipeline.shards import Source
from pipeline.stops import explain_stops, find_stops


@dataclass(frozen=True)
class CheckedSplit:
    """Training or validation rows, checked as far as that goes without opening images."""

    name: str
    folder: str
    """Of its shards."""
    key: str
    """Digest of what the shards are made from."""
    files_key: str
    """Digest of names, sizes and times of the image files."""
    is_there: bool
    """Whether the folder holds these shards already; then there are no records."""
    files: list[CocoFile] = field(default_factory=list)
    records: list[ImageRecord] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)

    @property
    def num_read(self) -> tuple[int, int]:
        """Images and annotations that the files list."""
        return sum(len(file.images) for file in self.files), sum(len(file.annotations) for file in self.files)


@dataclass(frozen=True)
class CheckedData:
    """What `write` makes shards of."""

    folder: str
    """Of the report; the shards lie below it."""
    class_map: ClassMap
    training: CheckedSplit
    validation: CheckedSplit


def stop_at_errors(
    config: ExperimentConfig,
    checked: CheckedData,
    say: Callable[[str], None],
    of_images: Mapping[str, Sequence[Problem]] | None = None,
) -> None:
    """Stop where a problem has the policy `error`: to mend data, one wants to be told of everything at once.

    Args:
        config: model.anchors.
        checked: what was found when the records were checked.
        say: takes lines for a person to read.
        of_images: what was found when the images of a split were opened, by its name.

    Raises:
        PolicyError: every kind of problem that stops the job, of both splits; the report says all about them.
    """
    splits = (checked.training, checked.validation)
    told = {split.name: list((of_images or {}).get(split.name, ())) for split in splits}
    found = {split.name: split.problems + told[split.name] for split in splits}
    num_images: Counter[tuple[str, str]] = Counter()
    for split in splits:
        for file in split.files:
            num_images[file.images_folder, file.path] += len(file.images)  # both splits may have a part of one file
    stops = find_stops([(split.files[p.source], p) for split in splits for p in found[split.name]], num_images)
    if not stops:
        return
    message = explain_stops(stops)
    if len(stops) > 1:  # an error is one line, which has room for no more than the first of each kind
        for stop in stops:
            say(f"data: {stop.kind} stops the job: {stop.text}")
    findings = []
    for split in splits:
        if split.is_there:
            findings.append(read_findings(split.folder))
            continue
        problems, quarantined = found[split.name], split.quarantined
        findings.append(
            findings_of(checked, split, split.records, problems, quarantined, message, of_images=told[split.name])
        )
    write_report(checked.folder, findings, config.model.anchors)
    if of_images is None and not any(split.is_there for split in splits):
        say("data: no image was opened yet; what is wrong with them is told once this is settled")
    say(f"data: what was found stands in {storage.join(checked.folder, preflight.PAGE)}")
    raise PolicyError(message, [problem for problems in found.values() for problem in problems])


def findings_of(
    checked: CheckedData,
    split: CheckedSplit,
    records: Sequence[ImageRecord],
    problems: Sequence[Problem],
    quarantined: list[Quarantined],
    stopped: str | None = None,
    objects: Objects | None = None,
    of_images: Sequence[Problem] = (),
) -> Findings:
    """Part of the report that is about one split.

    Args:
        checked: what the split belongs to.
        split: training or validation.
        records: those that are kept; may be none.
        problems: of all records.
        quarantined: records that were left out.
        stopped: why the job was stopped, None where it was not.
        objects: boxes as the network will see them, for the advice on anchors; None where not all images were opened.
        of_images: those of the problems that images told, where the job was stopped by them.
    """
    names = checked.class_map.names
    kept = _without_errors(records, of_images)
    report = describe(
        split.name, split.num_read, kept, problems, quarantined, names, [f.path for f in split.files], stopped
    )
    tiles = make_tiles(records, problems, names, [file.images_folder for file in split.files])
    nothing = Objects(np.zeros((0, 4)), np.zeros((0, 2), dtype=np.int64))
    return Findings(report, tiles, quarantined, nothing if objects is None else objects)


def _without_errors(records: Sequence[ImageRecord], of_images: Sequence[Problem]) -> list[ImageRecord]:
    """Records without what stops the job; their ids are unique, which they are not before the records are checked."""
    errors = [problem for problem in of_images if problem.policy == "error"]
    images = {(problem.source, problem.image_id) for problem in errors if problem.level == "image"}
    annotations = {(problem.source, problem.annotation_id) for problem in errors if problem.level == "annotation"}
    return [
        replace(
            record,
            annotations=tuple(a for a in record.annotations if (record.source, a.annotation_id) not in annotations),
        )
        for record in records
        if (record.source, record.image_id) not in images
    ]
