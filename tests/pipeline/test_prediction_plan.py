from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.prediction_inputs import Entry, Inputs
from pipeline.prediction_plan import PLAN_FILE, RUN_FILE, begin, cut_parts, images_per_part, resume

RUN: dict[str, Any] = {"model_id": "m", "settings": {"predict": {"batch_size": 2}, "viewing": {"tiling": None}}}


def entries(number: int) -> list[Entry]:
    return [Entry(f"{index}.jpg", f"/images/{index}.jpg", image_id=index) for index in range(number)]


@pytest.mark.parametrize(("number", "size", "sizes"), [(1, 4, [1]), (4, 4, [4]), (9, 4, [4, 4, 1])])
def test_parts_hold_every_entry_once_in_order(number: int, size: int, sizes: list[int]) -> None:
    parts = cut_parts(entries(number), size)
    assert [len(part) for part in parts] == sizes
    assert [entry for part in parts for entry in part] == entries(number)


@pytest.mark.parametrize(
    ("number", "processes", "most", "batch_size", "size"),
    [
        (239, 2, 256, 8, 15),  # sixteen parts
        (239, 16, 256, 8, 8),
        (239, 16, 256, 32, 32),
        (239, 2, 7, 8, 7),
        (3, 2, 256, 8, 8),
        (10_000, 2, 256, 8, 256),
    ],
)
def test_few_images_are_work_for_all_processes(
    number: int, processes: int, most: int, batch_size: int, size: int
) -> None:
    assert images_per_part(number, processes, most, batch_size) == size


def test_a_part_of_a_table_is_of_one_file() -> None:
    rows = [Entry(f"{name}{row}", name, row) for name in ("x", "y") for row in range(3)]
    assert [[entry.key for entry in part] for part in cut_parts(rows, 2)] == [
        ["x0", "x1"],
        ["x2"],
        ["y0", "y1"],
        ["y2"],
    ]


def test_what_was_begun_is_found_again(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    assert resume(output, "/images", RUN) is None
    begun = begin(output, "/images", Inputs("files", entries(5), {"dog": 18}), 2, RUN)
    assert begun.num_images == 5
    assert resume(output, "/images", RUN) == begun
    # The digest does not depend on the order of keys.
    assert (
        begun.config_digest == begin(str(tmp_path / "b"), "/images", Inputs("files", entries(1)), 2, RUN).config_digest
    )


def test_changes_are_refused_with_their_names(tmp_path: Path) -> None:
    output = str(tmp_path)
    begin(output, "/images", Inputs("files", entries(5)), 2, RUN)
    changed = {"model_id": "n", "settings": {"predict": {"batch_size": 4}, "viewing": {"tiling": {"size": 64}}}}
    with pytest.raises(UserError) as error:
        resume(output, "/other", changed)
    text = str(error.value)
    for difference in (
        "images /images -> /other", "model_id m -> n", "settings.predict.batch_size 2 -> 4",
        "settings.viewing.tiling.size None -> 64",
    ):  # fmt: skip
        assert difference in text
    assert "choose another --output" in text


@pytest.mark.parametrize("name", [PLAN_FILE, RUN_FILE])
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    begin(str(tmp_path), "/images", Inputs("files", entries(5)), 2, RUN)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    with pytest.raises(UserError, match=rf"{name}: .*damaged"):
        resume(str(tmp_path), "/images", RUN)


def test_killed_before_its_second_file_it_begins_anew(tmp_path: Path) -> None:
    begin(str(tmp_path), "/images", Inputs("files", entries(5)), 2, RUN)
    (tmp_path / RUN_FILE).unlink()
    assert resume(str(tmp_path), "/images", RUN) is None


def test_a_table_that_was_written_again_is_refused(tmp_path: Path) -> None:
    table, output = tmp_path / "t.parquet", str(tmp_path / "out")
    table.write_bytes(b"rows")
    begin(output, str(table), Inputs("table", [Entry("a", str(table), 0), Entry("b", str(table), 1)]), 2, RUN)
    assert resume(output, str(table), RUN) is not None
    table.write_bytes(b"other rows")
    with pytest.raises(UserError, match=r"t\.parquet: was written again since .*/out was begun"):
        resume(output, str(table), RUN)
    table.unlink()
    assert resume(output, str(table), RUN) is not None, "what is left to read will say that it is gone"
