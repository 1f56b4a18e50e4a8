"""Find the objects in many images: every image exactly once, in the results or in the errors table.

    python jobs/predict.py --config configs/predict.yaml --checkpoint demo --images FOLDER --output FOLDER

The checkpoint is a checkpoint folder, a run (folder, or name in run.storage_path: its best checkpoint), the id of an
MLflow run, a registered model (models:/NAME/VERSION or models:/NAME@ALIAS), or weights of another implementation
(matterport:FILE.h5, torchvision:FILE, torchvision:NAME). Images are a folder or bucket, a COCO JSON file, a Parquet or
Arrow data set (file or folder), or shards of ours. The output's format stands in pipeline/prediction_schema.py.
The same command again goes on where it was stopped or killed. The last line printed is JSON.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from pipeline.command_line import parse, run_job, say, say_summary


def main(arguments: list[str]) -> None:
    """Parse, load the model, predict, print the counts."""
    options = parse(
        __doc__ or "",
        arguments,
        {"checkpoint": "the model", "images": "what to look at", "output": "folder or bucket that is written"},
    )

    from pipeline import cluster
    from pipeline.prediction import predict
    from pipeline.prediction_model import load_predictor

    predictor = load_predictor(options.experiment, options.checkpoint, say)  # before Ray is started: mistakes show here
    cluster.connect(options.debug)
    say_summary(predict(options.experiment, predictor, options.images, options.output, say))


if __name__ == "__main__":
    run_job(main)
