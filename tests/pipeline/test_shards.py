import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline import storage
from pipeline.coco import ImageRecord
from pipeline.config import PolicySettings
from pipeline.errors import UserError
from pipeline.preprocess import choose_canvas, pack_mask, rasterise, resize_image, unpack_mask
from pipeline.record_checks import check_records
from pipeline.row_encoding import encode_row
from pipeline.sample import mask_offsets
from pipeline.shard_writer import Contents, write_shards
from pipeline.shards import MANIFEST, ShardSet, Source, read_manifest, shard_name
from tests.pipeline.factories import (
    ANIMALS,
    BIRDS,
    CANVASES,
    CLASS_NAMES,
    Prepared,
    class_map,
    coco_content,
    coco_file,
    noise,
    png,
    row_settings,
    tree,
    write_coco,
)

SOURCES = (Source("animals.json", (1, 2), (7, 3)), Source("birds.json", (2, 3), (1, 2)))


def records_of(root: Path, content: dict[str, Any], source: int = 0) -> list[ImageRecord]:
    write_coco(root, "instances.json", content)
    file = coco_file(content, folder=str(root / "images"))
    return check_records(file, source, class_map(), PolicySettings(), None).records


def write(folder: Path, records: list[ImageRecord], on_progress: Any = lambda _: None, **changes: Any) -> Any:
    contents = dataclasses.replace(Contents(CLASS_NAMES, SOURCES, row_settings(), rows_per_shard=3), **changes)
    return write_shards(str(folder), records, contents, on_progress=on_progress).manifest


def test_name_of_a_shard_is_its_row_range() -> None:
    assert shard_name(128, 64) == "rows-000000128-000000192.arrow"


@pytest.mark.cluster
def test_rows_come_back_as_they_were(local_ray: None, tmp_path: Path) -> None:
    """Exact to the bit: pixels, boxes, masks; empty images too."""
    animals = records_of(tmp_path, coco_content("a", [3, 0, 2, 4, 0], ANIMALS, seed=1, first_id=1), source=0)
    birds = records_of(tmp_path, coco_content("b", [0, 1, 5], BIRDS, seed=2, first_id=1), source=1)
    records = animals + birds
    done: list[int] = []
    manifest = write(tmp_path / "shards", records, on_progress=done.append)
    assert (manifest.num_rows, done[-1]) == (8, 8)
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [
        "manifest.json",
        "rows-000000000-000000003.arrow",
        "rows-000000003-000000006.arrow",
        "rows-000000006-000000008.arrow",
    ]
    shards = ShardSet(str(tmp_path / "shards"))
    assert len(shards) == 8
    for row, record in [*enumerate(records), (2, records[2]), (7, records[7])]:  # again, and backwards
        values, expected = shards.read_row(row), encode_row(row, record, row_settings())[0]
        for name, value in expected.items():
            if isinstance(value, bytes) and not isinstance(values[name], bytes):
                assert values[name].tobytes() == value, name
            elif isinstance(value, list):
                np.testing.assert_array_equal(values[name], np.array(value), err_msg=name)
            else:
                assert values[name] == value, name
        with Image.open(record.path) as file:
            pixels = np.asarray(file)
        canvas, height, width = choose_canvas(record.height, record.width, CANVASES)
        assert values["canvas"] == canvas
        np.testing.assert_array_equal(values["image"].reshape(height, width, 3), resize_image(pixels, height, width))
        boxes = values["mask_boxes"].reshape(-1, 4)
        offsets = mask_offsets(np.stack([boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], axis=1))
        for index, annotation in enumerate(record.annotations):
            mask = rasterise(annotation.segmentation, record.height, record.width)
            left, top, right, bottom = boxes[index]
            bits = values["mask_bits"][offsets[index] : offsets[index + 1]]
            np.testing.assert_array_equal(unpack_mask(bits, bottom - top, right - left), mask[top:bottom, left:right])
            assert pack_mask(mask)[0] == tuple(boxes[index])
    assert [values["row"] for values in shards.read_rows([5, 0, 5])] == [5, 0, 5]
    for row in (-1, 8):
        with pytest.raises(IndexError, match=f"row {row} of 8"):
            shards.read_row(row)


