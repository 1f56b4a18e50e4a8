"""What the parts of a training step cost: the demo's model and batch, one thread, variants interleaved, medians.

    python benchmarks/step.py

Ratios are CPU time (GPU: wall time) of a variant over that of the default: more than 1 is slower.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from model.mask_rcnn import MaskRCNN
from pipeline import allocator
from pipeline.config import ExperimentConfig
from pipeline.optim import build_optimizer
from pipeline.synthetic import draw_batch
from pipeline.training import autocast_dtype, train_step

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_STEPS = 60  # untrained models have few positives and look fast


def main() -> None:
    """Warm a model up, then time each variant in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timings of each variant")
    options = parser.parse_args()
    allocator.restart_keeping_freed_memory()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = ExperimentConfig.model_validate(yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text()))
    size = config.train.batch_size_per_worker
    batches = [draw_batch(range(first, first + size)).to(device) for first in range(0, 8 * size, size)]
    torch.manual_seed(0)
    model = MaskRCNN(config.model, num_classes=4)
    model.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = build_optimizer(model, config.optim)
    default = autocast_dtype("auto", device.type)

    def step(number: int, dtype: torch.dtype | None = default) -> None:
        train_step(model, [batches[number % len(batches)]], optimizer, config, number % 100, 1000, dtype)
        if device.type == "cuda":
            torch.cuda.synchronize()

    def step_with_operator(number: int) -> None:
        with mock.patch("model.roi_align.has_sparse_product", return_value=False):
            step(number)

    variants: dict[str, Callable[[int], None]] = {
        f"default ({default or torch.float32}, sparse ROIAlign)": step,
        "torchvision's ROIAlign operator, RPN losses from the whole pyramid": step_with_operator,
        "fp32": lambda number: step(number, None),
    }
    for number in range(WARM_UP_STEPS):
        step(number)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(options.rounds):
        for name, run in variants.items():
            started = clock()
            run(number)
            seconds[name].append(clock() - started)
    reference = statistics.median(next(iter(seconds.values())))
    print(f"training step, {size} images of 128 px, {device.type}, one thread, medians of {options.rounds}")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:48s} {1000 * median:8.1f} ms  {size / median:6.1f} images/s  x {median / reference:.2f}")


if __name__ == "__main__":
    main()
