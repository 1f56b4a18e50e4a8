"""What tells shards from others: digests of everything that they are made from."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterable, Sequence

from pipeline import preflight, storage
from pipeline.coco import ClassMap, CocoFile
from pipeline.config import ExperimentConfig
from pipeline.record_checks import below_a_folder, paths_by_base_name
from pipeline.row_encoding import RowSettings
from pipeline.shards import FORMAT_VERSION, MANIFEST, read_manifest


def row_settings(config: ExperimentConfig, split: str) -> RowSettings:
    """What the rows of a split are made with; only training rows are augmented."""
    return RowSettings.of(config.data, config.augment if split == "training" else None)


def content_key(
    config: ExperimentConfig,
    split: str,
    files: Sequence[CocoFile],
    class_map: ClassMap,
    in_both: Iterable[str] = (),
) -> str:
    """Digest of everything that the shards of these files are a function of, image bytes excepted."""
    digest = hashlib.sha256()
    settings = row_settings(config, split)
    options = {
        **vars(settings),
        "policies": settings.policies.model_dump(),
        "jpeg_quality": settings.jpeg_quality if settings.image_format == "jpeg" else None,
        "format_version": FORMAT_VERSION,
        "rows_per_shard": config.data.rows_per_shard,
        "class_names": class_map.names,
        "in_both": sorted(in_both),
    }
    digest.update(json.dumps(options, sort_keys=True).encode())
    for file in files:
        content = [file.path, file.images_folder, file.images, file.annotations, file.categories]
        digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()


def digest_of_images(files: Sequence[CocoFile], stamps: dict[str, dict[str, str]]) -> str:
    """Digest of names, sizes and times of the image files: another one means that images may have changed."""
    digest = hashlib.sha256()
    for file in files:
        present = stamps[file.images_folder]
        by_base_name = paths_by_base_name(present)
        for image in file.images:
            name = str(image.get("file_name"))
            path = posixpath.normpath(name)
            places = [path] if path in present else below_a_folder(path, by_base_name)
            stamps_of_name = " ".join(present[place] for place in places) or None
            digest.update(f"{name} {stamps_of_name}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


def holds(folder: str, key: str, files_key: str) -> bool:
    """Whether a folder has complete shards of this content, as far as can be told without reading them."""
    if not all(storage.exists(storage.join(folder, name)) for name in (MANIFEST, preflight.FINDINGS)):
        return False
    manifest = read_manifest(folder)
    present = storage.list_files(folder)
    return (
        manifest.content_key == key
        and manifest.files_key == files_key
        and all(shard["name"] in present for shard in manifest.shards)
    )


def default_folder(config: ExperimentConfig, training_key: str, validation_key: str) -> str:
    """Below storage_path, so that the runs of one storage path share their shards."""
    key = hashlib.sha256(f"{training_key} {validation_key}".encode()).hexdigest()
    return storage.join(storage.absolute(config.run.storage_path), f"shards/{key[:16]}")
