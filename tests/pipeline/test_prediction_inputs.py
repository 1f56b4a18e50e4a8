import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.predict_config import PredictSettings
from pipeline.prediction_inputs import Entry, list_inputs, read_column


def settings(**values: Any) -> PredictSettings:
    return PredictSettings.model_validate(values)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def keys(images: Path, **values: Any) -> list[str]:
    return [entry.key for entry in list_inputs(str(images), settings(**values)).entries]


def test_folder_is_listed_with_its_subfolders_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "b.jpg", "a/c.PNG", "a/d.webp", "README.md", "labels.json")
    inputs = list_inputs(str(tmp_path), settings())
    assert inputs.kind == "files"
    assert inputs.entries == [
        Entry("a/c.PNG", str(tmp_path / "a/c.PNG")),
        Entry("a/d.webp", str(tmp_path / "a/d.webp")),
        Entry("b.jpg", str(tmp_path / "b.jpg")),
    ]


def test_pattern_chooses_among_all_files(tmp_path: Path) -> None:
    touch(tmp_path, "b.jpg", "a/c.png", "a/d.raw", "e.raw")
    assert keys(tmp_path, pattern="*.raw") == ["a/d.raw", "e.raw"]
    assert keys(tmp_path, pattern="a/*") == ["a/c.png", "a/d.raw"]


def test_nothing_to_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder, or nothing in it"):
        list_inputs(str(tmp_path / "none"), settings())
    touch(tmp_path, "notes.txt")
    with pytest.raises(UserError, match="none of 1 files has the suffix of an image format"):
        list_inputs(str(tmp_path), settings())
    with pytest.raises(UserError, match=r"none of 1 files matches \*.png"):
        list_inputs(str(tmp_path), settings(pattern="*.png"))


def coco(folder: Path, images: Any, **more: Any) -> Path:
    path = folder / "set.json"
    path.write_text(json.dumps({"images": images, **more}))
    return path


def test_coco_file_brings_ids_sizes_and_categories(tmp_path: Path) -> None:
    images = [{"id": 7, "file_name": "x/b.jpg", "height": 4, "width": 6}, {"id": 3, "file_name": "a.jpg"}]
    path = coco(tmp_path, images, categories=[{"id": 18, "name": "dog"}])
    inputs = list_inputs(str(path), settings(images_folder="../pictures"))
    folder = tmp_path.parent / "pictures"
    assert inputs.entries == [
        Entry("x/b.jpg", str(folder / "x/b.jpg"), -1, 7, 4, 6),
        Entry("a.jpg", str(folder / "a.jpg"), -1, 3),
    ]
    assert inputs.categories == {"dog": 18}
    assert list_inputs(str(path), settings()).entries[1].path == str(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    "images", [[{"id": 1, "file_name": "../a.jpg"}], [{"id": "1", "file_name": "a.jpg"}], [{"id": 1}], [5]]
)
def test_records_that_name_no_image_of_the_folder_are_refused(tmp_path: Path, images: Any) -> None:
    with pytest.raises(UserError, match="needs an integer id and a file_name inside its folder"):
        list_inputs(str(coco(tmp_path, images)), settings())


