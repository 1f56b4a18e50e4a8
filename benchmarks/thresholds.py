"""A hundred points of thresholds without training, beside single evaluations: how long, and whether they agree.

    python benchmarks/thresholds.py --config configs/nuclei.yaml --data.root FOLDER --checkpoint RUN_OR_PATH

Without a checkpoint the model is random, and finds as much as it may. One thread; Ray only where shards are to be
written first.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from model.mask_rcnn import MaskRCNN
from pipeline import cluster, prepare
from pipeline.command_line import parse, run_job, say
from pipeline.evaluation import average_precision, evaluate_rows
from pipeline.evaluation_tasks import BATCH_SIZE
from pipeline.inference import find_weights, load_weights
from pipeline.search import draw_points
from pipeline.search_space import apply_point
from pipeline.shards import ShardSet
from pipeline.space_parsing import parse_space
from pipeline.sweep_config import SweepSettings
from pipeline.threshold_sweep import point_precision, sweep_rows
from pipeline.training import autocast_dtype

NUM_POINTS, EVERY = 100, 20
SPACE = {
    "model.rpn.nms_threshold": {"uniform": [0.5, 0.9]},
    "model.rpn.pre_nms_top_k_inference": {"integer": [200, 1000]},
    "model.rpn.proposals_inference": {"integer": [50, 300]},
    "model.detections.score_threshold": {"uniform": [0.01, 0.5]},
    "model.detections.nms_threshold": {"uniform": [0.3, 0.7]},
}


def main(arguments: list[str]) -> None:
    """Prepare, evaluate once, look at all points, evaluate some of them alone."""
    options = parse(__doc__ or "", arguments, optional={"checkpoint": "what to evaluate; by default random weights"})
    config = options.experiment
    torch.set_num_threads(1)
    checked = prepare.check(config, say)
    if not checked.validation.is_there:
        cluster.connect(options.debug)
        prepare.write(config, checked, say)
    shards = ShardSet(checked.validation.folder)
    names = shards.manifest.class_names
    if options.checkpoint is None:
        torch.manual_seed(0)
        model = MaskRCNN(config.model, len(names) + 1)
    else:
        model = load_weights(config, find_weights(config, options.checkpoint), names, say)
    model.to(memory_format=torch.channels_last).eval()
    rows, dtype = range(len(shards)), autocast_dtype(config.train.precision, "cpu")
    num_classes = shards.manifest.num_classes

    def evaluate() -> dict[str, float]:
        return average_precision(evaluate_rows(model, shards, rows, BATCH_SIZE, dtype), len(rows), num_classes)

    points = draw_points(parse_space(SPACE, config), SweepSettings(max_trials=NUM_POINTS), [])
    variants = [apply_point(config, point).model for point in points]
    evaluate()  # rows are compared with their digests when first read
    started = time.monotonic()
    evaluate()
    alone = time.monotonic() - started
    started = time.monotonic()
    swept = sweep_rows(model, shards, rows, BATCH_SIZE, dtype, variants)
    metrics = [point_precision(swept, number, len(rows), num_classes) for number in range(len(points))]
    together = time.monotonic() - started
    say(f"one evaluation {alone:.1f} s, {len(points)} points {together:.1f} s: {together / alone:.2f} times")
    worst = 0.0
    for number in range(0, len(points), EVERY):
        model.config = variants[number]
        worst = max(worst, *(abs(value - metrics[number][name]) for name, value in evaluate().items()))
    say(f"largest difference of any AP, every {EVERY}th point evaluated alone: {worst:.1e}")
    best = max(range(len(points)), key=lambda number: metrics[number]["segm_AP"])
    say(f"best segm_AP {metrics[best]['segm_AP']:.4f} at {points[best]}")


if __name__ == "__main__":
    run_job(main)
