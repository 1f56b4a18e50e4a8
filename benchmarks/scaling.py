"""Data-parallel training on one machine: two workers of one core each, one worker of one core, one of two threads.

    python benchmarks/scaling.py --size 512

The model and batch of train_step.py, 2 images a worker (one worker with two threads: 2 and 4, so that the same images
in all are there too), gloo, gradients exchanged as pipeline.worker does. Every variant has its processes, pinned to
cores; they step in turn, the others wait. Medians of wall time.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from pipeline import allocator


@dataclass(frozen=True)
class Variant:
    """Processes, threads of each, images of each."""

    name: str
    workers: int
    threads: int
    images: int


VARIANTS = [
    Variant("one worker, one core", 1, 1, 2),
    Variant("two workers, one core each", 2, 1, 2),
    Variant("one worker, two threads, 2 images", 1, 2, 2),
    Variant("one worker, two threads, 4 images", 1, 2, 4),
]


def work(pipe: Connection, variant: Variant, rank: int, cores: list[int], size: int, half: bool, store: str) -> None:
    """A worker: answer each message with the seconds that one step took."""
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(variant.threads)
    import torch
    import torch.distributed
    from torch.nn.parallel import DistributedDataParallel

    from benchmarks import peers
    from model.losses import LOSS_NAMES
    from pipeline.training import data_parallel_options

    torch.set_num_threads(variant.threads)
    device = torch.device("cpu")
    batch = peers.make_batch(variant.images, (size, size), device)
    proposals = peers.make_proposals(batch, 32)
    ours = peers.our_model(peers.torchvision_model(device), device)
    network: torch.nn.Module = ours
    if variant.workers > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=variant.workers
        )
        network = DistributedDataParallel(ours, **data_parallel_options(1))
    optimizer = peers.Optimizer(ours)

    def step() -> None:
        with peers.in_type(torch.bfloat16 if half else None, device), peers.given_proposals(ours, proposals):
            losses = network(batch)
        torch.stack([losses[name] for name in LOSS_NAMES]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.update()

    step()
    pipe.send(0.0)
    while pipe.recv():
        started = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - started)


def main() -> None:
    """Start all variants, then let them step in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="side of the images")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each variant that are timed")
    parser.add_argument("--quick", action="store_true", help="128 px, three rounds")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    allocator.restart_keeping_freed_memory()
    size, rounds = (128, 3) if options.quick else (options.size, options.rounds)
    from benchmarks.results import Table, has_bf16, show

    half = has_bf16()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("scaling.py needs two cores")
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, list[Connection]] = {variant.name: [] for variant in VARIANTS}
    processes: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for variant in VARIANTS:
            for rank in range(variant.workers):
                ours, theirs = context.Pipe()
                of_worker = cores[: variant.threads] if variant.workers == 1 else [cores[rank]]
                arguments = (theirs, variant, rank, of_worker, size, half, f"{folder}/store")
                processes.append(context.Process(target=work, args=arguments, daemon=True))
                processes[-1].start()
                pipes[variant.name].append(ours)
            for pipe in pipes[variant.name]:
                pipe.recv()
        seconds: dict[str, list[float]] = {variant.name: [] for variant in VARIANTS}
        for number in range(rounds + 1):
            for variant in VARIANTS:
                for pipe in pipes[variant.name]:
                    pipe.send(True)
                slowest = max(pipe.recv() for pipe in pipes[variant.name])
                if number:  # the first round warms up
                    seconds[variant.name].append(slowest)
        for of_variant in pipes.values():
            for pipe in of_variant:
                pipe.send(False)
        for process in processes:
            process.join(timeout=10)
    speeds = {v.name: v.workers * v.images / statistics.median(seconds[v.name]) for v in VARIANTS}
    one, threads = speeds[VARIANTS[0].name], max(speeds[v.name] for v in VARIANTS if v.threads > 1)
    rows = [[name, f"{speed:.2f}", f"{speed / one:.2f}", f"{speed / threads:.2f}"] for name, speed in speeds.items()]
    title = (
        f"training, {size} px, 2 images a worker, ResNet-50, {'bf16' if half else 'fp32'}, two cores, wall time, "
        f"medians of {rounds}"
    )
    columns = ["variant", "images/s", "times one core", "times two threads at best"]
    show(Table("scaling", title, columns, rows, {"seconds": seconds}), options.json)


if __name__ == "__main__":
    main()
