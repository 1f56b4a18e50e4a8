"""README's table of performance, as benchmarks/report.py writes it."""

from typing import Any

import pytest

from benchmarks.report import BEGIN, END, table_of, with_tables

REPORT: dict[str, Any] = {
    "title": "masks to RLE",
    "command": "python benchmarks/masks_to_rle.py",
    "columns": ["variant", "ms"],
    "rows": [["theirs", "1000"], ["ours", "25"]],
    "machine": {
        "processor": "a CPU", "gpu": None, "bf16": ["amx_bf16"], "torch": "2.15", "torchvision": "0.29",
        "python": "3.12", "date": "2026-01-02",
    },
}  # fmt: skip


def test_a_table_says_machine_versions_date_and_command() -> None:
    lines = table_of(REPORT).splitlines()
    for fact in ("a CPU", "amx_bf16", "torch 2.15", "Python 3.12", "2026-01-02", "`python benchmarks/masks_to_rle.py`"):
        assert fact in lines[0]
    assert lines[2:] == ["| variant | ms |", "| --- | --- |", "| theirs | 1000 |", "| ours | 25 |"]


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    readme = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    written = with_tables(readme, ["one", "two"])
    assert written == f"before\n{BEGIN}\n\none\n\ntwo\n\n{END}\nafter\n"
    assert with_tables(written, ["one", "two"]) == written
    with pytest.raises(ValueError, match="lacks the marks"):
        with_tables("no marks", ["one"])
