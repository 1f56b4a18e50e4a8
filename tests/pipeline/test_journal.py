"""The journal: nothing that was appended is lost, wherever its process dies."""

import threading
from pathlib import Path

import pytest

from pipeline.journal import MARK_FILE, RECORDS_FILE, Journal


def numbers(journal: Journal) -> list[int]:
    return [record["n"] for _, record in journal.records(journal.mark.delivered)]


def test_opening_an_empty_journal_writes_nothing(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "journal"))
    assert list(journal.records()) == []
    assert journal.num_pending_bytes == 0
    assert not (tmp_path / "journal").exists()


def test_records_come_back_in_order_from_the_mark_on(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    for n in range(3):
        journal.append({"n": n, "text": "ä\n"})
    places = [place for place, _ in journal.records()]
    assert numbers(journal) == [0, 1, 2]
    journal.delivered(places[1])
    assert numbers(journal) == [2]
    again = Journal(str(tmp_path))
    assert again.mark == journal.mark
    assert numbers(again) == [2]
    again.append({"n": 3})
    assert numbers(again) == [2, 3]
    again.delivered([place for place, _ in again.records()][-1])
    assert again.num_pending_bytes == 0
    assert numbers(again) == []


@pytest.mark.parametrize("torn", [b"{", b'{"n": 9', b'{"n": 9}'])
def test_a_record_that_was_torn_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    journal = Journal(str(tmp_path))
    journal.append({"n": 0})
    with open(tmp_path / RECORDS_FILE, "ab") as file:
        file.write(torn)
    assert numbers(journal) == [0], "one that is being written is left for later"
    again = Journal(str(tmp_path))
    again.append({"n": 1})
    assert numbers(again) == [0, 1]


def test_a_first_record_that_was_torn_leaves_an_empty_journal(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.append({"n": 0})
    (tmp_path / RECORDS_FILE).write_bytes(b'{"n"')
    assert numbers(Journal(str(tmp_path))) == []


def test_each_journal_has_a_token_of_its_own_and_keeps_it(tmp_path: Path) -> None:
    first, second = Journal(str(tmp_path / "a")), Journal(str(tmp_path / "b"))
    first.append({})
    assert first.mark.token != second.mark.token
    assert Journal(str(tmp_path / "a")).mark.token == first.mark.token


def test_another_run_is_told_everything_from_the_beginning(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.append({"n": 0})
    journal.deliver_to("first")
    journal.delivered(journal.num_pending_bytes)
    journal.deliver_to("first")
    assert numbers(journal) == []
    journal.deliver_to("second")
    assert numbers(journal) == [0]
    assert Journal(str(tmp_path)).mark.run_id == "second"


def test_threads_append_whole_records(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))

    def append_from(start: int) -> None:
        for n in range(start, start + 100):
            journal.append({"n": n})

    threads = [threading.Thread(target=append_from, args=(start,)) for start in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers(journal)) == list(range(300))


def test_large_contents_lie_in_files_of_their_own(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    names = [journal.keep_file(content, "a.png") for content in (b"one", b"two")]
    assert [journal.path(name).read_bytes() for name in names] == [b"one", b"two"]
    assert not (tmp_path / MARK_FILE).exists()
