"""MLflow: the one place that owns its client. A failure here is told once and never stops a training.

The tracker is a Ray actor on the driver's node, so a sqlite file there is reached from wherever the workers run.
Workers send it rows and go on; a thread of its own writes them in batches.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

NAMESPACE = "mask-rcnn"
SHOW_GROUP = "show"  # concurrency group of the calls that set and get the progress
RUN_TAG = "mask_rcnn.run_folder"
FLUSH_SECONDS = 2.0
RETRY_SECONDS = 15.0
MAX_PENDING = 200_000  # metrics kept while a server is away
MAX_METRICS_A_CALL = 1000  # MLflow's limit
SERVING_REQUIREMENTS = (
    "torch", "torchvision", "numpy", "pillow", "pyarrow", "pydantic", "pyyaml", "safetensors", "pycocotools", "mlflow",
)  # fmt: skip
MARK_METRICS = ("loss", "segm_AP")  # the last steps of these say what a run holds already


def default_uri(storage_path: str) -> str:
    """The sqlite file of a local storage path.

    Raises:
        UserError: the storage path is a bucket, where no sqlite file can live.
    """
    if "://" in storage_path:
        raise UserError(
            f"run.storage_path {storage_path} cannot hold MLflow's sqlite file; name a server with --run.mlflow_uri"
        )
    return f"sqlite:///{os.path.abspath(storage_path)}/mlflow.db"


class Tracker:
    """Records one training in one MLflow run."""

    def __init__(self, uri: str, experiment: str, run_name: str, run_folder: str, artifacts_folder: str | None) -> None:
        # The defaults would retry for minutes while a training waits for its run to begin.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self._uri, self._experiment, self._run_name, self._run_folder = uri, experiment, run_name, run_folder
        self._artifacts_folder = artifacts_folder
        self._run_id: str | None = None
        self._marks: dict[str, int] = {}
        self._pending: list[tuple[str, float, int, int]] = []  # name, value, milliseconds, step
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._problem: str | None = None
        self._progress: dict[str, Any] = {}

    def start(self, run_id: str | None, parameters: Mapping[str, str]) -> str | None:
        """Begin or take up the run of this training.

        Args:
            run_id: of an earlier attempt, or None.
            parameters: the resolved configuration, flat; logged once.

        Returns:
            Id of the MLflow run, or None where MLflow cannot be reached.
        """
        try:
            self._run_id = self._attach(run_id, parameters)
        except Exception as error:  # MLflow, its database and the network raise many kinds
            self._say(f"MLflow at {self._uri} cannot be used ({_first_line(error)}); training goes on without it")
            return None
        threading.Thread(target=self._write_until_closed, daemon=True).start()
        return self._run_id

    def _attach(self, run_id: str | None, parameters: Mapping[str, str]) -> str:
        client = self._client()
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            experiment_id = client.create_experiment(self._experiment, artifact_location=self._artifacts_folder)
        else:
            experiment_id = experiment.experiment_id
        found = [run_id] if run_id else self._runs_of_folder(client, experiment_id)
        for known in found:
            run = client.get_run(known)
            client.update_run(known, status="RUNNING")
            for name in MARK_METRICS:
                if name in run.data.metrics:
                    self._marks[name] = max(metric.step for metric in client.get_metric_history(known, name))
            return str(known)
        run = client.create_run(experiment_id, run_name=self._run_name, tags={RUN_TAG: self._run_folder})
        from mlflow.entities import Param

        items = [Param(key, value[:6000]) for key, value in parameters.items()]
        for start in range(0, len(items), 100):
            client.log_batch(run.info.run_id, params=items[start : start + 100])
        return str(run.info.run_id)

    def _runs_of_folder(self, client: Any, experiment_id: str) -> list[str]:
        """Runs that an earlier attempt began but did not live to write down; not finished ones of a deleted folder."""
        folder = self._run_folder.replace("'", "")
        runs = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{folder}' and attributes.status = 'RUNNING'")
        return [run.info.run_id for run in runs[:1]]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a step; steps that the run holds already (it was resumed) are left out."""
        now = int(time.time() * 1000)
        mark = max((self._marks[name] for name in MARK_METRICS if name in self._marks and name in metrics), default=-1)
        if self._run_id is None or step <= mark:
            return
        # Marked also now: workers that are restarted from a checkpoint log their steps again, to this same tracker.
        self._marks |= {name: step for name in MARK_METRICS if name in metrics}
        rows = [(name, float(value), now, step) for name, value in metrics.items() if math.isfinite(value)]
        with self._lock:
            self._pending = (self._pending + rows)[-MAX_PENDING:]

    def log_picture(self, png: bytes, name: str) -> None:
        """Record a picture, as `pictures/name`."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, name)
            with open(path, "wb") as file:
                file.write(png)
            self._log_artifact(path, "pictures")

    def log_folder(self, folder: str, artifact_path: str) -> None:
        """Record the files of a local folder."""
        for name in sorted(os.listdir(folder)):
            self._log_artifact(os.path.join(folder, name), artifact_path)

    def log_text(self, text: str, name: str) -> None:
        """Record a small file."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, name)
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
            self._log_artifact(path, None)

    def log_model(self, checkpoint: str, registered_name: str | None = None) -> None:
        """Record a checkpoint as a model that MLflow can serve, see `pipeline.serving`.

        Args:
            checkpoint: local folder, without an optimiser.
            registered_name: of the model registry; None registers nothing.
        """
        if self._run_id is None:
            return
        try:
            _log_served_model(self._uri, self._run_id, checkpoint, registered_name)
        except Exception as error:
            self._say(f"MLflow: the model to serve could not be recorded ({_first_line(error)})")

    def _log_artifact(self, path: str, artifact_path: str | None) -> None:
        if self._run_id is None:
            return
        try:
            self._client().log_artifact(self._run_id, path, artifact_path)
        except Exception as error:
            self._say(f"MLflow: {os.path.basename(path)} could not be recorded ({_first_line(error)})")

    def finish(self, status: str) -> None:
        """Write what is pending and end the run: "FINISHED", "FAILED" or "KILLED"."""
        self._closed.set()
        if self._run_id is None:
            return
        try:
            self._flush()
            self._client().set_terminated(self._run_id, status)
        except Exception as error:
            self._say(f"MLflow: the end of the run could not be recorded ({_first_line(error)})")

    def set_progress(self, progress: dict[str, Any]) -> None:
        """Where the training is, for the driver to show."""
        self._progress = progress

    def get_progress(self) -> dict[str, Any]:
        """The latest progress, and the latest problem with MLflow."""
        return {**self._progress, "problem": self._problem}

    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self._uri)

    def _write_until_closed(self) -> None:
        pause = FLUSH_SECONDS
        while not self._closed.wait(pause):
            try:
                self._flush()
                pause = FLUSH_SECONDS
            except Exception as error:
                self._say(
                    f"MLflow at {self._uri} does not answer ({_first_line(error)}); metrics are kept and tried again"
                )
                pause = RETRY_SECONDS

    def _flush(self) -> None:
        """Write pending metrics; what could not be written stays pending."""
        from mlflow.entities import Metric

        with self._writing:
            client = self._client()
            while True:
                with self._lock:
                    batch = self._pending[:MAX_METRICS_A_CALL]
                if not batch:
                    return
                client.log_batch(self._run_id, metrics=[Metric(*row) for row in batch])
                with self._lock:
                    self._pending = self._pending[len(batch) :]

    def _say(self, text: str) -> None:
        self._problem = text


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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


