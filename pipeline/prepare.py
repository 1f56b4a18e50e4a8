"""From the configured COCO files to shards of training and validation rows, once for each content."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from pipeline import preflight, storage
from pipeline.anchor_advice import anchors_in_words
from pipeline.checked_data import CheckedData, CheckedSplit, findings_of, stop_at_errors
from pipeline.coco import ClassMap, CocoFile, classes_of_source, read_coco_file, unite_classes
from pipeline.config import ExperimentConfig
from pipeline.content_keys import content_key, default_folder, digest_of_images, holds, row_settings
from pipeline.holding_out import hold_out
from pipeline.preflight import (
    boxes_on_canvas,
    has_report,
    read_findings,
    write_findings,
    write_report,
)
from pipeline.problems import PolicyError, Problem, quarantine_in_words
from pipeline.progress import duration
from pipeline.record_checks import check_records
from pipeline.shard_writer import Contents, write_shards
from pipeline.shards import MANIFEST, Manifest, Source, read_manifest
from pipeline.synthetic import write_shapes
from pipeline.verification import verify_shards

Say = Callable[[str], None]
PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class PreparedData:
    """Folders of shards, absolute paths or URLs."""

    training: str
    validation: str


def prepare(config: ExperimentConfig, say: Say) -> PreparedData:
    """Make the shards where they are not there yet; Ray has to be running.

    Args:
        config: data, run.storage_path, and model.anchors for the report.
        say: takes lines for a person to read.

    Raises:
        UserError: data that cannot be trained on; the report says all about it, no half-made data set is left behind.
    """
    return write(config, check(config, say), say)


def check(config: ExperimentConfig, say: Say) -> CheckedData:
    """Read and check the annotation files, and look whether the images are there; needs no Ray.

    Args:
        config: data, run.storage_path.
        say: takes lines for a person to read.

    Raises:
        UserError: data that cannot be trained on.
    """
    alone = shards_alone(config)
    if alone is not None:
        return _read_shards_alone(alone)
    data = config.data
    root = storage.absolute(data.root)
    if data.synthetic is not None and write_shapes(root, data.synthetic):
        say(f"data: wrote the shapes data set to {root}")
    training_files = [read_coco_file(source, root) for source in data.sources]
    if data.validation_fraction:
        training_files, validation_files = hold_out(training_files, data.validation_fraction)
        numbers = [sum(len(file.images) for file in files) for files in (training_files, validation_files)]
        say(f"data: keeps {numbers[1]} of {sum(numbers)} images back to validate on (data.validation_fraction)")
    else:
        validation_files = [read_coco_file(source, root) for source in data.validation_sources]
    class_map = unite_classes(training_files)
    validated = _image_paths(validation_files)
    in_both = validated & _image_paths(training_files)
    training_key = content_key(config, "training", training_files, class_map, in_both)
    validation_key = content_key(config, "validation", validation_files, class_map)
    folder = storage.absolute(data.shards) if data.shards else default_folder(config, training_key, validation_key)
    stamps = {path: storage.list_stamps(path) for path in {f.images_folder for f in training_files + validation_files}}
    validation = _check_split(config, "validation", folder, validation_key, validation_files, class_map, stamps)
    # What is trained on is compared with what is validated on, so it is looked at again where that has changed.
    training = _check_split(
        config, "training", folder, training_key, training_files, class_map, stamps, in_both, validation.is_there
    )
    checked = CheckedData(folder, class_map, training, validation)
    stop_at_errors(config, checked, say)
    return checked


def _image_paths(files: Sequence[CocoFile]) -> set[str]:
    """Of all images with a name, wherever they may be."""
    names = [(file.images_folder, image.get("file_name")) for file in files for image in file.images]
    return {storage.join(folder, name) for folder, name in names if isinstance(name, str)}


def _any_annotations(config: ExperimentConfig, root: str) -> bool:
    """Whether one of the annotation files is there, or can be made."""
    return config.data.synthetic is not None or any(
        storage.exists(storage.absolute(source.annotations, root)) for source in config.data.sources_to_read().values()
    )


def shards_alone(config: ExperimentConfig) -> str | None:
    """Folder of shards that were brought without the files they were made from, None where those are there too."""
    if config.data.shards is None or _any_annotations(config, storage.absolute(config.data.root)):
        return None
    folder = storage.absolute(config.data.shards)
    found = all(storage.exists(storage.join(path, MANIFEST)) for path in _split_folders(folder).values())
    return folder if found else None


def _split_folders(folder: str) -> dict[str, str]:
    return {name: storage.join(folder, name) for name in ("training", "validation")}


def _read_shards_alone(folder: str) -> CheckedData:
    folders = _split_folders(folder)
    splits = {name: CheckedSplit(name, path, "", "", True) for name, path in folders.items()}
    return CheckedData(folder, ClassMap(read_manifest(folders["training"]).class_names), **splits)


def write(config: ExperimentConfig, checked: CheckedData, say: Say, on_cluster: bool = True) -> PreparedData:
    """Write the shards that are not there yet, and the report; Ray has to be running, unless all is done here.

    Args:
        config: data, run.storage_path, and model.anchors for the report.
        checked: from `check`.
        say: takes lines for a person to read.
        on_cluster: False does it in this process, and compares no shards that are there already.

    Raises:
        UserError: images that cannot be used, or a shard that is damaged; no half-made data set is left behind.
    """
    findings = {}
    # What is validated on comes first: the same images are looked for in what is trained on.
    splits = checked.validation, checked.training
    new_folders = [split.folder for split in splits if not storage.exists(split.folder)]
    for split in splits:
        if split.is_there:
            say(f"data: {split.name} shards are there: {read_manifest(split.folder).num_rows} images in {split.folder}")
            if config.data.verify_shards and on_cluster:
                verify_shards(split.folder, _progress_lines(f"comparing {split.name} shards", "shards", say))
        else:
            try:
                manifest = _write_split(config, checked, split, say, on_cluster)
            except Exception:  # whatever it is goes on; half a data set is none, what was there before stays
                for folder in new_folders:
                    storage.delete_folder(folder)
                raise
            say(f"data: wrote {split.name} shards: {manifest.num_rows} images to {split.folder}")
        if storage.exists(storage.join(split.folder, preflight.FINDINGS)):  # shards may be brought without them
            findings[split.name] = read_findings(split.folder)
    written = not (checked.training.is_there and checked.validation.is_there)
    if len(findings) == 2 and (written or not has_report(checked.folder, config.model.anchors)):
        both = [findings["training"], findings["validation"]]
        report = write_report(checked.folder, both, config.model.anchors)
        say(f"data: anchors: {anchors_in_words(report['anchors'])}")
        say(f"data: what is in them stands in {storage.join(checked.folder, preflight.PAGE)}")
    return PreparedData(checked.training.folder, checked.validation.folder)


def _check_split(
    config: ExperimentConfig,
    name: str,
    parent: str,
    key: str,
    files: Sequence[CocoFile],
    class_map: ClassMap,
    stamps: dict[str, dict[str, str]],
    validated: Container[str] = (),
    may_be_there: bool = True,
) -> CheckedSplit:
    folder = storage.join(parent, name)
    files_key = digest_of_images(files, stamps)
    split = CheckedSplit(name, folder, key, files_key, may_be_there and holds(folder, key, files_key))
    for index, file in enumerate(files if not split.is_there else []):
        class_of_category, active_class_ids = classes_of_source(file, class_map)
        category_of_class = {class_id: category for category, class_id in reversed(class_of_category.items())}
        found = check_records(file, index, class_map, config.data.policies, stamps[file.images_folder], validated)
        split.files.append(file)
        split.records.extend(found.records)
        split.problems.extend(found.problems)
        split.quarantined.extend(found.quarantined)
        split.sources.append(
            Source(file.path, tuple(active_class_ids), tuple(category_of_class[c] for c in active_class_ids))
        )
    return split


def _write_split(
    config: ExperimentConfig, checked: CheckedData, split: CheckedSplit, say: Say, on_cluster: bool
) -> Manifest:
    contents = Contents(
        checked.class_map.names,
        split.sources,
        row_settings(config, split.name),
        config.data.rows_per_shard,
        split.key,
        split.files_key,
    )
    counts = [sum(entry.level == level for entry in split.quarantined) for level in ("image", "annotation")]
    try:
        show = _progress_lines(f"{split.name} shards", "images", say)
        written = write_shards(
            split.folder,
            split.records,
            contents,
            (counts[0], counts[1]),
            lambda done: show(done, len(split.records)),
            on_cluster,
            frozenset(read_manifest(checked.validation.folder).files) if split is checked.training else (),
        )
    except PolicyError as error:
        stop_at_errors(config, checked, say, {split.name: error.problems})
        raise
    known = {(problem.kind, problem.source, problem.image_id) for problem in split.problems}
    problems = split.problems + [
        problem
        for problem in written.problems
        if problem.kind != "image_in_both_splits" or (problem.kind, problem.source, problem.image_id) not in known
    ]
    quarantined = split.quarantined + written.quarantined
    objects = boxes_on_canvas(written.records, written.objects, config.data.canvases, config.data.short_side)
    found = findings_of(checked, split, written.records, problems, quarantined, None, objects)
    write_findings(split.folder, found)
    if problems:
        say(f"data: {split.name} problems: {_in_words(_count_policies(problems))}")
    if quarantined:
        say(f"data: {split.name} quarantine: {quarantine_in_words(quarantined)}")
    return written.manifest


def _count_policies(problems: Sequence[Problem]) -> dict[str, int]:
    """How many of each kind, with what was done about them."""
    done = {"keep": "kept", "fix": "fixed", "drop": "left out"}  # an error has stopped the job before
    return dict(sorted(Counter(f"{problem.kind} ({done[problem.policy]})" for problem in problems).items()))


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in counts.items())


def _progress_lines(what: str, unit: str, say: Say) -> Callable[[int, int], None]:
    """Says now and then how far it has come."""
    started = said = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= PROGRESS_SECONDS:
            said = now
            left = duration((now - started) / max(done, 1) * (total - done))
            say(f"data: {what}: {done} of {total} {unit}, {left} left")

    return show
