"""What Ray costs a training: CPU seconds a step of the job with one worker, beside the same steps in one plain process.

    python benchmarks/ray_overhead.py --steps 100 --rounds 3

Both take the demo's configuration with one worker and its whole batch, the same rows in the same order, each read from
shards in the course of it, and one thread; evaluations and checkpoints lie outside of what is counted. The job's CPU
seconds are those of all its processes: driver, Ray's own, tracker, data tasks, worker. Those of the worker, which does
what the plain process does except for reading, are told apart, and so is how much of a core all others take together.
Turns follow each other, a fresh process each. How long the job takes to the first steps that it logs is told too.
Counting begins when the blocks of the stream have grown to their full size, and the object store holds few of them, so
that the job reads while it is counted.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from benchmarks.ingredients import batches_of_rank
from benchmarks.processes import SessionMeter, cpu_seconds, family, session
from benchmarks.results import Table, show
from model.mask_rcnn import MaskRCNN
from pipeline import allocator
from pipeline.config import ExperimentConfig
from pipeline.optim import build_optimizer
from pipeline.prepare import PreparedData, check, write
from pipeline.shards import ShardSet
from pipeline.training import autocast_dtype, train_step
from pipeline.training_plan import make_plan, total_steps

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_STEPS = 70
STEPS_A_BLOCK = 50  # of the stream, in the end
STEPS_BEHIND = 100  # so that there is something to read until counting ends
OBJECT_STORE_MEGABYTES = 64
END_SECONDS = 30.0
POLL_SECONDS, LOOK_SECONDS = 0.02, 0.5
PLAIN, JOB = "plain process", "jobs/train.py, one worker"
WORKER = "ray::RayTrainWo"  # as the kernel names the process of the training worker


def main() -> None:
    """Prepare, then both in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="that are counted, whole blocks of 50")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--quick", action="store_true", help="50 steps, one turn")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "ray_overhead", help="for shards and runs")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plain", action="store_true", help="one turn without Ray, in this process")
    options = parser.parse_args()
    allocator.restart_keeping_freed_memory()
    steps, rounds = (STEPS_A_BLOCK, 1) if options.quick else (options.steps, options.rounds)
    if steps % STEPS_A_BLOCK:
        raise SystemExit(f"--steps {steps}: has to be a multiple of {STEPS_A_BLOCK}")
    options.folder = options.folder.resolve()  # the job runs elsewhere
    config = recipe(options.folder, steps)
    if options.plain:
        print(json.dumps(run_plain(config, prepare(config))))
        return
    prepare(config)
    turns: dict[str, list[dict[str, float]]] = {PLAIN: [], JOB: []}
    for _ in range(rounds):
        command = [sys.executable, __file__, "--plain", "--steps", str(steps), "--folder", str(options.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        turns[PLAIN].append(json.loads(done.stdout.splitlines()[-1]))
        turns[JOB].append(run_job(config, options.folder, f"turn-{uuid.uuid4().hex[:8]}"))
    show(table_of(turns, steps, rounds), options.json)


def recipe(folder: Path, steps: int) -> ExperimentConfig:
    """The demo with one worker, long enough."""
    values = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    images = values["train"]["batch_size_per_worker"] * values["scaling"]["num_workers"]
    values["scaling"]["num_workers"] = 1
    values["data"] |= {"root": str(folder / "shapes"), "shards": str(folder / "shards")}
    values["data"]["object_store_megabytes"] = OBJECT_STORE_MEGABYTES
    last = WARM_UP_STEPS + steps + STEPS_BEHIND
    values["train"] |= {"batch_size_per_worker": images, "max_steps": last, "evaluate_every_epochs": 1000}
    values["train"]["epochs"] = 1000
    values["train"]["log_every_steps"] = 5
    values["checkpoints"] = {"every_minutes": 1000, "every_epochs": 1000}
    values["run"] = {"storage_path": str(folder / "runs")}
    return ExperimentConfig.model_validate(values)


def prepare(config: ExperimentConfig) -> PreparedData:
    """Shards, made where they are not there yet."""
    return write(config, check(config, lambda _: None), lambda _: None, on_cluster=False)


def run_plain(config: ExperimentConfig, data: PreparedData) -> dict[str, float]:
    """The steps of `pipeline.worker` and nothing else."""
    torch.set_num_threads(1)
    shards = ShardSet(data.training)
    dtype = autocast_dtype(config.train.precision, "cpu")
    torch.manual_seed(config.train.seed)
    model = MaskRCNN(config.model, shards.manifest.num_classes)
    model.to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(model, config.optim)
    last_step = total_steps(config, make_plan(config, shards))
    first, end = WARM_UP_STEPS, last_step - STEPS_BEHIND
    marks = {}
    for step, batches in enumerate(batches_of_rank(config, shards, 0, last_step, data)):
        if step in (first, end):
            used = cpu_seconds(family(os.getpid()))
            marks[step] = Mark(used, used, time.monotonic())
        if step == end:
            break
        train_step(model, batches, optimizer, config, step, last_step, dtype)
    return per_step(marks[first], marks[end], end - first)


def run_job(config: ExperimentConfig, folder: Path, name: str) -> dict[str, float]:
    """The job, watched through the journal of its metrics, and ended after the steps that count."""
    values = config.model_dump(mode="json")
    values["run"]["name"] = name
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "train.py"), "--config", str(path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=ROOT, env=kept,
    )  # fmt: skip
    journal = folder / "runs" / name / "tracking" / "records.jsonl"
    meter = SessionMeter(process.pid)
    try:
        wait_for_step(process, journal, 1, meter)
        to_first = time.monotonic() - started
        marks, reached = [], []
        for step in (WARM_UP_STEPS, (config.train.max_steps or 0) - STEPS_BEHIND):
            reached.append(wait_for_step(process, journal, step, meter))
            marks.append(Mark(meter.seconds(), meter.seconds(WORKER), time.monotonic()))
        found = per_step(marks[0], marks[1], reached[1] - reached[0])
        if not found["worker_cpu_seconds"]:
            raise RuntimeError(f"no process of the job is called {WORKER}: does Ray name its workers otherwise now?")
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            end_session(process, number)
    return {**found, "seconds_to_first_steps": to_first}


def wait_for_step(process: subprocess.Popen[bytes], journal: Path, step: int, meter: SessionMeter) -> int:
    """Until the journal holds the metrics of this step; the last step it holds."""
    looked = 0.0
    while True:
        if time.monotonic() - looked > LOOK_SECONDS:
            meter.look()
            looked = time.monotonic()
        lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
        last = max((json.loads(line).get("step", 0) for line in lines[-20:]), default=0)
        if last >= step:
            return int(last)
        if process.poll() is not None:
            raise SystemExit(f"the job ended with {process.returncode}")
        time.sleep(POLL_SECONDS)


def end_session(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to the driver, or to all that is left of its session."""
    for pid in [process.pid] if number is signal.SIGTERM else session(process.pid):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)


@dataclass(frozen=True)
class Mark:
    """CPU seconds so far and the clock, at one moment."""

    cpu_seconds: float
    worker_cpu_seconds: float
    seconds: float


def per_step(first: Mark, last: Mark, steps: int) -> dict[str, float]:
    """CPU seconds, in all and of the worker, and wall seconds a step between two marks."""
    begin, end = asdict(first), asdict(last)
    return {key: (end[key] - begin[key]) / steps for key in begin}


def table_of(turns: dict[str, list[dict[str, float]]], steps: int, rounds: int) -> Table:
    """Medians of the turns."""
    rows = []
    plain = statistics.median(turn["cpu_seconds"] for turn in turns[PLAIN])
    for name, found in turns.items():
        cpu, worker, wall = (
            statistics.median(turn[key] for turn in found) for key in ("cpu_seconds", "worker_cpu_seconds", "seconds")
        )
        first = [turn["seconds_to_first_steps"] for turn in found if "seconds_to_first_steps" in turn]
        begins = f"{statistics.median(first):.1f}" if first else "-"
        more, more_there = (f"{100 * (one / plain - 1):+.1f} %" for one in (cpu, worker))
        others = f"{(cpu - worker) / wall:.2f}"
        rows.append([name, f"{cpu:.3f}", more, f"{worker:.3f}", more_there, others, f"{wall:.3f}", begins])
    title = f"demo, one worker, one thread, {steps} steps a turn, medians of {rounds}"
    columns = [
        "variant", "CPU s a step", "more than plain", "of the worker", "more than plain", "cores for all others",
        "s a step", "s from command to first steps logged",
    ]  # fmt: skip
    return Table("ray_overhead", title, columns, rows, turns)


if __name__ == "__main__":
    main()
