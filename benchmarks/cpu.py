"""Every benchmark of a CPU that needs no Ray, side by side on cores of their own, within a time budget.

    python benchmarks/cpu.py --out FOLDER --budget 230      # FOLDER: default $OUT, else the present one

Each runs on physical cores that no other uses (one; scaling.py two); where there are too few cores for all at once, the
next begins when one has ended. Ends what is over its time, prints all tables last, and writes FOLDER/cpu.json (what
each benchmark wrote, a list) and FOLDER/cpu.log.
Needs torch, torchvision, pydantic, PyYAML and pycocotools, for evaluation.py hotcoco.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS: list[tuple[str, int, list[str], list[str]]] = [
    ("train_step_512", 1, ["train_step.py", "--size", "512", "--rounds", "4"], ["train_step.py", "--quick"]),
    ("scaling", 2, ["scaling.py", "--rounds", "6"], ["scaling.py", "--quick"]),
    ("inference_step", 1, ["inference_step.py", "--rounds", "5"], ["inference_step.py", "--quick"]),
    ("evaluation", 1, ["evaluation.py"], ["evaluation.py", "--quick"]),
    ("train_step_256", 1, ["train_step.py", "--size", "256", "--rounds", "7"], []),
    ("masks_to_rle", 1, ["masks_to_rle.py"], ["masks_to_rle.py", "--quick"]),
]
"""Name, cores, arguments, and arguments of the quick form (none: left out); the longest first."""


@dataclass
class Running:
    """A benchmark under way."""

    name: str
    process: subprocess.Popen[bytes]
    cores: list[int]
    log: Path


def physical_cores(allowed: set[int]) -> list[int]:
    """One of the logical CPUs of each core: two that share a core would share its matrix unit too."""
    chosen: list[int] = []
    seen: set[int] = set()
    for cpu in sorted(allowed):
        if cpu in seen:
            continue
        chosen.append(cpu)
        place = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        for part in place.read_text().strip().split(",") if place.exists() else [str(cpu)]:
            first, _, last = part.partition("-")
            seen |= set(range(int(first), int(last or first) + 1))
    return chosen


def start(name: str, arguments: list[str], cores: list[int], folder: Path) -> Running:
    """Start a benchmark on these cores."""
    log = folder / f"{name}.log"
    command = [sys.executable, str(ROOT / "benchmarks" / arguments[0]), *arguments[1:]]
    command += ["--json", str(folder / f"{name}.json")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            start_new_session=True,  # so that its own processes can be ended with it
        )
    return Running(name, process, cores, log)


def main() -> None:
    """Start what cores are free for, until all have ended or the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="where files go")
    parser.add_argument("--budget", type=float, default=230, help="seconds for everything")
    parser.add_argument("--quick", action="store_true", help="the quick form of each")
    parser.add_argument("--parts", nargs="+", default=[part[0] for part in PARTS], help="which")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        unfinished = run(options, Path(folder))
    if unfinished:
        raise SystemExit(f"not finished: {', '.join(unfinished)}")


def run(options: argparse.Namespace, folder: Path) -> list[str]:
    """Run what was asked for; cpu.json and cpu.log are written once all have ended.

    Args:
        options: of the command line.
        folder: for what the benchmarks write.

    Returns:
        What did not finish, or failed.
    """
    deadline = time.monotonic() + options.budget
    free = physical_cores(os.sched_getaffinity(0))
    waiting = [
        (name, cores, quick if options.quick else full)
        for name, cores, full, quick in PARTS
        if name in options.parts and (quick or not options.quick)
    ]
    print(f"cores: {free}", flush=True)
    running: list[Running] = []
    ended: list[Running] = []
    while (waiting or running) and time.monotonic() < deadline:
        for part in list(waiting):
            name, number, arguments = part
            if number <= len(free):
                waiting.remove(part)
                running.append(start(name, arguments, free[:number], folder))
                free = free[number:]
        for one in list(running):
            if one.process.poll() is not None:
                running.remove(one)
                ended.append(one)
                free = one.cores + free
        if not running and waiting and all(number > len(free) for _, number, _ in waiting):
            raise SystemExit(f"not enough cores for {', '.join(name for name, _, _ in waiting)}")
        time.sleep(0.2)
    for one in running:
        os.killpg(one.process.pid, 9)
        one.process.wait()
    log = ""
    for one in ended + running:
        log += f"--- {one.name}: exit {one.process.returncode}, cores {one.cores}\n"
        log += one.log.read_text(errors="replace")
    (options.out / "cpu.log").write_text(log)
    print(log, flush=True)
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    (options.out / "cpu.json").write_text(json.dumps(reports, indent=1) + "\n")
    return [name for name, _, _ in waiting] + [one.name for one in ended + running if one.process.returncode]


if __name__ == "__main__":
    main()
