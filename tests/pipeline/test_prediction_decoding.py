import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline import prediction_decoding, storage
from pipeline.prediction_decoding import DecodedImage, FailedImage, decode_images, read_contents
from pipeline.prediction_inputs import Entry
from pipeline.views import Viewing
from tests.pipeline.factories import noise, png
from tests.pipeline.test_prediction_inputs import write_table

VIEWING = Viewing(((64, 96), (96, 64)))


def decode(entries: list[Entry], contents: list[Any] | None = None, seconds: float = 20.0) -> list[Any]:
    kind: Any = "files" if contents is None else "table"
    return decode_images(list(enumerate(entries, start=4)), contents, kind, VIEWING, seconds)


def error(result: Any) -> tuple[int, str, str, str]:
    assert isinstance(result, FailedImage)
    return result.index, result.error.key, result.error.kind, result.error.reason


def test_one_bad_image_is_its_own_problem(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(noise(20, 30)))
    (tmp_path / "b.png").write_bytes(b"no image")
    (tmp_path / "d.png").write_bytes(png(noise(30, 20)))
    entries = [Entry(f"{name}.png", str(tmp_path / f"{name}.png"), image_id=9) for name in "abcd"]
    first, second, third, fourth = decode(entries)
    assert isinstance(first, DecodedImage)
    assert (first.index, first.height, first.width, first.image_id) == (4, 20, 30, 9)
    assert error(second) == (5, "b.png", "unreadable_image", "cannot be decoded (no image format that Pillow knows)")
    assert error(third)[:3] == (6, "c.png", "missing_file")
    assert fourth.views[0].canvas == (96, 64)


def test_another_size_than_the_record_says(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(noise(20, 30)))
    (result,) = decode([Entry("a", str(tmp_path / "a.png"), height=21, width=30)])
    assert error(result)[2:] == ("size_mismatch", "is 30 x 20 pixels, its annotations say 30 x 21")


def test_cells_of_a_table() -> None:
    cells = [png(noise(20, 30)), None, {"bytes": png(noise(8, 8)), "path": "x"}, "text"]
    results = decode([Entry(str(row), "t.parquet", row) for row in range(4)], cells)
    assert [type(result) for result in results] == [DecodedImage, FailedImage, DecodedImage, FailedImage]
    assert error(results[1])[2:] == ("unreadable_image", "has no bytes in its row")


def test_an_image_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one is read all the same."""
    (tmp_path / "a.png").write_bytes(png(noise(20, 30)))
    released = threading.Event()
    read = storage.read_bytes

    def hang(path: str) -> bytes:
        if path.endswith("stuck"):
            released.wait(60)
        return read(path)

    monkeypatch.setattr(storage, "read_bytes", hang)
    stuck, fine = decode([Entry("s", "/stuck"), Entry("a", str(tmp_path / "a.png"))], seconds=2.0)
    released.set()
    assert error(stuck)[1:] == ("s", "timeout", "not read and decoded within 2 seconds")
    assert isinstance(fine, DecodedImage)


def test_a_bucket_that_stumbles_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = png(noise(20, 30))
    calls: list[str] = []

    def stumble(path: str) -> bytes:
        calls.append(path)
        if path == "once" and len(calls) == 1:
            raise OSError("slow down")
        if path == "always":
            raise OSError("slow down")
        return content

    monkeypatch.setattr(prediction_decoding, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(storage, "read_bytes", stumble)
    (fine,) = decode([Entry("a", "once")])
    assert isinstance(fine, DecodedImage)
    assert calls == ["once"] * 2
    (failed,) = decode([Entry("b", "always")])
    assert error(failed)[2:] == ("missing_file", "cannot be read (slow down)")
    assert calls.count("always") == prediction_decoding.READ_TRIES


def test_cells_are_read_in_chunks(tmp_path: Path) -> None:
    import pyarrow as pa

    path = tmp_path / "t.parquet"
    write_table(path, pa.table({"bytes": [bytes([row]) for row in range(8)]}))
    assert read_contents(str(path), "bytes", 2, 7, 2) == [[b"\x02", b"\x03"], [b"\x04", b"\x05"], [b"\x06"]]
    assert read_contents(str(path), "bytes", 2, 4, 2) == [b"\x02", b"\x03"], "one chunk is no list of chunks"
