"""Everything that only a GPU can tell, in order of importance and within a time budget: checks, then speed.

    python benchmarks/gpu.py --out FOLDER --budget 520      # FOLDER: default $OUT, else the present one

Needs torch, torchvision, pydantic, PyYAML and pytest. Each part is a process of its own with a time limit, so that one
that fails or hangs leaves the others their time. The benchmarks of a CPU (cpu.py) run beside them on cores of their
own, which shows bf16 where the processor has it. Writes gpu.json (all rows) and gpu.log (all output), and prints tables
last.
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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from benchmarks.cpu import physical_cores

ROOT = Path(__file__).resolve().parents[1]
STEP = ("benchmarks/gpu_step.py", "--part")

PARTS: list[tuple[str, int, tuple[str, ...]]] = [
    ("tests", 120, ("-m", "pytest", "tests/model/test_cuda.py", "-q", "-rA", "--tb=short", "-p", "no:cacheprovider")),
    ("ceilings", 45, (*STEP, "ceilings")),
    ("steps", 190, (*STEP, "steps")),
    ("phases", 60, (*STEP, "phases")),
    ("compiled_ours", 150, (*STEP, "compiled", "--model", "ours")),
    ("compiled_torchvision", 120, (*STEP, "compiled", "--model", "torchvision")),
]
"""Name, most seconds, arguments of the interpreter; the most important first."""

OWN_CORES = 2  # physical ones, for what drives the GPU


@dataclass
class Running:
    """A process whose output goes to a file."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


def start(name: str, arguments: tuple[str, ...], out: Path, cores: set[int] | None = None) -> Running:
    """Start a part, on some cores only."""
    log = out / f"{name}.log"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    pin = None if cores is None else (lambda: os.sched_setaffinity(0, cores))
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=pin,
        )
    return Running(name, process, log)


def finish(running: Running, limit: float) -> dict[str, Any]:
    """Wait for a part, and end it at its limit; its rows that are there already count."""
    started = time.monotonic()
    try:
        running.process.wait(timeout=max(1.0, limit))
    except subprocess.TimeoutExpired:
        running.process.kill()
        running.process.wait()
    seconds = time.monotonic() - started
    print(f"{running.name}: exit {running.process.returncode} after {seconds:.0f} s", flush=True)
    return {"part": running.name, "exit": running.process.returncode, "seconds": seconds}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file with one JSON object a line; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def print_tables(rows: list[dict[str, Any]]) -> None:
    """What a reader wants to see first."""
    peak = next((row["bf16_tflops"] for row in rows if "bf16_tflops" in row), None)
    work = next((row["teraflops_per_image"] for row in rows if "teraflops_per_image" in row), None)
    for row in rows:
        if "bf16_tflops" in row:
            print(
                f"{row['device']}, torch {row['torch']}: bf16 product {peak:.0f} TFLOP/s, "
                f"copy {row['copy_terabytes_per_second']:.2f} TB/s; {work or float('nan'):.3f} TFLOP an image and step"
            )
    print(f"{'variant':56s} {'batch':>5s} {'images/s':>9s} {'GB':>6s} {'of peak':>8s}")
    for row in rows:
        if "variant" not in row:
            continue
        if "error" in row:
            print(f"{row['variant']:56s} {row['batch_size']:5d}  {row['error'][:200]}")
            continue
        speed = row["images_per_second"]
        share = f"{100 * speed * work / peak:7.1f}%" if work and peak and "bf16" in row["variant"] else ""
        print(f"{row['variant']:56s} {row['batch_size']:5d} {speed:9.1f} {row['peak_gigabytes']:6.1f} {share:>8s}")
    for row in rows:
        if "milliseconds" in row:
            parts = "  ".join(f"{name} {value:.1f}" for name, value in row["milliseconds"].items())
            print(f"ours, eager, batch {row['batch_size']}, ms: {parts}")
        if "kernels" in row:
            print(
                f"{row['model']}, batch {row['batch_size']}: {row['kernel_milliseconds']:.1f} ms of kernels, "
                f"{row['launches']} launches; the longest:"
            )
            for kernel in row["kernels"][:14]:
                print(f"  {kernel['ms']:7.2f} ms {kernel['count']:5d} x {kernel['name'][:90]}")
        if "finite" in row:
            print(f"weights finite after the steps: {row['finite']}")


def main() -> None:
    """Run the parts, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="where files go")
    parser.add_argument("--budget", type=float, default=520, help="seconds for everything")
    parser.add_argument("--parts", nargs="+", default=[name for name, _, _ in PARTS], help="which, in their order")
    parser.add_argument("--no-cpu", action="store_true", help="leave the benchmarks of a CPU out")
    options = parser.parse_args()
    deadline = time.monotonic() + options.budget
    with tempfile.TemporaryDirectory() as folder:
        rows = run_parts(options, Path(folder), deadline)
    print_tables(rows)


def run_parts(options: argparse.Namespace, folder: Path, deadline: float) -> list[dict[str, Any]]:
    """Run what was asked for; after each part gpu.json and gpu.log hold all there is so far.

    Args:
        options: of the command line.
        folder: for what the parts write.
        deadline: on the monotonic clock.

    Returns:
        The rows that the parts wrote.
    """
    rows_file = folder / "rows.jsonl"
    cores = physical_cores(os.sched_getaffinity(0))
    others = os.sched_getaffinity(0)
    beside: list[Running] = []
    if not options.no_cpu and len(cores) >= OWN_CORES + 2:
        budget = str(deadline - time.monotonic() - 10)
        of_cpu = ("benchmarks/cpu.py", "--out", str(options.out.resolve()), "--budget", budget)
        beside.append(start("cpu", of_cpu, folder, set(cores[OWN_CORES:])))
        others = set(cores[:OWN_CORES])
    ended: list[dict[str, Any]] = []
    (options.out / "gpu.log").write_text("")

    def record(running: Running, limit: float) -> None:
        ended.append(finish(running, limit))
        with (options.out / "gpu.log").open("a") as file:
            file.write(f"--- {running.name}\n{running.log.read_text(errors='replace')}\n")
        report = {"parts": ended, "rows": rows_of(rows_file)}
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1))
        if running.name in ("tests", "cpu"):
            print("\n".join(running.log.read_text(errors="replace").splitlines()[-50:]), flush=True)

    for name, limit, arguments in PARTS:
        left = deadline - time.monotonic() - 5
        if name not in options.parts or left < 20:
            continue
        if arguments[0] == STEP[0]:
            arguments = (*arguments, "--json", str(rows_file))
        record(start(name, arguments, folder, others), min(limit, left))
    for running in beside:
        record(running, deadline - time.monotonic())
    return rows_of(rows_file)


if __name__ == "__main__":
    main()
