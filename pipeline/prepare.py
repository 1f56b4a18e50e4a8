"""From the configured COCO files to shards of training and validation rows, once for each content."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from pipeline import storage
from pipeline.coco import (
    ClassMap,
    CocoFile,
    Dropped,
    ImageRecord,
    check_files_exist,
    check_records,
    classes_of_source,
    count_reasons,
    read_coco_file,
    unite_classes,
)
from pipeline.config import ExperimentConfig
from pipeline.progress import duration
from pipeline.shards import FORMAT_VERSION, MANIFEST, Manifest, Source, read_manifest, write_shards
from pipeline.synthetic import write_shapes

Say = Callable[[str], None]
PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class PreparedData:
    """Folders of shards, absolute paths or URLs."""

    training: str
    validation: str


@dataclass(frozen=True)
class CheckedSplit:
    """Training or validation rows, checked as far as that goes without opening images."""

    name: str
    folder: str
    """Of its shards."""
    key: str
    """Digest of what the shards are made from."""
    is_there: bool
    """Whether the folder holds these shards already; then records and sources are empty."""
    records: list[ImageRecord]
    sources: list[Source]
    dropped: list[Dropped]


@dataclass(frozen=True)
class CheckedData:
    """What `write` makes shards of."""

    class_map: ClassMap
    training: CheckedSplit
    validation: CheckedSplit


def prepare(config: ExperimentConfig, say: Say) -> PreparedData:
    """Make the shards where they are not there yet; Ray has to be running.

    Args:
        config: data, run.storage_path.
        say: takes lines for a person to read.

    Raises:
        UserError: data that cannot be trained on; no half-made data set is left behind.
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
    data = config.data
    root = storage.absolute(data.root)
    if data.shards is not None and not _any_annotations(config, root):
        ready = _shards_alone(storage.absolute(data.shards))
        if ready is not None:
            return ready
    if data.synthetic is not None and write_shapes(root, data.synthetic):
        say(f"data: wrote the shapes data set to {root}")
    training_files = [read_coco_file(source, root) for source in data.sources]
    validation_files = [read_coco_file(source, root) for source in data.validation_sources]
    class_map = unite_classes(training_files)
    training_key = _content_key(config, training_files, class_map)
    validation_key = _content_key(config, validation_files, class_map)
    folder = storage.absolute(data.shards) if data.shards else _default_folder(config, training_key, validation_key)
    return CheckedData(
        class_map,
        _check_split("training", storage.join(folder, "training"), training_key, training_files, class_map),
        _check_split("validation", storage.join(folder, "validation"), validation_key, validation_files, class_map),
    )


def _any_annotations(config: ExperimentConfig, root: str) -> bool:
    """Whether one of the annotation files is there, or can be made."""
    sources = [*config.data.sources, *config.data.validation_sources]
    return config.data.synthetic is not None or any(
        storage.exists(storage.absolute(source.annotations, root)) for source in sources
    )


def _shards_alone(folder: str) -> CheckedData | None:
    """Shards that were brought without the files they were made from; None where they are not there either."""
    folders = {name: storage.join(folder, name) for name in ("training", "validation")}
    if not all(storage.exists(storage.join(path, MANIFEST)) for path in folders.values()):
        return None
    splits = {name: CheckedSplit(name, path, "", True, [], [], []) for name, path in folders.items()}
    return CheckedData(ClassMap(read_manifest(folders["training"]).class_names), **splits)


def write(config: ExperimentConfig, checked: CheckedData, say: Say) -> PreparedData:
    """Write the shards that are not there yet; Ray has to be running.

    Raises:
        UserError: images that cannot be used; no half-made data set is left behind.
    """
    for split in (checked.training, checked.validation):
        if split.is_there:
            say(f"data: {split.name} shards are there: {read_manifest(split.folder).num_rows} images in {split.folder}")
        else:
            manifest = _write_split(config, split, checked.class_map, say)
            say(f"data: wrote {split.name} shards: {manifest.num_rows} images to {split.folder}")
    return PreparedData(checked.training.folder, checked.validation.folder)


def _check_split(name: str, folder: str, key: str, files: Sequence[CocoFile], class_map: ClassMap) -> CheckedSplit:
    split = CheckedSplit(name, folder, key, _holds(folder, key), [], [], [])
    for index, file in enumerate(files if not split.is_there else []):
        class_of_category, active_class_ids = classes_of_source(file, class_map)
        category_of_class = {class_id: category for category, class_id in class_of_category.items()}
        records, dropped = check_records(file, index, class_map)
        check_files_exist(file, records)
        split.records.extend(records)
        split.dropped.extend(dropped)
        split.sources.append(
            Source(file.path, tuple(active_class_ids), tuple(category_of_class[c] for c in active_class_ids))
        )
    return split


def _holds(folder: str, key: str) -> bool:
    """Whether a folder has complete shards of this content."""
    return storage.exists(storage.join(folder, MANIFEST)) and read_manifest(folder).content_key == key


def _write_split(config: ExperimentConfig, split: CheckedSplit, class_map: ClassMap, say: Say) -> Manifest:
    existed = storage.exists(split.folder)
    try:
        manifest = write_shards(
            split.folder,
            split.records,
            class_map.names,
            split.sources,
            config.data.canvases,
            config.data.rows_per_shard,
            [asdict(entry) for entry in split.dropped],
            split.key,
            _progress_lines(split, say),
        )
    except BaseException:
        if not existed:
            storage.delete_folder(split.folder)
        raise
    if manifest.dropped:
        say(f"data: left out annotations: {count_reasons([Dropped(**entry) for entry in manifest.dropped])}")
    return manifest


def _progress_lines(split: CheckedSplit, say: Say) -> Callable[[int], None]:
    """Says now and then how far the writing of shards has come."""
    started = said = time.monotonic()

    def show(done: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= PROGRESS_SECONDS:
            said = now
            left = duration((now - started) / max(done, 1) * (len(split.records) - done))
            say(f"data: {split.name} shards: {done} of {len(split.records)} images, {left} left")

    return show


def _content_key(config: ExperimentConfig, files: Sequence[CocoFile], class_map: ClassMap) -> str:
    """Digest of everything that the shards of these files are a function of, image bytes excepted."""
    digest = hashlib.sha256()
    options = {
        "format_version": FORMAT_VERSION,
        "canvases": config.data.canvases,
        "rows_per_shard": config.data.rows_per_shard,
        "class_names": class_map.names,
    }
    digest.update(json.dumps(options, sort_keys=True).encode())
    for file in files:
        content = [file.path, file.images_folder, file.images, file.annotations, file.categories]
        digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()


def _default_folder(config: ExperimentConfig, training_key: str, validation_key: str) -> str:
    """Below storage_path, so that the runs of one storage path share their shards."""
    key = hashlib.sha256(f"{training_key} {validation_key}".encode()).hexdigest()
    return storage.join(storage.absolute(config.run.storage_path), f"shards/{key[:16]}")
