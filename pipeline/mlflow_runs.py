"""Runs of an MLflow store: where it is, and how a run in it is found, begun and described."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError

RUN_TAG, JOURNAL_TAG, PARENT_TAG = "mask_rcnn.run_folder", "mask_rcnn.journal", "mlflow.parentRunId"
DATABASE = "mlflow.db"
MAX_METRICS_A_CALL = 1000  # MLflow's limit
MAX_PARAMETERS_A_CALL = 100
MAX_PARAMETER_LENGTH = 6000


def default_uri(storage_path: str) -> str:
    """The sqlite file of a local storage path.

    Raises:
        UserError: the storage path is a bucket, where no sqlite file can live.
    """
    if "://" in storage_path:
        raise UserError(
            f"run.storage_path {storage_path} cannot hold MLflow's sqlite file; name a server with --run.mlflow_uri"
        )
    return f"sqlite:///{os.path.abspath(storage_path)}/{DATABASE}"


def find_experiment(client: Any, name: str, artifacts_folder: str | None) -> str:
    """Of the experiment of this name, which is made where there is none."""
    experiment = client.get_experiment_by_name(name)
    return str(experiment.experiment_id if experiment else client.create_experiment(name, artifacts_folder))


def log_parameters(client: Any, run_id: str, parameters: Mapping[str, str]) -> None:
    """Record parameters, long values cut off, as many at a time as MLflow takes."""
    from mlflow.entities import Param

    items = [Param(key, value[:MAX_PARAMETER_LENGTH]) for key, value in parameters.items()]
    for start in range(0, len(items), MAX_PARAMETERS_A_CALL):
        client.log_batch(run_id, params=items[start : start + MAX_PARAMETERS_A_CALL])


def run_if_there(client: Any, run_id: str | None) -> Any:
    """The run of this id, None without an id or where it is gone."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def run_with_tag(client: Any, experiment_id: str, tag: str, value: str, further: str | None = None) -> Any:
    """The latest run of an experiment with this tag, None where there is none."""
    quote = '"' if "'" in value else "'"
    wanted = [f"tags.`{tag}` = {quote}{value}{quote}", *([further] if further else [])]
    return next(iter(client.search_runs([experiment_id], " and ".join(wanted), max_results=1)), None)


def run_of_folder(client: Any, experiment_id: str, run_folder: str, further: str, parameters: Mapping[str, str]) -> Any:
    """The latest run of a folder; None without one, and where it has other parameters: the folder was deleted since."""
    run = run_with_tag(client, experiment_id, RUN_TAG, run_folder, further)
    logged = {key: value[:MAX_PARAMETER_LENGTH] for key, value in parameters.items()}
    if run is None or any(run.data.params.get(key, value) != value for key, value in logged.items()):
        return None
    return run


def answers(client: Any) -> bool:
    """Whether MLflow itself is there, so that a failed upload is the fault of its artifact store."""
    try:
        client.search_experiments(max_results=1)
    except Exception:  # of MLflow, its database or the network: whatever it is, MLflow is not there
        return False
    return True


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested configuration as flat parameters with dotted names."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = str(value)
    return flat


def first_line(error: Exception) -> str:
    """What an error says, short enough for one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
