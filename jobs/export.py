"""Write a checkpoint as programs that run without this code: torch.export (.pt2) and ONNX.

    python jobs/export.py --config configs/demo.yaml --checkpoint demo --output exported

The checkpoint is a checkpoint folder, a run (folder, or name in run.storage_path: its best checkpoint), or the id of an
MLflow run. Each program is compared with the model before it counts. The last line printed is JSON.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from pipeline.command_line import ConfigurationError, parse, run_job, say, say_summary


def main(arguments: list[str]) -> None:
    """Parse, find the checkpoint, export, print the files."""
    options = parse(
        __doc__ or "",
        arguments,
        {
            "checkpoint": "what to export",
            "output": "folder that is made",
        },
        optional={"batch_size": "images of every call of the programs, 1 by default"},
    )
    batch_size = options.batch_size or "1"
    if not batch_size.isdigit() or int(batch_size) < 1:
        raise ConfigurationError(f"--batch_size {batch_size}: has to be a whole number of at least 1")

    from pipeline.checkpoint_reference import resolve_checkpoint
    from pipeline.export import export_checkpoint

    run = options.experiment.run
    folder = resolve_checkpoint(options.checkpoint, run.storage_path, run.mlflow_uri)
    say_summary(export_checkpoint(folder, options.output, int(batch_size), say))


if __name__ == "__main__":
    run_job(main)
