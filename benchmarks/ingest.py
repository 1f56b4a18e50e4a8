"""How fast training images come: shards and stream against torchvision's reference, interleaved in one run.

    python benchmarks/ingest.py --data FOLDER        # FOLDER holds images/ and annotations/instances_train.json (COCO)

The same images, flipped at random, the short side drawn from the same lengths. The reference is CocoDetection with
its transforms (references/detection, version 2) behind a DataLoader with two workers. Each variant runs in a process of
its own, and an epoch of each follows an epoch of the other. CPU seconds are those of all its processes (Ray's own too),
from the start of an epoch until what it reads ahead is there again: until a second in which it has used no more than a
fifth of a CPU.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from benchmarks.processes import cpu_seconds, family, private_megabytes
from pipeline.config import ExperimentConfig

SIDE = 512  # pixels of the canvas
BATCH_SIZE = 4
AUGMENT: dict[str, Any] = {"horizontal_flip": 0.5, "short_side": (304, 384), "short_side_step": 16}  # 0.8 to 1 of 4:3
STORE_MEGABYTES = 64  # small, so that little of an epoch is read ahead while the other variant runs
SETTLE_SECONDS, SETTLED_CPU_SECONDS, MAX_SETTLES = 1.0, 0.2, 10


def main() -> None:
    """Prepare twice, then run epochs in turn and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with images/ and annotations/instances_train.json")
    parser.add_argument("--copies", type=int, default=8, help="how often every image is listed")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of the stream")
    parser.add_argument("--reference_epochs", type=int, default=3, help="epochs of the reference")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ingest-") as folder:
        num_images = write_copies(Path(options.data), Path(folder), options.copies)
        variants = {
            "raw": Variant(run_stream, folder, "raw", options.epochs),
            "jpeg": Variant(run_stream, folder, "jpeg", options.epochs),
            "reference": Variant(run_reference, folder, "", options.reference_epochs),
        }
        starts = {name: variant.call("start") for name, variant in variants.items()}
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
        for epoch in range(options.epochs):
            for name, variant in variants.items():
                if epoch < variant.epochs:
                    rounds[name].append(variant.call("epoch"))
        for variant in variants.values():
            variant.end()
    show(num_images, starts, rounds)


def write_copies(data: Path, folder: Path, copies: int) -> int:
    """A COCO file that lists every image several times, with absolute folders; returns their number."""
    content = json.loads((data / "annotations" / "instances_train.json").read_text())
    images, annotations = content["images"], content["annotations"]
    spread = 1 + max(max(entry["id"] for entry in images), max(entry["id"] for entry in annotations))
    several = {
        "images": [{**image, "id": image["id"] + copy * spread} for copy in range(copies) for image in images],
        "annotations": [
            {**entry, "id": entry["id"] + copy * spread, "image_id": entry["image_id"] + copy * spread}
            for copy in range(copies)
            for entry in annotations
        ],
        "categories": content["categories"],
    }
    (folder / "several.json").write_text(json.dumps(several))
    few = {**content, "images": images[:2], "annotations": []}
    (folder / "few.json").write_text(json.dumps(few))
    (folder / "images").symlink_to((data / "images").resolve())
    return len(several["images"])


class Variant:
    """A process that runs one epoch whenever it is asked to."""

    def __init__(self, run: Any, folder: str, image_format: str, epochs: int) -> None:
        self.epochs = epochs
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=run, args=(theirs, folder, image_format, epochs))
        self._process.start()

    def call(self, command: str) -> dict[str, float]:
        """What the process measured."""
        self._pipe.send(command)
        answer: dict[str, float] = self._pipe.recv()
        return answer

    def end(self) -> None:
        """Wait for the process to end."""
        self._pipe.send("end")
        self._process.join()


def answer_epochs(pipe: Connection, batches: Iterator[Any], steps: int, first: dict[str, float]) -> None:
    """Run an epoch of so many steps for every command, from the second on."""
    pipe.send(first)
    while pipe.recv() == "epoch":
        started, cpu_before = time.monotonic(), own_cpu_seconds()
        for _ in range(steps):
            next(batches)
        wall = time.monotonic() - started
        pipe.send(
            {
                "wall": wall,
                "cpu": settled_cpu_seconds() - cpu_before,
                "megabytes": private_megabytes(family(os.getpid())),
            }
        )