@pytest.mark.cluster
def test_manifest_says_what_the_shards_hold(prepared: Prepared) -> None:
    manifest = read_manifest(prepared.data.training)
    assert manifest.class_names == CLASS_NAMES
    assert manifest.num_classes == 4
    assert manifest.canvases == CANVASES
    assert [source.active_class_ids for source in manifest.sources] == [(1, 2), (2, 3)]
    assert [source.category_ids for source in manifest.sources] == [(7, 3), (1, 2)]
    np.testing.assert_array_equal(manifest.active_classes(), [[True, True, True, False], [True, False, True, True]])
    shards = ShardSet(prepared.data.training)
    assert (len(shards), manifest.num_rows) == (21, 21)
    assert [shard["num_rows"] for shard in manifest.shards] == [4, 4, 4, 4, 4, 1]
    rows = list(shards.read_rows(range(21)))
    assert [values["row"] for values in rows] == list(range(21))
    assert [values["source"] for values in rows] == [0] * 12 + [1] * 9
    assert [values["canvas"] for values in rows] == manifest.row_canvases().tolist()
    assert set(manifest.row_canvases().tolist()) == {0, 1}
    for values in rows:  # only classes that the source has labelled
        assert set(values["classes"].tolist()) <= set(manifest.sources[values["source"]].active_class_ids)
    for shard in manifest.shards:
        assert (Path(prepared.data.training) / shard["name"]).stat().st_size == shard["num_bytes"]


@pytest.mark.cluster
def test_digest_is_that_of_the_data_wherever_they_lie(local_ray: None, tmp_path: Path) -> None:
    content = coco_content("a", [2, 1], ANIMALS, seed=1, first_id=1)
    here = write(tmp_path / "here", records_of(tmp_path / "one", content), content_key="here")
    there_source = (Source("/elsewhere/animals.json", (1, 2), (7, 3)), SOURCES[1])
    there = write(tmp_path / "there", records_of(tmp_path / "two", content), sources=there_source, content_key="there")
    assert here.digest == there.digest
    content["annotations"][0]["bbox"][0] += 0.5
    moved = write(tmp_path / "moved", records_of(tmp_path / "one", content))
    renamed = write(tmp_path / "renamed", records_of(tmp_path / "two", content), class_names=("cat", "dog", "owl"))
    assert len({here.digest, moved.digest, renamed.digest}) == 3


@pytest.mark.cluster
def test_shards_written_anew_are_read_anew(local_ray: None, tmp_path: Path) -> None:
    records = records_of(tmp_path, coco_content("a", [2, 1, 3], ANIMALS, seed=1, first_id=1))
    write(tmp_path / "shards", records)
    assert ShardSet(str(tmp_path / "shards")).read_row(0)["image_id"] == records[0].image_id
    write(tmp_path / "shards", records[::-1])
    assert ShardSet(str(tmp_path / "shards")).read_row(0)["image_id"] == records[2].image_id


@pytest.mark.cluster
def test_unusable_images_stop_the_writing_and_leave_no_data_set(local_ray: None, tmp_path: Path) -> None:
    content = coco_content("a", [2, 1, 0, 3, 1, 1, 2], ANIMALS, seed=1, first_id=1)
    records = records_of(tmp_path, content)
    write(tmp_path / "shards", records)
    (tmp_path / "images" / "a_004.png").write_bytes(b"no image")
    (tmp_path / "images" / "a_005.png").write_bytes(png(noise(64, 64)))
    (tmp_path / "images" / "a_006.png").unlink()
    with pytest.raises(UserError) as caught:
        write(tmp_path / "shards", records)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/images/a_004.png: cannot be decoded (")
    assert message.endswith(" (and 2 more problems); mend it or choose another --data.policies.unreadable_image")
    assert "\n" not in message
    # Neither a manifest of before, whose shards are gone, nor a part of a shard.
    left = tree(tmp_path / "shards")
    assert MANIFEST not in left
    for name, content_of_file in left.items():
        assert pa.ipc.open_file(io.BytesIO(content_of_file)).num_record_batches == (1 if "000007" in name else 3)


def damaged(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "no such manifest; run jobs/prepare.py first"),
        (lambda folder: (folder / MANIFEST).write_text('{"format_'), "damaged ("),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\x00"), "damaged ("),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "format version None, expected 3"),
        (lambda folder: damaged(folder, lambda c: c.update(format_version=1)), "format version 1, expected 3"),
        (lambda folder: damaged(folder, lambda c: c.pop("shards")), "damaged (KeyError 'shards')"),
        (lambda folder: damaged(folder, lambda c: c.update(canvases=[3])), "damaged (TypeError"),
        (lambda folder: damaged(folder, lambda c: c["sources"][0].pop("annotations")), "damaged (KeyError"),
    ],
)
def test_missing_or_damaged_manifest_is_named(
    prepared: Prepared, tmp_path: Path, change: Callable[[Path], object], expected: str
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(prepared.data.validation, folder)
    change(folder)
    with pytest.raises(UserError) as caught:
        ShardSet(str(folder))
    assert str(caught.value).startswith(f"{folder}/{MANIFEST}: {expected}")
    assert "run jobs/prepare.py" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.cluster
@pytest.mark.parametrize("share", [None, 0.0, 0.5, 0.99])
def test_missing_or_truncated_shard_is_named(prepared: Prepared, tmp_path: Path, share: float | None) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(prepared.data.validation, folder)
    path = folder / "rows-000000000-000000004.arrow"
    content = path.read_bytes()
    path.unlink()
    if share is not None:
        path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError) as caught:
        ShardSet(str(folder)).read_row(1)
    assert str(caught.value).startswith(f"{path}: missing or damaged (")
    assert "\n" not in str(caught.value)
    assert ShardSet(str(folder)).read_row(5)["row"] == 5  # the others can be read