def _log_served_model(uri: str, run_id: str, checkpoint: str, registered_name: str | None) -> None:
    import mlflow.pyfunc
    from mlflow.models import Model

    root = Path(__file__).resolve().parents[1]
    mlflow.set_tracking_uri(uri)
    Model.log(
        artifact_path=None,
        name="model",
        flavor=mlflow.pyfunc,
        run_id=run_id,
        loader_module="pipeline.serving",
        data_path=checkpoint,
        code_paths=[str(root / "pipeline"), str(root / "model")],
        pip_requirements=[f"{name}=={version(name)}" for name in SERVING_REQUIREMENTS],
        registered_model_name=registered_name,
    )


def download_model(reference: str, uri: str) -> str:
    """Local folder with the checkpoint of a model of the registry, or of one that a run has logged.

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
        folder = mlflow.artifacts.download_artifacts(reference, dst_path=tempfile.mkdtemp(prefix="model-"))
    except (MlflowException, OSError) as error:
        raise UserError(f"{reference} at {uri}: {_first_line(error)}") from error
    for place, _, names in os.walk(folder):
        if "checkpoint.json" in names:
            return str(place)
    raise UserError(f"{reference} at {uri}: holds no checkpoint of ours")


def download_checkpoint(run_id: str, uri: str) -> str:
    """Local folder with the best checkpoint of an MLflow run.

    Raises:
        UserError: no such run, or it has no checkpoint.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(uri)
    folder = tempfile.mkdtemp(prefix="checkpoint-")
    for artifact_path in ("best_checkpoint", "last_checkpoint"):
        try:
            if client.list_artifacts(run_id, artifact_path):
                return str(client.download_artifacts(run_id, artifact_path, folder))
        except MlflowException as error:
            raise UserError(f"MLflow run {run_id} at {uri}: {_first_line(error)}") from error
    raise UserError(f"MLflow run {run_id} at {uri}: has no checkpoint")