def test_the_same_key_twice_is_refused(tmp_path: Path) -> None:
    path = coco(tmp_path, [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.jpg"}])
    with pytest.raises(UserError, match=r"two images are called a\.jpg"):
        list_inputs(str(path), settings())


def write_table(path: Path, table: Any) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=3)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_rows_with_bytes(tmp_path: Path, suffix: str) -> None:
    content = [f"file {row}".encode() for row in range(8)]
    for name in ("one", "two"):
        write_table(
            tmp_path / f"{name}{suffix}", pa.table({"bytes": content, "name": [f"{name}{r}" for r in range(8)]})
        )
    inputs = list_inputs(str(tmp_path), settings())
    assert inputs.kind == "table"
    assert [entry.key for entry in inputs.entries] == [f"{n}{suffix}#{r}" for n in ("one", "two") for r in range(8)]
    assert inputs.entries[11] == Entry(f"two{suffix}#3", str(tmp_path / f"two{suffix}"), 3)
    named = list_inputs(str(tmp_path / f"two{suffix}"), settings(key_column="name"))
    assert [entry.key for entry in named.entries] == [f"two{row}" for row in range(8)]
    for first in range(8):
        for last in range(first, 9):
            assert read_column(str(tmp_path / f"one{suffix}"), "bytes", first, last) == content[first:last]
    assert read_column(str(tmp_path / f"one{suffix}"), "bytes") == content


def test_rows_with_paths_are_files(tmp_path: Path) -> None:
    write_table(tmp_path / "list.parquet", pa.table({"path": ["a.jpg", "/data/b.jpg", "s3://bucket/c.jpg"]}))
    inputs = list_inputs(str(tmp_path / "list.parquet"), settings())
    assert inputs.kind == "files"
    assert [(entry.key, entry.path, entry.row) for entry in inputs.entries] == [
        ("a.jpg", str(tmp_path / "a.jpg"), -1),
        ("/data/b.jpg", "/data/b.jpg", -1),
        ("s3://bucket/c.jpg", "s3://bucket/c.jpg", -1),
    ]


def test_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    write_table(tmp_path / "list.parquet", pa.table({"picture": [b"1"]}))
    with pytest.raises(UserError, match=r"neither a column bytes nor a column path \(picture\)"):
        list_inputs(str(tmp_path / "list.parquet"), settings())
    with pytest.raises(UserError, match=r"has no column id \(picture\)"):
        list_inputs(str(tmp_path / "list.parquet"), settings(bytes_column="picture", key_column="id"))
    (tmp_path / "list.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match="not a Parquet or Arrow file"):
        list_inputs(str(tmp_path / "list.parquet"), settings())


def test_stars_before_a_pattern_mean_the_folder_itself_too(tmp_path: Path) -> None:
    touch(tmp_path, "top.jpg", "s/a.jpg", "s/t/b.jpg", "s/c.png")
    assert keys(tmp_path, pattern="**/*.jpg") == ["s/a.jpg", "s/t/b.jpg", "top.jpg"]


def test_tables_and_images_in_one_folder_want_a_pattern(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet", pa.table({"bytes": [b"a", b"b"]}))
    touch(tmp_path, "preview.png")
    with pytest.raises(UserError, match=r"holds tables \(t\.parquet\) and images \(preview\.png\)"):
        list_inputs(str(tmp_path), settings())
    assert keys(tmp_path, pattern="*.png") == ["preview.png"]
    chosen = list_inputs(str(tmp_path), settings(pattern="*.parquet"))
    assert (chosen.kind, [entry.row for entry in chosen.entries]) == ("table", [0, 1])
    with pytest.raises(UserError, match=r"--predict\.pattern \*\.p\* matches tables \(t\.parquet\) and other files"):
        list_inputs(str(tmp_path), settings(pattern="*.p*"))


def test_arrow_streams_are_read_as_well(tmp_path: Path) -> None:
    table = pa.table({"bytes": [f"{row}".encode() for row in range(9)], "name": [f"n{row}" for row in range(9)]})
    path = tmp_path / "data.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    assert keys(path, key_column="name") == [f"n{row}" for row in range(9)]
    assert read_column(str(path), "bytes", 3, 6) == [b"3", b"4", b"5"]
    assert read_column(str(path), "bytes") == [f"{row}".encode() for row in range(9)]


def test_images_of_lvis_are_named_by_their_address(tmp_path: Path) -> None:
    images = [{"id": 5, "coco_url": "http://images.cocodataset.org/val2017/000000000139.jpg", "height": 4, "width": 6}]
    (entry,) = list_inputs(str(coco(tmp_path, images, categories=None)), settings()).entries
    assert (entry.key, entry.path) == (
        "val2017/000000000139.jpg", str(tmp_path / "val2017/000000000139.jpg"),
    )  # fmt: skip


def test_two_images_of_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two images have the id 7"):
        list_inputs(str(coco(tmp_path, [{"id": 7, "file_name": "a.jpg"}, {"id": 7, "file_name": "b.jpg"}])), settings())


def test_a_size_that_no_image_has_is_unknown(tmp_path: Path) -> None:
    (entry,) = list_inputs(
        str(coco(tmp_path, [{"id": 7, "file_name": "a.jpg", "height": 2**31, "width": 9}])), settings()
    ).entries
    assert (entry.height, entry.width) == (None, None)
