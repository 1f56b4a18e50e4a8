"""Train Mask R-CNN; prepares the data first where that has not been done.

    python jobs/train.py --config configs/demo.yaml --run.name my-run --optim.learning_rate 0.001

The same command again goes on from the last checkpoint. --smoke trains ten steps first, as a run of its own, and tells
how long all would take; --register NAME puts the result into MLflow's registry, as champion if it is better than the
present one. The last line printed is JSON.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from pipeline.command_line import ConfigurationError, parse, run_job, say, say_summary


def main(arguments: list[str]) -> None:
    """Parse, check data and initial weights, prepare, train, print the summary."""
    options = parse(
        __doc__ or "",
        arguments,
        optional={"register": "name of a registered model that the result becomes a version of"},
        flags={"smoke": "train ten steps on the real data and cluster, as the run NAME-smoke, and tell the whole time"},
    )
    config = real = options.experiment
    if options.smoke and options.register:
        raise ConfigurationError("--register: a smoke test gives nothing to register; leave one of them out")

    from pipeline import cluster, launch, prepare, smoke
    from pipeline.initial_weights import initial_weights

    if options.smoke:
        config = smoke.smoke_config(config)
        smoke.forget_last_smoke(config)
    summary = launch.finished_summary(config, say, with_data=True)
    if summary is None:
        launch.check_storage(config)
        checked = prepare.check(config, say)  # before Ray is started: most mistakes show here
        weights = initial_weights(config, checked.class_map.names, say)
        cluster.connect(options.debug)
        data = prepare.write(config, checked, say)
        summary = launch.train(config, data, weights, say)
        if options.smoke:
            say(smoke.forecast(real, data, summary))
    if options.register:
        summary = {**summary, **launch.register(config, options.register, summary, say)}
    say_summary(summary)


if __name__ == "__main__":
    run_job(main)
