"""CPU time and memory of a process and all that it started, from /proc."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
PARENT, SESSION, OWN_TIMES, TIMES = 1, 3, slice(11, 13), slice(11, 15)  # fields behind the name


def _fields(process: int) -> list[str]:
    """Of a process behind its name; nothing where it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _name(process: int) -> str:
    """As the process or its program has set it, 15 letters of it; empty where it is gone."""
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""


def _all() -> Iterator[tuple[int, list[str]]]:
    """Every process there is."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _fields(int(entry.name))):
            yield int(entry.name), fields


def family(root: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for process, fields in _all():
        children.setdefault(int(fields[PARENT]), []).append(process)
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def session(leader: int) -> list[int]:
    """All processes of a session, also those whose parents have ended."""
    return [process for process, fields in _all() if int(fields[SESSION]) == leader]


def cpu_seconds(processes: Iterable[int]) -> float:
    """User and system time of processes, and of those of their children that have ended."""
    return sum(int(number) for process in processes for number in _fields(process)[TIMES]) / TICKS


class SessionMeter:
    """CPU time of all processes that a session has ever had, as far as they were looked at before they ended."""

    def __init__(self, leader: int) -> None:
        self._leader = leader
        self._ticks: dict[int, int] = {}
        self._names: dict[int, str] = {}

    def look(self) -> None:
        """Note what each process has used so far."""
        for process, fields in _all():
            if int(fields[SESSION]) == self._leader:
                self._ticks[process] = sum(map(int, fields[OWN_TIMES]))
                self._names[process] = _name(process) or self._names.get(process, "")

    def seconds(self, name: str = "") -> float:
        """Of all whose name begins so, as last seen; a process that ends keeps its share."""
        self.look()
        return sum(ticks for process, ticks in self._ticks.items() if self._names[process].startswith(name)) / TICKS


def private_megabytes(processes: Iterable[int]) -> float:
    """Memory that is not a mapped file or the object store."""
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return total / 1024
