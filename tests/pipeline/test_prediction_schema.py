from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.prediction_schema import SCHEMA, PredictionError, inspect_part, part_name, read_predictions, write_part

KEYS = ["a", "b", "c"]
ERROR = PredictionError("b", "unreadable_image", "cannot be decoded", "/images/b")


def row(key: str, num_objects: int = 2) -> dict[str, Any]:
    return {
        "key": key, "image_id": None, "height": 4, "width": 6, "boxes": [[0.0, 1.0, 2.5, 3.0]] * num_objects,
        "class_ids": [1] * num_objects, "class_names": ["dog"] * num_objects, "scores": [0.5] * num_objects,
        "mask_counts": ["06"] * num_objects, "model_id": "m", "config_digest": "c",
    }  # fmt: skip


def test_a_part_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = write_part(str(tmp_path), 3, "run", KEYS, [row("a"), row("c", 0)], [ERROR])
    assert (written.num_images, written.num_detections, written.errors) == (3, 2, (ERROR,))
    assert written.name == part_name(3) == "parts/part-0000003.parquet"
    assert inspect_part(str(tmp_path), 3, "run", KEYS) == written
    assert list(read_predictions(str(tmp_path), [written.name])) == [row("a"), row("c", 0)]
    # By the names and types of the documented schema, for readers that know nothing of us.
    table = pq.read_table(tmp_path / written.name)
    assert table.schema.remove_metadata().equals(SCHEMA)
    assert table.schema.metadata[b"schema_version"] == b"1"


def test_nothing_but_errors(tmp_path: Path) -> None:
    written = write_part(str(tmp_path), 0, "run", ["b"], [], [ERROR])
    assert inspect_part(str(tmp_path), 0, "run", ["b"]) == written
    assert written.num_detections == 0


@pytest.mark.parametrize(
    ("rows", "errors"),
    [
        (["a", "c"], []),  # one missing
        (["a", "b", "c"], ["b"]),  # one twice
        (["a", "a"], ["b"]),  # one for another
        (["c", "a"], ["b"]),  # not in order
        (["a", "b"], ["d"]),  # a stranger
    ],
)
def test_an_image_that_is_lost_or_doubled_is_a_defect(tmp_path: Path, rows: list[str], errors: list[str]) -> None:
    failed = [PredictionError(key, "timeout", "", "") for key in errors]
    with pytest.raises(RuntimeError, match="this is a defect of the program"):
        write_part(str(tmp_path), 0, "run", KEYS, [row(key) for key in rows], failed)
    assert not (tmp_path / "parts").exists()


def test_only_a_whole_part_of_this_run_counts(tmp_path: Path) -> None:
    output = str(tmp_path)
    assert inspect_part(output, 0, "run", KEYS) is None
    write_part(output, 0, "run", KEYS, [row("a"), row("c")], [ERROR])
    assert inspect_part(output, 0, "other run", KEYS) is None
    assert inspect_part(output, 0, "run", ["a", "b", "x"]) is None
    path = tmp_path / part_name(0)
    whole = path.read_bytes()
    for damaged in (whole[:-10], whole[: len(whole) // 2], b"", whole[:40] + bytes([whole[40] ^ 255]) + whole[41:]):
        path.write_bytes(damaged)
        assert inspect_part(output, 0, "run", KEYS) is None
    path.write_bytes(whole)
    assert inspect_part(output, 0, "run", KEYS) is not None
