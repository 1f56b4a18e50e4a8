"""What each ingredient of a recipe does to the demo's AP: one change at a time, several seeds, the same steps.

    python benchmarks/ingredients.py --seeds 3                       # all, for hours on a CPU, for minutes on a GPU
    python benchmarks/ingredients.py --only plain copy_paste --seeds 2
    python benchmarks/ingredients.py --config configs/nuclei.yaml --only fp32 bf16 --set data.root=FOLDER

Every training is the recipe of the configuration, the demo's if no other is named, with the change named here, global
batch and number of steps included; it runs in a process of its own (two where the ingredient is one of several
workers), without Ray, on the GPU if there is one. AP is that of the last step, on the validation images. Noise is twice
the standard deviation of the plain recipe's mask AP over its seeds.
"""

import argparse
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing
import yaml
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from benchmarks.results import named
from model.mask_rcnn import MaskRCNN
from model.structures import Batch
from model.synchronised_norm import synchronise_norms
from pipeline import allocator
from pipeline.batches import collate
from pipeline.config import ExperimentConfig
from pipeline.ema import averaged_copy, update_average
from pipeline.evaluation import average_precision, evaluate_rows
from pipeline.freezing import freeze
from pipeline.optim import build_optimizer
from pipeline.prepare import PreparedData, check, write
from pipeline.shards import ShardSet
from pipeline.stream import LoadBlock
from pipeline.training import autocast_dtype, check_finite, compress_gradients, gradient_scaler, train_step
from pipeline.training_plan import make_plan, total_steps

ROOT = Path(__file__).resolve().parents[1]
PLAIN = "plain"
FROM_PLAIN = "frozen_backbone"  # begins with the weights of a plain training
TWO_WORKERS: dict[str, Any] = {"scaling.num_workers": 2, "train.batch_size_per_worker": 4}
INGREDIENTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "sgd_nesterov": {
        "optim.name": "sgd", "optim.nesterov": True, "optim.learning_rate": 0.02, "optim.weight_decay": 1e-4,
    },
    "multistep": {"optim.schedule": "multistep", "optim.milestones": [500, 670]},
    "ema": {"optim.ema_decay": 0.99},
    "accumulation": {"train.batch_size_per_worker": 4, "train.accumulation_steps": 2},
    "linear_scaling": {"optim.reference_batch_size": 16, "optim.learning_rate": 0.0024, "optim.warmup_steps": 50},
    "scale_jitter": {"augment.short_side": [96, 128], "augment.short_side_step": 8},
    "large_scale_jitter": {"augment.large_scale_jitter": [0.8, 1.25]},
    "colour_jitter": {
        "augment.brightness": 0.2, "augment.contrast": 0.2, "augment.saturation": 0.2, "augment.hue": 0.02,
    },
    "copy_paste": {"augment.copy_paste": 0.5},
    "batch_norm_in_heads": {"model.box_head.norm": "batch", "model.mask_head.norm": "batch"},
    "group_norm_in_heads": {"model.box_head.norm": "group", "model.mask_head.norm": "group"},
    "box_head_fc2": {"model.box_head.kind": "fc2"},
    "box_head_conv4fc1": {"model.box_head.kind": "conv4fc1", "model.box_head.convolution_channels": 64},
    "two_rpn_convolutions": {"model.rpn.num_convolutions": 2},
    "repeat_factors": {"data.repeat_threshold": 0.6},
    "half_of_empty_images": {"data.empty_images_fraction": 0.5},
    "giou": {"model.losses.box_loss": "giou"},
    "smooth_l1_beta": {"model.losses.smooth_l1_beta": 0.1},
    "mask_loss_weight": {"model.losses.mrcnn_mask_loss": 2.0},
    "fp32": {"train.precision": "fp32"},
    "bf16": {"train.precision": "bf16"},
    "fp16": {"train.precision": "fp16"},
    "two_workers": TWO_WORKERS,
    "synchronised_norms": {**TWO_WORKERS, "train.synchronise_norms": True},
    "gradients_in_bf16": {**TWO_WORKERS, "train.gradient_compression": "bf16"},
    "gradients_in_fp16": {**TWO_WORKERS, "train.gradient_compression": "fp16"},
    FROM_PLAIN: {"train.trainable_layers": "heads", "model.backbone.norm": "frozen"},
}  # fmt: skip


