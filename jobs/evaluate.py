"""COCO box and mask AP of a checkpoint on the validation images.

    python jobs/evaluate.py --config configs/demo.yaml --checkpoint demo

The checkpoint is a checkpoint folder, a run (folder, or name in run.storage_path: its best checkpoint), the id of an
MLflow run, or weights of another implementation (matterport:FILE.h5, torchvision:FILE, torchvision:NAME), whose classes
are taken by name; left out, it is model.weights. The last line printed is JSON.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from pipeline.command_line import parse, run_job, say


def main(arguments: list[str]) -> None:
    """Parse, find the weights, prepare, evaluate, print the metrics."""
    options = parse(__doc__ or "", arguments, optional={"checkpoint": "what to evaluate; by default model.weights"})
    config = options.experiment

    from pipeline import cluster, doctor, prepare
    from pipeline.inference import evaluate_model, find_weights, load_weights

    weights = find_weights(config, options.checkpoint)
    checked = prepare.check(config, say)
    model = load_weights(config, weights, checked.class_map.names, say)  # before Ray is started: mistakes show here
    cluster.connect(options.debug)
    doctor.check_at_start(config, say)
    data = prepare.write(config, checked, say)
    placement = cluster.place_workers(config.scaling, say)
    started = time.monotonic()
    metrics = evaluate_model(config, model, data, placement)
    for kind in ("bbox", "segm"):
        say("  ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name.startswith(kind)))
    seconds = round(time.monotonic() - started, 1)
    say(json.dumps({**{k: round(v, 4) for k, v in metrics.items()}, "seconds": seconds, "checkpoint": weights}))


if __name__ == "__main__":
    run_job(main)
