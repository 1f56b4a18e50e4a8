"""MLflow: the one place that owns its client. A failure here is told once and never stops a training.

The tracker is a Ray actor on the driver's node, so a sqlite file there is reached from wherever the workers run.
Workers send it rows and go on; a thread of its own writes them in batches.
"""

from __future__ import annotations

import base64
import importlib.metadata
import logging
import math
import os
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from pipeline.errors import UserError
from pipeline.findings import Finding, fix, well

NAMESPACE = "mask-rcnn"
SHOW_GROUP = "show"  # concurrency group of the calls that set and get the progress
BEST_CHECKPOINT, LAST_CHECKPOINT = "best_checkpoint", "last_checkpoint"
RUN_TAG = "mask_rcnn.run_folder"
PARENT_TAG = "mlflow.parentRunId"
FLUSH_SECONDS = 2.0
RETRY_SECONDS = 15.0
SERVER_SECONDS = 5.0
MAX_PENDING = 200_000  # metrics kept while a server is away
MAX_METRICS_A_CALL = 1000  # MLflow's limit
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


def server_finding(uri: str) -> Finding:
    """Whether MLflow can be used: its server answers and is of our version, or a sqlite file is on this node's disk."""
    ours = importlib.metadata.version("mlflow")  # importing it would take seconds
    if not uri.startswith(("http://", "https://")):
        return well("mlflow", f"{uri}, on the driver's node (MLflow {ours})")
    try:
        request = urllib.request.Request(f"{uri.rstrip('/')}/version", headers=_credentials())
        with urllib.request.urlopen(request, timeout=SERVER_SECONDS) as answer:
            theirs = answer.read(100).decode().strip()
    except (OSError, ValueError) as error:
        return fix(
            "mlflow", f"{uri} does not answer ({_first_line(error)}); see to run.mlflow_uri, or start the server"
        )
    if theirs.split(".")[0] != ours.split(".")[0]:
        return fix("mlflow", f"{uri} is MLflow {theirs}, here it is {ours}; give the server the same major version")
    return well("mlflow", f"{uri} answers, MLflow {theirs} there and {ours} here")


def _credentials() -> dict[str, str]:
    """Of the environment, as MLflow's own client sends them."""
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    if user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        both = f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
        return {"Authorization": f"Basic {base64.b64encode(both.encode()).decode()}"}
    return {}


