"""What every benchmark writes: one table for a person, and the same as JSON with machine, versions and date."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision


@dataclass(frozen=True)
class Table:
    """One claim and its figures."""

    name: str
    title: str
    """What is the same in all rows, and how it was timed."""
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    raw: dict[str, Any] = field(default_factory=dict)
    """All single measurements, so that nobody has to trust a median."""


ROOT = Path(__file__).resolve().parents[1]


def named(path: Path) -> str:
    """A file as figures name it: below the repository, if it lies there, so that every checkout names it the same."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def machine() -> dict[str, Any]:
    """Processor, its cores that may be used, what it knows of bf16, versions, date."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found = dict(part.split(":", 1) for part in reversed(lines) if ":" in part)
    cpu = {key.strip(): value.strip() for key, value in found.items()}
    flags = set(cpu.get("flags", "").split())
    return {
        "processor": cpu.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "bf16": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def has_bf16() -> bool:
    """Whether this processor has instructions for bf16; else it is emulated, and slow."""
    return bool(machine()["bf16"])


def show(table: Table, path: Path | None) -> None:
    """Print a table, and write it where a path is given."""
    print(table.title)
    lines = [list(table.columns), *[list(row) for row in table.rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]
    for line in lines:
        numbers = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *numbers]))
    if path is not None:
        command = " ".join([Path(sys.argv[0]).name, *_without_path(sys.argv[1:])])
        report = asdict(table) | {"command": f"python benchmarks/{command}", "machine": machine()}
        path.write_text(json.dumps(report, indent=1) + "\n")


def _without_path(arguments: Sequence[str]) -> list[str]:
    """A command line without where its JSON went, which says nothing to a reader."""
    if "--json" not in arguments:
        return list(arguments)
    place = list(arguments).index("--json")
    return [*arguments[:place], *arguments[place + 2 :]]
