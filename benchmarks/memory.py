"""Memory of a training process: peak by image size and batch, and growth over many epochs.

    python benchmarks/memory.py

Every size in a process of its own: the memory that a training step of the torchvision preset adds at most. Then 20
epochs of the demo's model on drawn shapes, an evaluation pass after each: resident memory after each epoch.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from pipeline import allocator

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 20


def peak_megabytes() -> float:
    """Most memory this process has ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_megabytes() -> float:
    """Memory this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def run_size(size: int, batch_size: int) -> None:
    """Two steps of the torchvision preset, their peak as JSON."""
    import torch

    from benchmarks import peers
    from benchmarks.results import has_bf16

    torch.set_num_threads(1)
    device = torch.device("cpu")
    ours = peers.our_model(peers.torchvision_model(device), device)
    batch = peers.make_batch(batch_size, (size, size), device)
    step = peers.our_step(ours, batch, peers.make_proposals(batch, 32), torch.bfloat16 if has_bf16() else None)
    before = resident_megabytes()
    for _ in range(2):
        step()
    print(json.dumps({"before": before, "peak": peak_megabytes()}))


def run_epochs(steps: int) -> None:
    """Epochs of so many steps and a detection pass, resident memory after each as JSON."""
    import torch
    import yaml

    from model.folded import folded
    from model.mask_rcnn import MaskRCNN
    from pipeline.config import ExperimentConfig
    from pipeline.optim import build_optimizer
    from pipeline.synthetic import draw_batch
    from pipeline.training import train_step

    torch.set_num_threads(1)
    config = ExperimentConfig.model_validate(yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text()))
    torch.manual_seed(0)
    model = MaskRCNN(config.model, num_classes=4).train()
    optimizer = build_optimizer(model, config.optim)
    after = []
    for epoch in range(EPOCHS):
        for step in range(steps):
            number = epoch * steps + step
            batch = draw_batch(range(4 * number, 4 * number + 4))
            train_step(model, [batch], optimizer, config, number, EPOCHS * steps, None)
        folded(model).detect(batch.images, batch.image_sizes)
        after.append(resident_megabytes())
    print(json.dumps({"after": after}))


def main() -> None:
    """Each size and the epochs in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 800], help="sides of the images")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4], help="images a step")
    parser.add_argument("--steps", type=int, default=20, help="of each of the 20 epochs")
    parser.add_argument("--quick", action="store_true", help="256 px and 2 images alone, 3 steps an epoch")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--one", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    allocator.restart_keeping_freed_memory()
    if options.one:
        run_epochs(options.one[0]) if len(options.one) == 1 else run_size(*options.one)
        return
    from benchmarks.results import Table, show

    def measured(*arguments: int) -> dict[str, object]:
        command = [sys.executable, __file__, "--one", *[str(argument) for argument in arguments]]
        found: dict[str, object] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        return found

    sizes, batch_sizes = ([256], [2]) if options.quick else (options.sizes, options.batch_sizes)
    rows, raw = [], {}
    for size in sizes:
        for batch_size in batch_sizes:
            found = measured(size, batch_size)
            raw[f"{size} px, batch {batch_size}"] = found
            rows.append([f"ResNet-50, {size} px, batch {batch_size}: peak", f"{found['peak']:.0f}"])
    epochs = measured(3 if options.quick else options.steps)
    after = epochs["after"]
    assert isinstance(after, list)
    rows.append([f"demo model after epoch 2 of {EPOCHS}", f"{after[1]:.0f}"])
    rows.append([f"demo model after epoch {EPOCHS}", f"{after[-1]:.0f} ({100 * (after[-1] / after[1] - 1):+.1f} %)"])
    title = "memory of a training process, one thread"
    show(Table("memory", title, ["what", "MB"], rows, {"sizes": raw, "epochs": epochs}), options.json)


if __name__ == "__main__":
    main()
