import os
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import UserError


def test_paths_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.absolute("a/b") == str(tmp_path / "a" / "b")
    assert storage.absolute("a/b", "/data/") == "/data/a/b"
    assert storage.absolute("../b", "/data/a") == "/data/b"
    assert storage.absolute("/a/b", "/data") == "/a/b"
    assert storage.absolute("~/a") == "/home/someone/a"
    assert storage.absolute("~/a", "/data") == "/home/someone/a"
    assert storage.absolute("a", "~/data") == "/home/someone/data/a"
    assert storage.absolute(".", "/data/a") == "/data/a"


def test_urls_by_hand() -> None:
    assert storage.absolute("s3://bucket/a") == "s3://bucket/a"
    assert storage.absolute("s3://bucket/a", "/data") == "s3://bucket/a"
    assert storage.absolute("images/a.jpg", "s3://bucket/data/") == "s3://bucket/data/images/a.jpg"
    assert storage.absolute("/local/a.json", "s3://bucket/data") == "/local/a.json"
    assert storage.join("s3://bucket/data/", "a") == "s3://bucket/data/a"
    assert storage.join("/data", "a") == "/data/a"
    assert storage.is_url("s3://bucket")
    assert not storage.is_url("/s3/bucket")


def test_unknown_kind_of_url_is_named() -> None:
    with pytest.raises(UserError, match=r"^nosuch://bucket/a: [^\n]+$"):
        storage.read_bytes("nosuch://bucket/a")


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_what_is_written_is_read(tmp_path: Path, prefix: str) -> None:
    path = f"{prefix}{tmp_path}/file"
    assert not storage.exists(path)
    for content in (b"", b"first", bytes(range(256)) * 1000):
        storage.write_bytes(path, content)
        assert storage.exists(path)
        assert storage.read_bytes(path) == content
        assert (tmp_path / "file").read_bytes() == content
    assert storage.list_files(f"{prefix}{tmp_path}") == {"file"}


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(str(tmp_path / "nowhere"))


def test_folders_are_made(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "a" / "b" / "c"), b"x")
    assert (tmp_path / "a" / "b" / "c").read_bytes() == b"x"


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_interrupted_write_leaves_the_old_content_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str
) -> None:
    path = tmp_path / "file"
    storage.write_bytes(str(path), b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        storage.write_bytes(str(path), b"new content")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_a_reader_never_sees_a_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "file"
    storage.write_bytes(str(path), b"old")
    replace = os.replace
    seen: list[bytes] = []

    def look(source: str, target: str) -> None:
        seen.append(path.read_bytes())  # all is written, but nothing is shown yet
        assert Path(source).read_bytes() == b"new content"
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    storage.write_bytes(str(path), b"new content")
    assert seen == [b"old"]
    assert path.read_bytes() == b"new content"


def test_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.png", "sub/deeper/c.png"):
        storage.write_bytes(str(tmp_path / "images" / name), b"")
    (tmp_path / "images" / "empty").mkdir()
    expected = {"a.png", "sub/b.png", "sub/deeper/c.png"}
    assert storage.list_files(str(tmp_path / "images")) == expected
    assert storage.list_files(f"{tmp_path}/images/") == expected
    assert storage.list_files(f"file://{tmp_path}/images") == expected
    assert storage.list_files(str(tmp_path / "nowhere")) == set()


def test_deleting(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "folder" / "a"), b"")
    storage.delete_file(str(tmp_path / "folder" / "a"))
    assert storage.list_files(str(tmp_path)) == set()
    storage.delete_file(str(tmp_path / "folder" / "a"))  # there is none: nothing happens
    storage.delete_file(str(tmp_path / "nowhere" / "a"))
    storage.write_bytes(str(tmp_path / "folder" / "sub" / "a"), b"")
    storage.delete_folder(str(tmp_path / "folder"))
    assert not (tmp_path / "folder").exists()
    storage.delete_folder(str(tmp_path / "folder"))


@pytest.mark.parametrize("name", ["a b.jpg", "ä.jpg", "x#1.jpg", "q?.jpg", "p%20.jpg"])
def test_a_local_folder_is_one_however_it_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    folder = storage.absolute(tmp_path.as_uri())
    assert folder == str(tmp_path)
    assert storage.absolute((tmp_path / name).as_uri()) == str(tmp_path / name)
    assert storage.absolute(name, tmp_path.as_uri()) == str(tmp_path / name)
    assert [storage.read_bytes(storage.join(folder, found)) for found in storage.list_files(folder)] == [b"x"]


def test_a_stamp_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert storage.stamp(str(path)) is None
    path.write_bytes(b"one")
    before = storage.stamp(str(path))
    assert before == storage.list_stamps(str(tmp_path))["file"]
    path.write_bytes(b"other")
    assert storage.stamp(str(path)) != before
