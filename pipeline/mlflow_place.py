"""Where MLflow records, and where it keeps files, by a configuration."""

from __future__ import annotations

from pathlib import Path

from pipeline import storage
from pipeline.config import ExperimentConfig
from pipeline.mlflow_runs import default_uri


def tracking_uri(config: ExperimentConfig) -> str:
    """Where MLflow records.

    Raises:
        UserError: run.storage_path is a bucket and no server is named.
    """
    return config.run.mlflow_uri or default_uri(storage.absolute(config.run.storage_path))


def artifacts_folder(config: ExperimentConfig) -> str | None:
    """Where a new experiment keeps its artifacts: beside the sqlite file; None with a server, which has a place."""
    storage_path = storage.absolute(config.run.storage_path)
    if not tracking_uri(config).startswith("sqlite:") or storage.is_url(storage_path):
        return None
    Path(storage_path).mkdir(parents=True, exist_ok=True)
    return (Path(storage_path) / "mlflow-artifacts").as_uri()
