"""From the configured COCO files to shards of training and validation rows, once for each content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from pipeline import storage
from pipeline.coco import (
    ClassMap,
    CocoFile,
    ImageRecord,
    check_files_exist,
    check_records,
    classes_of_source,
    count_reasons,
    read_coco_file,
    unite_classes,
)
from pipeline.config import ExperimentConfig
from pipeline.shards import FORMAT_VERSION, MANIFEST, Manifest, Source, read_manifest, write_shards
from pipeline.synthetic import write_shapes

Say = Callable[[str], None]


@dataclass(frozen=True)
class PreparedData:
    """Folders of shards, absolute paths or URLs."""

    training: str
    validation: str


def prepare(config: ExperimentConfig, say: Say) -> PreparedData:
    """Make the shards where they are not there yet; Ray has to be running.

    Args:
        config: data, run.storage_path.
        say: takes lines for a person to read.

    Raises:
        UserError: data that cannot be trained on; no half-made data set is left behind.
    """
    data = config.data
    root = storage.absolute(data.root)
    if data.synthetic is not None and write_shapes(root, data.synthetic):
        say(f"data: wrote the shapes data set to {root}")
    training_files = [read_coco_file(source, root) for source in data.sources]
    validation_files = [read_coco_file(source, root) for source in data.validation_sources]
    class_map = unite_classes(training_files)
    training_key = _content_key(config, training_files, class_map)
    validation_key = _content_key(config, validation_files, class_map)
    folder = storage.absolute(data.shards) if data.shards else _default_folder(config, training_key, validation_key)
    prepared = PreparedData(storage.join(folder, "training"), storage.join(folder, "validation"))
    for split, split_folder, files, key in (
        ("training", prepared.training, training_files, training_key),
        ("validation", prepared.validation, validation_files, validation_key),
    ):
        if storage.exists(storage.join(split_folder, MANIFEST)):
            manifest = read_manifest(split_folder)
            if manifest.content_key == key:
                say(f"data: {split} shards are there: {manifest.num_rows} images in {split_folder}")
                continue
        manifest = _prepare_split(config, files, class_map, split_folder, key, say)
        say(f"data: wrote {split} shards: {manifest.num_rows} images to {split_folder}")
    return prepared


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


def _prepare_split(
    config: ExperimentConfig, files: Sequence[CocoFile], class_map: ClassMap, folder: str, key: str, say: Say
) -> Manifest:
    records: list[ImageRecord] = []
    sources: list[Source] = []
    dropped = []
    for index, file in enumerate(files):
        class_of_category, active_class_ids = classes_of_source(file, class_map)
        category_of_class = {class_id: category for category, class_id in class_of_category.items()}
        file_records, file_dropped = check_records(file, index, class_map)
        check_files_exist(file, file_records)
        records += file_records
        dropped += file_dropped
        sources.append(
            Source(file.path, tuple(active_class_ids), tuple(category_of_class[c] for c in active_class_ids))
        )
    if dropped:
        say(f"data: left out annotations: {count_reasons(dropped)}")
    existed = storage.exists(folder)
    try:
        return write_shards(
            folder,
            records,
            class_map.names,
            sources,
            config.data.canvases,
            config.data.rows_per_shard,
            [asdict(entry) for entry in dropped],
            key,
        )
    except BaseException:
        if not existed:
            storage.delete_folder(folder)
        raise
