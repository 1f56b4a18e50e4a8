"""Search for good values of any keys: each trial a training, or thresholds of one checkpoint without training.

    python jobs/tune.py --config configs/sweep_anchors.yaml

The section `sweep` says what is varied, how, and for how long; the other sections are the training that is varied.
The same command again goes on. The best configuration is left as best.yaml, which jobs/train.py takes. The last line
printed is JSON.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from pipeline.command_line import parse, run_job, say, say_summary
from pipeline.space_parsing import check_search, parse_space
from pipeline.sweep_config import SweepConfig


def main(arguments: list[str]) -> None:
    """Parse, check the space, run what is left of the sweep, print the summary."""
    options = parse(__doc__ or "", arguments, config_type=SweepConfig)
    config: SweepConfig = options.experiment
    space = parse_space(config.sweep.space, config.base())  # before anything is imported or started: in a second
    check_search(space, config.sweep, config.base())

    from pipeline import launch, sweep, sweep_state, threshold_job

    summary = sweep_state.finished_summary(config, say)
    if summary is None:
        launch.check_storage(config)
        run = sweep.run if config.sweep.checkpoint is None else threshold_job.run
        summary = run(config, space, options.debug, say)
    say_summary(summary)


if __name__ == "__main__":
    run_job(main)