def main() -> None:
    """Prepare the data, run the trainings some at a time, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml")
    parser.add_argument("--only", nargs="+", choices=list(INGREDIENTS), default=list(INGREDIENTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each ingredient")
    parser.add_argument("--plain_seeds", type=int, help="trainings of the plain recipe, for the noise")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="at the same time")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further training after so many")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "ingredients")
    parser.add_argument("--json", type=Path, help="where to write the figures; trainings that stand there are kept")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes of every training")
    parser.add_argument("--run", nargs=2, metavar=("NAME", "SEED"), help="one training alone, in this process")
    options = parser.parse_args()
    always = {key: yaml.safe_load(value) for key, value in (entry.split("=", 1) for entry in options.set)}
    if options.run:
        run_alone(options, always)
        return
    allocator.restart_keeping_freed_memory()
    started = time.monotonic()
    names = list(dict.fromkeys([PLAIN, *options.only]))
    with torch.multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        configs = [config_of(options.config, name, 0, always) for name in names]
        distinct = {data_key(config): config for config in configs}
        pool.starmap(prepare_data, [(config, options.folder) for config in distinct.values()])
    print(f"data: there after {time.monotonic() - started:.0f} s", flush=True)
    seeds = {name: range(options.seeds) for name in names} | {PLAIN: range(options.plain_seeds or options.seeds)}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    settings = [named(options.config), options.set]
    if options.json and options.json.exists():
        report = json.loads(options.json.read_text())
        if report["settings"] != settings:
            raise SystemExit(f"{options.json} holds trainings of other settings: {report['settings']}")
        results |= report["results"]
    there = {(name, entry["seed"]) for name, entries in results.items() for entry in entries}
    with ThreadPoolExecutor(options.processes) as pool:
        plain = [
            (PLAIN, seed, pool.submit(run_process, PLAIN, seed, options))
            for seed in seeds[PLAIN]
            if (PLAIN, seed) not in there
        ]
        others = [
            (name, seed, pool.submit(run_process, name, seed, options, started, plain[0][2] if plain else None))
            for seed in range(options.seeds)
            for name in sorted(names, key=lambda name: name == FROM_PLAIN)
            if name != PLAIN and (name, seed) not in there
        ]
        for name, seed, future in [*plain, *others]:
            result = future.result()
            if result is not None:
                results[name].append({"seed": seed, **result})
                if options.json:  # all there is so far
                    report = {"settings": settings, "device": device_name(), "torch": torch.__version__}
                    report["results"] = results
                    options.json.write_text(json.dumps(report, indent=1))
    show(results)


def config_of(path: Path, name: str, seed: int, always: dict[str, Any]) -> ExperimentConfig:
    """A recipe with one ingredient, for one process with the recipe's global batch unless it says otherwise."""
    values = yaml.safe_load(path.read_text())
    recipe = ExperimentConfig.model_validate(values)
    changes = {"scaling.num_workers": 1, "train.batch_size_per_worker": recipe.global_batch_size, "train.seed": seed}
    return with_changes(values, {**changes, **always, **INGREDIENTS[name]})


def with_changes(values: dict[str, Any], changes: dict[str, Any]) -> ExperimentConfig:
    """A configuration as read from YAML, some keys of it set by their dotted names."""
    for key, value in changes.items():
        *sections, knob = key.split(".")
        part = values
        for section in sections:
            part = part.setdefault(section, {})
        part[knob] = value
    return ExperimentConfig.model_validate(values)


def data_key(config: ExperimentConfig) -> str:
    """Tells shards apart: images are stored as large as their augmentation asks for."""
    drawn = [config.augment.short_side, config.augment.large_scale_jitter]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:12]


def prepare_data(config: ExperimentConfig, folder: Path) -> PreparedData:
    """Shards below the folder, and the shapes where they are asked for, made where they are not there yet."""
    ready = folder / data_key(config)
    root = str(ready / "shapes") if config.data.synthetic is not None else config.data.root
    data = config.data.model_copy(update={"root": root, "shards": str(ready / "shards")})
    config = config.model_copy(update={"data": data})
    return write(config, check(config, lambda _: None), lambda _: None, on_cluster=False)


def run_process(
    name: str, seed: int, options: argparse.Namespace, started: float = 0.0, waits_for: Future[Any] | None = None
) -> dict[str, Any] | None:
    """One training in a process of its own; None where there was no more time to begin it."""
    if waits_for is not None and name == FROM_PLAIN:
        waits_for.result()
    if started and time.monotonic() - started > 60 * options.minutes:
        return None
    command = [sys.executable, __file__, "--run", name, str(seed), "--config", str(options.config)]
    command += ["--folder", str(options.folder), "--set", *options.set]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"{name} {seed}: failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return None
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    figures = f"segm_AP {result['segm_AP']:.3f}  bbox_AP {result['bbox_AP']:.3f}  {result['seconds']:.0f} s"
    print(f"{name} {seed}: {figures}", flush=True)
    return result


