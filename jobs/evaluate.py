"""COCO box and mask AP of a checkpoint on the validation images, and a page that shows where it fails.

    python jobs/evaluate.py --checkpoint own_data
    python jobs/evaluate.py --checkpoint own_data --data.root ELSEWHERE
    python jobs/evaluate.py --config configs/torchvision_v2.yaml --checkpoint torchvision:FILE --data.root FOLDER
    python jobs/evaluate.py --config configs/demo.yaml --predictions FOLDER

The checkpoint is a checkpoint folder, a run (folder, or name in run.storage_path: its best checkpoint), the id of an
MLflow run, a registered model (models:/NAME/VERSION), or weights of another implementation (matterport:FILE.h5,
torchvision:FILE, torchvision:NAME), whose classes are taken by name; left out, it is model.weights. Predictions are an
output of jobs/predict.py.

A checkpoint of ours is evaluated with the configuration and the data of its training, and with what keys of the command
line change of these (a fraction that was kept back to validate on is kept back of other data too). With --config that
configuration counts instead; data.root is still that of the training where nothing names one. A line tells whose
configuration and data it is.

report.html, report.json and an MLflow run hold AP by class and size, curves, confusion, kinds of errors, calibration
and the worst images; of LVIS's annotations its own protocol too. The last line printed is JSON.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from pipeline.command_line import (
    ConfigurationError,
    asks_for_help,
    options_given,
    parse,
    run_job,
    say,
    say_summary,
)


def main(arguments: list[str]) -> None:
    """Find the training, parse on top of it, find the weights, prepare, evaluate, report, print the metrics."""
    optional = {
        "checkpoint": "what to evaluate; by default model.weights",
        "predictions": "an output of jobs/predict.py to evaluate instead",
        "output": "folder of the report; by default one below run.storage_path",
    }
    training = None
    named = options_given(arguments, "checkpoint", "model.weights") and not options_given(arguments, "predictions")
    if named and not asks_for_help(arguments):
        from pipeline.evaluation_subject import find_training

        training = find_training(arguments)
    options = parse(__doc__ or "", arguments, optional=optional, base=training.base if training else None)
    config = options.experiment
    if options.checkpoint and options.predictions:
        raise ConfigurationError("--checkpoint and --predictions: only one of them can be evaluated")

    from pipeline import cluster, doctor, evaluation_report, prepare, storage
    from pipeline.earlier_predictions import match_keys, read_manifest
    from pipeline.evaluation import average_precision, proposal_recall
    from pipeline.evaluation_subject import basis, check_data_known, title_of
    from pipeline.evaluation_tasks import evaluate_model, evaluate_predictions
    from pipeline.inference import find_weights, load_weights
    from pipeline.shards import ShardSet

    started_from: str
    if options.predictions:
        started_from = storage.absolute(options.predictions)
        read_manifest(started_from)
    else:
        started_from = training.checkpoint if training else find_weights(config, options.checkpoint)
    say(f"evaluate: {title_of(started_from)}: {basis(config, training, arguments)}")
    check_data_known(config, training, started_from, arguments)
    checked = prepare.check(config, say)
    if not options.predictions:  # before Ray is started: mistakes show here
        model = load_weights(config, started_from, checked.class_map.names, say)
    cluster.connect(options.debug)
    placement = cluster.place_workers(config.scaling, say)
    doctor.check_at_start(config, say)  # when the nodes are there
    validation = prepare.write(config, checked, say).validation
    shards = ShardSet(validation)
    started = time.monotonic()
    if options.predictions:
        rows = evaluate_predictions(config, started_from, validation, match_keys(started_from, shards, say))
    else:
        rows = evaluate_model(config, model, validation, placement)
    metrics = average_precision(rows, len(shards), shards.manifest.num_classes) | proposal_recall(rows)
    for kind in ("bbox", "segm"):
        say(evaluation_report.metrics_line(metrics, kind))
    seconds = round(time.monotonic() - started, 1)
    further = evaluation_report.report(config, rows, shards, metrics, started_from, options.output, say)
    summary = {**{k: round(v, 4) for k, v in metrics.items()}, "seconds": seconds, "checkpoint": started_from}
    say_summary({**summary, **further})


if __name__ == "__main__":
    run_job(main)