def run_stream(pipe: Connection, folder: str, image_format: str, epochs: int) -> None:
    """Prepare the images, then read them as a worker of a training does."""
    from pipeline import cluster
    from pipeline.batches import PlannedBatches
    from pipeline.prepare import prepare
    from pipeline.shards import ShardSet
    from pipeline.stream import LoadBlock, planned_blocks, split_stream, steps_per_block
    from pipeline.training_plan import make_plan

    config = ExperimentConfig.model_validate(
        {
            "data": {
                "root": folder,
                "sources": [{"annotations": "several.json"}],
                "validation_sources": [{"annotations": "few.json"}],
                "canvases": [[SIDE, SIDE]],
                "image_format": image_format,
            },
            "augment": AUGMENT,
            "train": {"batch_size_per_worker": BATCH_SIZE},
            "scaling": {"num_workers": 1},
            "run": {"storage_path": f"{folder}/{image_format}"},
        }
    )
    pipe.recv()
    cluster.connect(debug=False)
    started, cpu_before = time.monotonic(), own_cpu_seconds()
    data = prepare(config, lambda _: None)
    prepared = {"prepare_seconds": time.monotonic() - started, "prepare_cpu_seconds": own_cpu_seconds() - cpu_before}
    shards = ShardSet(data.training)
    megabytes = sum(shard["num_bytes"] for shard in shards.manifest.shards) / 1e6
    plan = make_plan(config, shards)
    steps = plan.steps_of_epochs(1)
    started = time.monotonic()
    blocks = planned_blocks(plan, 0, epochs * steps + 1, 1, steps_per_block(config.data.canvases, BATCH_SIZE))
    load = LoadBlock(data.training, shards.manifest.digest, config.augment, config.train.seed)
    iterator = split_stream(blocks, load, 1, cpus=2, object_store_bytes=STORE_MEGABYTES * 1024 * 1024)[0]
    active = shards.manifest.active_classes()
    batches = iter(PlannedBatches(iterator, active, 0, epochs * steps + 1, 0, BATCH_SIZE, 1))
    next(batches)
    first_batch = time.monotonic() - started
    answer_epochs(pipe, batches, steps, {**prepared, "disk_megabytes": megabytes, "first_batch_seconds": first_batch})


def run_reference(pipe: Connection, folder: str, image_format: str, epochs: int) -> None:
    """Torchvision's data set and transforms, images and masks at the size of the canvas."""
    del image_format
    import contextlib
    import io

    import torch
    from torch.utils.data import DataLoader

    with contextlib.redirect_stdout(io.StringIO()):
        loader: DataLoader[Any] = DataLoader(
            reference_dataset(folder), batch_size=BATCH_SIZE, shuffle=True, num_workers=2, collate_fn=list,
            persistent_workers=True,
        )  # fmt: skip
    torch.set_num_threads(1)
    pipe.recv()
    started = time.monotonic()

    def forever() -> Iterator[Any]:
        while True:
            yield from loader

    batches = forever()
    next(batches)
    first = {"first_batch_seconds": time.monotonic() - started}
    answer_epochs(pipe, batches, len(loader), first)


def reference_dataset(folder: str) -> Any:
    """CocoDetection with the reference's transforms; to be built where it is used."""
    import torch
    from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
    from torchvision.transforms import v2

    low, high = AUGMENT["short_side"]
    transforms = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomShortestSize([*range(low, high + 1, AUGMENT["short_side_step"])], max_size=SIDE, antialias=True),
            v2.RandomHorizontalFlip(AUGMENT["horizontal_flip"]),
            v2.ToDtype(torch.float, scale=True),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ]
    )
    dataset = CocoDetection(f"{folder}/images", f"{folder}/several.json", transforms=transforms)
    return wrap_dataset_for_transforms_v2(dataset, target_keys=("boxes", "labels", "masks"))


def own_cpu_seconds() -> float:
    """Of this process and all below it."""
    return cpu_seconds(family(os.getpid()))


def settled_cpu_seconds() -> float:
    """`own_cpu_seconds` once nothing is read ahead any more."""
    now = own_cpu_seconds()
    for _ in range(MAX_SETTLES):
        before = now
        time.sleep(SETTLE_SECONDS)
        now = own_cpu_seconds()
        if now - before <= SETTLED_CPU_SECONDS:
            break
    return now


def show(num_images: int, starts: dict[str, dict[str, float]], rounds: dict[str, list[dict[str, float]]]) -> None:
    """The table, and the same as JSON."""
    print(f"{num_images} images, canvas {SIDE} x {SIDE}, batches of {BATCH_SIZE}, {os.cpu_count()} CPUs, medians")
    result: dict[str, dict[str, float]] = {}
    for name, epochs in rounds.items():
        steady = epochs[1:] or epochs
        measured = {
            "first_epoch_images_per_second": num_images / epochs[0]["wall"],
            "images_per_second": num_images / statistics.median(epoch["wall"] for epoch in steady),
            "images_per_cpu_second": num_images / statistics.median(epoch["cpu"] for epoch in steady),
            "megabytes_after_epoch_2": steady[0]["megabytes"],
            "megabytes_at_the_end": epochs[-1]["megabytes"],
            "epochs": len(epochs),
        }
        row = starts[name] | measured
        result[name] = {key: round(value, 2) for key, value in row.items()}
    keys = list(dict.fromkeys(key for row in result.values() for key in row))
    for key in keys:
        print(f"{key:32s}" + "".join(f"{row.get(key, '-'):>12}" for row in result.values()))
    print(f"{'':32s}" + "".join(f"{name:>12}" for name in result))
    reference = result["reference"]["images_per_cpu_second"]
    for name in ("raw", "jpeg"):
        print(f"{name}: {result[name]['images_per_cpu_second'] / reference:.1f} times the reference, by CPU second")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
