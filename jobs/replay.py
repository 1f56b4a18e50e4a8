"""Compute a step again whose loss or gradient was not finite, and say where that begins.

    python jobs/replay.py --step_file runs/my-run/nonfinite/step-120.json

The record, the batches and the weights beside it are all it needs; --precision fp32 computes in another arithmetic than
the training did. The last line printed is JSON.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from pipeline.command_line import run_job, say, say_summary


def main(arguments: list[str]) -> None:
    """Read the record, compute each worker's part, print what is not finite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step_file", required=True, help="step-N.json in a run's folder nonfinite")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="in place of the training's")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    options = parser.parse_args(arguments)

    from pipeline.replay import replay

    outcome = replay(options.step_file, options.precision)
    for worker in outcome["workers"]:
        ids = ", ".join(str(image_id) for image_id in worker["image_ids"])
        say(f"worker {worker['rank']}, images {ids}:")
        for name, value in {**worker["losses"], **worker["gradient_norms"]}.items():
            mark = "" if math.isfinite(value) else "   <- not finite"
            say(f"  {name:28s} {value:12.5g}{mark}")
        if worker["first_bad_gradient"]:
            say(f"  the gradient is not finite from {worker['first_bad_gradient']} on, backwards")
    say_summary({key: outcome[key] for key in ("step", "is_finite", "same_losses")})


if __name__ == "__main__":
    run_job(main)
