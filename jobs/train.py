"""Train Mask R-CNN; prepares the data first where that has not been done.

    python jobs/train.py --config configs/demo.yaml --run.name my-run --optim.learning_rate 0.001

The same command again goes on from the last checkpoint. The last line printed is JSON.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from pipeline.command_line import parse, run_job, say


def main(arguments: list[str]) -> None:
    """Parse, check data and initial weights, prepare, train, print the summary."""
    options = parse(__doc__ or "", arguments)
    config = options.experiment

    from pipeline import cluster, launch, prepare
    from pipeline.initial_weights import initial_weights

    summary = launch.finished_summary(config, say)
    if summary is None:
        launch.check_storage(config)
        checked = prepare.check(config, say)  # before Ray is started: most mistakes show here
        weights = initial_weights(config, checked.class_map.names, say)
        cluster.connect(options.debug)
        data = prepare.write(config, checked, say)
        summary = launch.train(config, data, weights, say)
    say(json.dumps(summary))


if __name__ == "__main__":
    run_job(main)