class Tracker:
    """Records one training in one MLflow run."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        run_folder: str,
        artifacts_folder: str | None,
        parent_run_id: str | None = None,
    ) -> None:
        # The defaults would retry for minutes while a training waits for its run to begin.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self._uri, self._experiment, self._run_name, self._run_folder = uri, experiment, run_name, run_folder
        self._artifacts_folder = artifacts_folder
        self._tags = {RUN_TAG: run_folder, **({PARENT_TAG: parent_run_id} if parent_run_id else {})}
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
        run = client.create_run(experiment_id, run_name=self._run_name, tags=self._tags)
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

    def link(self) -> str | None:
        """Where a person sees the run, None where there is none."""
        if self._run_id is None:
            return None
        try:
            experiment_id = self._client().get_run(self._run_id).info.experiment_id
        except Exception:  # a server that is away for the moment; the tracker tells when it stays away
            return None
        place = f"/#/experiments/{experiment_id}/runs/{self._run_id}"
        if self._uri.startswith(("http://", "https://")):
            return self._uri.rstrip("/") + place
        return f"http://127.0.0.1:5000{place} after `make mlflow`"

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


class SweepRecord:
    """The MLflow run of a sweep, and what the runs of its trials are told; a failure is said and stops nothing."""

    def __init__(self, uri: str, experiment: str, artifacts_folder: str | None, say: Callable[[str], None]) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells that it makes its tables
        self._uri, self._experiment, self._artifacts_folder, self._say = uri, experiment, artifacts_folder, say

    def begin(
        self, known: str | None, name: str, run_folder: str, parameters: Mapping[str, str], parent: str | None = None
    ) -> str | None:
        """Take up a run, or begin one.

        Args:
            known: id of the run where it was begun before.
            name: of the run.
            run_folder: by which a run is found that was begun but not written down.
            parameters: logged once.
            parent: run that it is a child of.

        Returns:
            Its id, None where MLflow cannot be reached.
        """
        run_id: str | None = self._try(
            f"{name} could not be recorded", partial(self._begin, known, name, run_folder, parameters, parent)
        )
        return run_id

    def _begin(
        self, known: str | None, name: str, run_folder: str, parameters: Mapping[str, str], parent: str | None
    ) -> str:
        from mlflow.entities import Param

        client = self._client()
        experiment = client.get_experiment_by_name(self._experiment)
        experiment_id = (
            experiment.experiment_id
            if experiment is not None
            else client.create_experiment(self._experiment, artifact_location=self._artifacts_folder)
        )
        quote = '"' if "'" in run_folder else "'"
        wanted = f"tags.`{RUN_TAG}` = {quote}{run_folder}{quote} and attributes.status = 'RUNNING'"
        found = [known] if known else [run.info.run_id for run in client.search_runs([experiment_id], wanted)][:1]
        if found:
            client.update_run(found[0], status="RUNNING")
            return str(found[0])
        tags = {RUN_TAG: run_folder, **({PARENT_TAG: parent} if parent else {})}
        run_id = str(client.create_run(experiment_id, run_name=name, tags=tags).info.run_id)
        items = [Param(key, value[:6000]) for key, value in parameters.items()]
        for start in range(0, len(items), 100):
            client.log_batch(run_id, params=items[start : start + 100])
        return run_id

    def log_series(self, run_id: str, rows: Sequence[Mapping[str, float]]) -> None:
        """Record metrics of points, the number of a point as its step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for step, row in enumerate(rows) for name, value in row.items()]
        for start in range(0, len(metrics), MAX_METRICS_A_CALL):
            part = metrics[start : start + MAX_METRICS_A_CALL]
            self._try("metrics could not be recorded", partial(self._call, "log_batch", run_id, metrics=part))

    def log_files(self, run_id: str, files: Mapping[str, bytes]) -> None:
        """Record small files by their path in the run."""
        with tempfile.TemporaryDirectory() as scratch:
            for path, content in files.items():
                folder, name = os.path.split(path)
                local = os.path.join(scratch, name)
                with open(local, "wb") as file:
                    file.write(content)
                self.log_file(run_id, local, folder)

    def log_file(self, run_id: str, path: str, folder: str) -> None:
        """Record a local file in a folder of the run, "" for its top."""
        problem = f"{os.path.basename(path)} could not be recorded"
        self._try(problem, partial(self._call, "log_artifact", run_id, path, folder or None))

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        for key, value in tags.items():
            self._try("a tag could not be set", partial(self._call, "set_tag", run_id, key, value[:5000]))

    def end(self, run_id: str, status: str) -> None:
        """End a run: "FINISHED", "FAILED" or "KILLED"."""
        self._try("the end could not be recorded", partial(self._call, "set_terminated", run_id, status))

    def _call(self, name: str, *arguments: Any, **more: Any) -> Any:
        return getattr(self._client(), name)(*arguments, **more)

    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self._uri)

    def _try(self, problem: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # MLflow, its database and the network raise many kinds
            self._say(f"warning: MLflow at {self._uri}: {problem} ({_first_line(error)})")
            return None


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


def download_checkpoint(run_id: str, uri: str) -> str:
    """Local folder with the best checkpoint of an MLflow run.

    Raises:
        UserError: no such run, or it has no checkpoint.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(uri)
    folder = tempfile.mkdtemp(prefix="checkpoint-")
    for artifact_path in (BEST_CHECKPOINT, LAST_CHECKPOINT):
        try:
            if client.list_artifacts(run_id, artifact_path):
                return str(client.download_artifacts(run_id, artifact_path, folder))
        except MlflowException as error:
            raise UserError(f"MLflow run {run_id} at {uri}: {_first_line(error)}") from error
    raise UserError(f"MLflow run {run_id} at {uri}: has no checkpoint")