def run_alone(options: argparse.Namespace, always: dict[str, Any]) -> None:
    """One training; its figures as a line of JSON."""
    name, seed, folder = options.run[0], int(options.run[1]), options.folder
    config = config_of(options.config, name, seed, always)
    data = prepare_data(config, folder)
    initial = str(folder / "plain-0.safetensors") if name == FROM_PLAIN else None
    final = str(folder / f"{name}-{seed}.safetensors")
    workers = config.scaling.num_workers
    arguments = (config.model_dump(), data, initial, final, f"tcp://127.0.0.1:{free_port()}")
    if workers == 1:
        train(0, *arguments)
    else:
        spawn(train, arguments, nprocs=workers)  # type: ignore[no-untyped-call]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def train(
    rank: int, settings: dict[str, Any], data: PreparedData, initial: str | None, final: str, address: str
) -> None:
    """What `pipeline.worker` does, without Ray, checkpoints and MLflow; rank 0 evaluates and prints."""
    torch.set_num_threads(1)
    config = ExperimentConfig.model_validate(settings)
    workers = config.scaling.num_workers
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if workers > 1:
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=workers)
    shards, validation = ShardSet(data.training), ShardSet(data.validation)
    dtype = autocast_dtype(config.train.precision, device.type)
    scaler = gradient_scaler(dtype, device.type, config.train.gradient_compression)
    torch.manual_seed(config.train.seed)
    model = MaskRCNN(config.model, shards.manifest.num_classes)
    if initial is not None:
        wanted = model.state_dict()
        model.load_state_dict({name: value for name, value in load_file(initial).items() if name in wanted})
    if config.train.synchronise_norms:
        synchronise_norms(model)
    model.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    freeze(model, config.train.trainable_layers)
    optimizer = build_optimizer(model, config.optim)
    averaged = averaged_copy(model) if config.optim.ema_decay is not None else None
    parallel: torch.nn.Module = model
    if workers > 1:
        parallel = DistributedDataParallel(model)
        compress_gradients(parallel, config.train.gradient_compression)
    last_step = total_steps(config, make_plan(config, shards))
    started = time.monotonic()
    values = torch.zeros(1)
    for step, batches in enumerate(batches_of_rank(config, shards, rank, last_step, data)):
        on_device = [batch.to(device) for batch in batches]
        values = train_step(parallel, on_device, optimizer, config, step, last_step, dtype, scaler)
        if averaged is not None and config.optim.ema_decay is not None:
            update_average(averaged, model, step, config.optim.ema_decay)
    check_finite(values.tolist(), last_step - 1)
    seconds = time.monotonic() - started
    if rank == 0:
        judged = averaged or model
        seen = evaluate_rows(judged, validation, range(len(validation)), 8, dtype)
        metrics = average_precision(seen, len(validation), validation.manifest.num_classes)
        save_file({name: value.cpu().contiguous() for name, value in judged.state_dict().items()}, final)
        print(json.dumps({"steps": last_step, "seconds": round(seconds, 1), **metrics}))
    if workers > 1:
        torch.distributed.destroy_process_group()


def batches_of_rank(
    config: ExperimentConfig, shards: ShardSet, rank: int, last_step: int, data: PreparedData
) -> Iterator[list[Batch]]:
    """The planned batches of each step, read and augmented in this process."""
    load = LoadBlock(data.training, shards.manifest.digest, config.augment, config.train.seed)
    active = shards.manifest.active_classes()
    size, passes = config.train.batch_size_per_worker, config.train.accumulation_steps
    for step, epochs, rows in make_plan(config, shards).steps(0, last_step):
        first = rank * size * passes
        parts = []
        for start in range(first, first + size * passes, size):
            chosen = range(start, start + size)
            loaded = [load.load(shards, step * len(rows) + i, int(epochs[i]), int(rows[i])) for i in chosen]
            parts.append(collate([as_arrays(row) for row in loaded], active))
        yield parts


def as_arrays(row: dict[str, Any]) -> dict[str, Any]:
    """A loaded row with arrays for its lists, as it comes out of a block."""
    return {name: np.asarray(value) if isinstance(value, list) else value for name, value in row.items()}


def show(results: dict[str, list[dict[str, Any]]]) -> None:
    """The table, and what differs from the plain recipe by more than noise."""
    plain = [entry["segm_AP"] for entry in results[PLAIN]]
    reference = statistics.mean(plain)
    noise = 2 * statistics.stdev(plain) if len(plain) > 1 else float("nan")
    where = f"{device_name()}, torch {torch.__version__}"
    print(f"\n{where}; plain {reference:.3f}, noise {noise:.3f} ({len(plain)} seeds)")
    print("| ingredient | mask AP | against plain | box AP | seeds | verdict |\n| --- | --- | --- | --- | --- | --- |")
    for name, entries in results.items():
        if not entries:
            continue
        segm, bbox = (statistics.mean(entry[key] for entry in entries) for key in ("segm_AP", "bbox_AP"))
        verdict = "below" if segm < reference - noise else "above" if segm > reference + noise else "equal"
        print(f"| `{name}` | {segm:.3f} | {segm - reference:+.3f} | {bbox:.3f} | {len(entries)} | {verdict} |")


def device_name() -> str:
    """What the trainings ran on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    main()
