"""Check COCO data and write it as Arrow shards; jobs/train.py does the same where it has not been done.

    python jobs/prepare.py --config configs/nuclei.yaml --data.root FOLDER

The last line printed is JSON.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from pipeline.command_line import parse, run_job, say


def main(arguments: list[str]) -> None:
    """Parse, prepare, print what was made."""
    options = parse(__doc__ or "", arguments)

    from pipeline import cluster, prepare
    from pipeline.shards import read_manifest

    checked = prepare.check(options.experiment, say)  # before Ray is started: most mistakes show here
    cluster.connect(options.debug)
    data = prepare.write(options.experiment, checked, say)
    training, validation = read_manifest(data.training), read_manifest(data.validation)
    summary = {
        "training": data.training,
        "validation": data.validation,
        "training_images": training.num_rows,
        "validation_images": validation.num_rows,
        "dropped_annotations": len(training.dropped) + len(validation.dropped),
        "classes": list(training.class_names),
    }
    say(json.dumps(summary))


if __name__ == "__main__":
    run_job(main)
