"""Write README's table of performance from the JSON that the benchmarks left.

    python benchmarks/report.py            # or: make bench-report

Reads benchmarks/results/*.json, one report or a list of them each, and replaces what stands between the two marks in
README.md. Figures of different machines stay apart: each table says its machine, versions, date and command.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- performance: written by make bench-report -->", "<!-- performance: end -->"


def table_of(report: dict[str, Any]) -> str:
    """One benchmark as Markdown."""
    machine = report["machine"]
    bf16 = ", ".join(machine["bf16"]) or "no bf16 instructions"
    where = f"{machine['gpu']}, " if machine["gpu"] else ""
    lines = [
        f"{report['title'][:1].upper()}{report['title'][1:]} (`{report['command']}`; {where}{machine['processor']}, "
        f"{bf16}; torch {machine['torch']}, torchvision {machine['torchvision']}, Python {machine['python']}; "
        f"{machine['date']}):",
        "",
        f"| {' | '.join(report['columns'])} |",
        f"| {' | '.join('---' for _ in report['columns'])} |",
        *[f"| {' | '.join(row)} |" for row in report["rows"]],
    ]
    return "\n".join(lines)


def with_tables(readme: str, tables: list[str]) -> str:
    """README with these tables between the marks."""
    return replace_between(readme, BEGIN, END, "\n\n".join(tables))


def replace_between(readme: str, begin: str, end: str, text: str) -> str:
    """README with this text between two marks.

    Raises:
        ValueError: a mark is missing.
    """
    before, found, rest = readme.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"README.md lacks the marks {begin} and {end}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def main() -> None:
    """Read, replace, write."""
    paths = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    if not paths:
        sys.exit("benchmarks/results has no JSON; run `make bench` first")
    contents = [json.loads(path.read_text()) for path in paths]
    reports = [report for content in contents for report in (content if isinstance(content, list) else [content])]
    tables = [table_of(report) for report in reports]
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(), tables))
    print(f"README.md: {len(tables)} tables")


if __name__ == "__main__":
    main()
