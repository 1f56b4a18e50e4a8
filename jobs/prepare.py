"""Check COCO data, report what is in them and what is wrong, and write Arrow shards; jobs/train.py does it too.

    python jobs/prepare.py --config configs/nuclei.yaml --data.root FOLDER

The last line printed is JSON.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from pipeline.command_line import parse, run_job, say, say_summary


def main(arguments: list[str]) -> None:
    """Parse, prepare, print what was made."""
    options = parse(__doc__ or "", arguments)

    from pipeline import cluster, doctor, prepare, storage
    from pipeline.preflight import PAGE
    from pipeline.shards import read_manifest

    checked = prepare.check(options.experiment, say)  # before Ray is started: most mistakes show here
    cluster.connect(options.debug)
    doctor.check_at_start(options.experiment, say)
    data = prepare.write(options.experiment, checked, say)
    training, validation = read_manifest(data.training), read_manifest(data.validation)
    summary = {
        "training": data.training,
        "validation": data.validation,
        "training_images": training.num_rows,
        "validation_images": validation.num_rows,
        "quarantined_images": training.num_quarantined[0] + validation.num_quarantined[0],
        "quarantined_annotations": training.num_quarantined[1] + validation.num_quarantined[1],
        "report": storage.join(checked.folder, PAGE),
        "classes": list(training.class_names),
    }
    say_summary(summary)


if __name__ == "__main__":
    run_job(main)