@pytest.mark.cluster
def test_shards_are_read_from_a_url(prepared: Prepared) -> None:
    here, there = ShardSet(prepared.data.validation), ShardSet(f"file://{prepared.data.validation}")
    assert storage.is_url(there.folder)
    assert there.manifest == here.manifest
    for row in range(len(here)):
        ours, theirs = here.read_row(row), there.read_row(row)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            np.testing.assert_array_equal(theirs[name], value)


@pytest.mark.cluster
@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_flipped_bit_in_a_row_is_named_and_the_other_rows_are_read(
    prepared: Prepared, tmp_path: Path, place: float
) -> None:
    """Wherever in the values of the row it is, at the first reading."""
    folder = tmp_path / "shards"
    shutil.copytree(prepared.data.validation, folder)
    shard = read_manifest(str(folder)).shards[0]
    path = folder / shard["name"]
    content = bytearray(path.read_bytes())
    first, end = shard["offsets"][1:3]
    content[first + int(place * (end - first))] ^= 16
    path.write_bytes(content)
    shards = ShardSet(str(folder))
    with pytest.raises(UserError) as caught:
        shards.read_row(1)
    assert str(caught.value).startswith(f"{path}: row 1 is damaged (")
    assert [shards.read_row(row)["row"] for row in (0, 2, 3, 6)] == [0, 2, 3, 6]


@pytest.mark.cluster
def test_jpeg_shards_read_as_pixels(local_ray: None, tmp_path: Path) -> None:
    records = records_of(tmp_path, coco_content("a", [2, 1], ANIMALS, seed=1, first_id=1))
    settings = dataclasses.replace(row_settings(), image_format="jpeg")
    raw, jpeg = write(tmp_path / "raw", records), write(tmp_path / "jpeg", records, settings=settings)
    assert (raw.image_format, jpeg.image_format) == ("raw", "jpeg")
    assert raw.digest != jpeg.digest
    for row, record in enumerate(records):
        ours, theirs = (ShardSet(str(tmp_path / name)).read_row(row) for name in ("jpeg", "raw"))
        with Image.open(io.BytesIO(encode_row(row, record, settings)[0]["image"])) as file:
            np.testing.assert_array_equal(ours["image"].reshape(*file.size[::-1], 3), np.asarray(file))
        assert (ours["image"].shape, ours["image"].dtype) == (theirs["image"].shape, np.uint8)
        np.testing.assert_array_equal(ours["mask_bits"], theirs["mask_bits"])


@pytest.mark.cluster
def test_written_again_are_the_same_bytes(local_ray: None, tmp_path: Path) -> None:
    records = records_of(tmp_path, coco_content("a", [2, 1, 0, 3], ANIMALS, seed=1, first_id=1))
    write(tmp_path / "one", records)
    write(tmp_path / "two", records)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    contents = Contents(CLASS_NAMES, SOURCES, row_settings(), rows_per_shard=3)
    write_shards(str(tmp_path / "here"), records, contents, on_cluster=False)
    assert tree(tmp_path / "one") == tree(tmp_path / "here")


@pytest.mark.cluster
def test_manifest_names_the_bytes_of_every_row_and_its_classes(prepared: Prepared) -> None:
    shards = ShardSet(prepared.data.training)
    for shard in shards.manifest.shards:
        assert len(shard["offsets"]) == shard["num_rows"] + 1
        assert shard["offsets"] == sorted(shard["offsets"])
        content = (Path(prepared.data.training) / shard["name"]).read_bytes()
        reader = pa.ipc.open_file(pa.BufferReader(content))
        metadata = reader.schema.metadata
        assert json.loads(metadata[b"class_names"]) == list(CLASS_NAMES)
        assert metadata[b"format_version"] == b"3"
        for number, classes in enumerate(shard["classes"]):
            values = shards.read_row(shard["first_row"] + number)
            assert reader.get_batch(number)["image_id"].to_pylist() == [values["image_id"]]
            assert classes == sorted(set(values["classes"][~values["is_crowd"]].tolist()))
