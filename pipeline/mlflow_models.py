"""Models in MLflow: logged so that it can serve them, and brought back."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.checkpoint import build_model, write_checkpoint
from pipeline.errors import UserError
from pipeline.mlflow_runs import first_line

BEST_CHECKPOINT, LAST_CHECKPOINT = "best_checkpoint", "last_checkpoint"
SERVING_REQUIREMENTS = (
    "torch", "torchvision", "numpy", "pillow", "pyarrow", "pydantic", "pyyaml", "safetensors", "pycocotools", "mlflow",
)  # fmt: skip


def served_models(client: Any, run_id: str) -> list[str]:
    """Ids of the models that a run has logged."""
    outputs = client.get_run(run_id).outputs
    return [output.model_id for output in outputs.model_outputs] if outputs else []


def log_served_model(uri: str, run: Any, checkpoint: str) -> None:
    """Log the weights that a checkpoint is judged by, without its optimiser, and the code that serves them."""
    import mlflow.pyfunc
    from mlflow.models import Model

    root = Path(__file__).resolve().parents[1]
    mlflow.set_tracking_uri(uri)
    # Else it goes to the default experiment, whose artifacts lie below the working directory.
    mlflow.set_experiment(experiment_id=run.experiment_id)
    model, description = build_model(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, model, None, description)
        Model.log(
            artifact_path=None,
            name="model",
            flavor=mlflow.pyfunc,
            run_id=run.run_id,
            loader_module="pipeline.serving",
            data_path=folder,
            code_paths=[str(root / "pipeline"), str(root / "model")],
            pip_requirements=[f"{name}=={version(name)}" for name in SERVING_REQUIREMENTS],
        )


def download_model(reference: str, uri: str) -> str:
    """Local folder, for as long as this process runs, with the checkpoint of a model of the registry or of a run.

    Args:
        reference: `models:/NAME/VERSION`, `models:/NAME@ALIAS` or `models:/ID`.
        uri: tracking server or store.

    Raises:
        UserError: there is none, or it was not logged by us.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    mlflow.set_tracking_uri(uri)
    try:
        folder = mlflow.artifacts.download_artifacts(reference, dst_path=_folder_of_this_process("model-"))
    except (MlflowException, OSError) as error:
        raise UserError(f"{reference} at {uri}: {first_line(error)}") from error
    for place, _, names in os.walk(folder):
        if "checkpoint.json" in names:
            return str(place)
    raise UserError(f"{reference} at {uri}: holds no checkpoint of ours")


def _folder_of_this_process(prefix: str) -> str:
    """A temporary folder that goes when the process ends: a checkpoint is hundreds of megabytes."""
    folder = tempfile.mkdtemp(prefix=prefix)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def download_checkpoint(run_id: str, uri: str) -> str:
    """Local folder with the best checkpoint of an MLflow run, for as long as this process runs.

    Raises:
        UserError: no such run, or it has no checkpoint.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(uri)
    folder = _folder_of_this_process("checkpoint-")
    for artifact_path in (BEST_CHECKPOINT, LAST_CHECKPOINT):
        try:
            if client.list_artifacts(run_id, artifact_path):
                return str(client.download_artifacts(run_id, artifact_path, folder))
        except MlflowException as error:
            raise UserError(f"MLflow run {run_id} at {uri}: {first_line(error)}") from error
    raise UserError(f"MLflow run {run_id} at {uri}: has no checkpoint")
