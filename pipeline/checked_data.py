"""Data whose records were checked, and the report of what was found in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline import preflight, storage
from pipeline.anchor_advice import Objects
from pipeline.coco import ClassMap, CocoFile, ImageRecord
from pipeline.config import ExperimentConfig
from pipeline.contact_sheet import make_tiles
from pipeline.preflight import Findings, describe, read_findings, write_report
from pipeline.problems import Problem, Quarantined
from pipeline.shards import Source


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


def report_failure(
    config: ExperimentConfig,
    checked: CheckedData,
    stopped: dict[str, tuple[str, list[Problem]]],
    say: Callable[[str], None],
) -> None:
    """Write the report of data that are refused: to mend them, one wants to see everything at once.

    Args:
        config: model.anchors.
        checked: what was found when the records were checked.
        stopped: of splits that stopped the job: why, and all their problems.
        say: takes lines for a person to read.
    """
    findings = []
    for split in (checked.training, checked.validation):
        if split.is_there:
            findings.append(read_findings(split.folder))
            continue
        why, problems = stopped.get(split.name, ("the other split has problems", split.problems))
        findings.append(findings_of(checked, split, split.records, problems, split.quarantined, why))
    write_report(checked.folder, findings, config.model.anchors)
    say(f"data: what was found stands in {storage.join(checked.folder, preflight.PAGE)}")


def findings_of(
    checked: CheckedData,
    split: CheckedSplit,
    records: Sequence[ImageRecord],
    problems: Sequence[Problem],
    quarantined: list[Quarantined],
    stopped: str | None = None,
    objects: Objects | None = None,
) -> Findings:
    """Part of the report that is about one split.

    Args:
        checked: what the split belongs to.
        split: training or validation.
        records: those that are kept; may be none.
        problems: of all records.
        quarantined: records that were left out.
        stopped: why the job was stopped, None where it was not.
        objects: boxes as the network will see them, for the advice on anchors; None where no image was opened.
    """
    names = checked.class_map.names
    report = describe(
        split.name, split.num_read, records, problems, quarantined, names, [f.path for f in split.files], stopped
    )
    tiles = make_tiles(records, problems, names, [file.images_folder for file in split.files])
    nothing = Objects(np.zeros((0, 4)), np.zeros((0, 2), dtype=np.int64))
    return Findings(report, tiles, quarantined, nothing if objects is None else objects)
