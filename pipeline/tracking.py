"""A training in MLflow. A failure here is told once and never stops a training.

The tracker is a Ray actor on the driver's node, so a sqlite file there is reached from wherever the workers run.
Workers send it rows and go on. It writes them to a journal on its disk, and a thread of its own delivers the journal to
MLflow: in order, from where it was left, whenever MLflow answers, also after the death of everybody concerned. A record
that may have arrived is sent again as it was, and MLflow's stores keep the same number of the same moment once.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.checkpoint_store import local_folder
from pipeline.errors import UserError
from pipeline.journal import Journal, Record
from pipeline.mlflow_models import log_served_model, served_models
from pipeline.mlflow_runs import (
    DATABASE,
    JOURNAL_TAG,
    MAX_METRICS_A_CALL,
    PARENT_TAG,
    RUN_TAG,
    answers,
    find_experiment,
    first_line,
    log_parameters,
    run_if_there,
    run_of_folder,
    run_with_tag,
)

NAMESPACE = "mask-rcnn"
RUNS = Path(__file__).resolve().parents[1] / "runs"  # whose pages `make ui` shows
SHOW_GROUP = "show"  # concurrency group of the calls that set and get the progress
FLUSH_SECONDS = 2.0
RETRY_SECONDS = 10.0
ARTIFACT_ATTEMPTS = 3
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # what sending again does not mend


def journal_folder(run_folder: str) -> str:
    """Where this machine keeps what MLflow is to be told: with the run, unless that is in a bucket."""
    if not storage.is_url(run_folder):
        return os.path.join(run_folder, "tracking")
    name = hashlib.sha256(run_folder.encode()).hexdigest()[:16]
    return os.path.join(tempfile.gettempdir(), "mask-rcnn-tracking", name)


class Tracker:
    """Records one training in one MLflow run."""

    def __init__(self, uri: str, experiment: str, run_name: str, run_folder: str, artifacts_folder: str | None) -> None:
        """Open the journal; nothing is sent yet.

        Args:
            uri: of MLflow.
            experiment: its name.
            run_name: name of the run in MLflow.
            run_folder: path or URL of what is recorded, which the run is found again by.
            artifacts_folder: where an experiment that has to be made keeps its artifacts, None for MLflow's choice.
        """
        # The defaults would wait for minutes; the journal's next delivery is the retry.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self._uri, self._experiment, self._run_name, self._run_folder = uri, experiment, run_name, run_folder
        self._artifacts_folder = artifacts_folder
        self._known_run_id: str | None = None
        self._parameters: dict[str, str] = {}
        self._journal = Journal(journal_folder(run_folder))
        self._journalled: dict[str, set[int]] = {}  # steps, by the first name of their metrics
        self._has_parameters = False
        self._parent_run_id: str | None = None
        for _, record in self._journal.records():
            if record["kind"] == "metrics":
                self._journalled.setdefault(next(iter(record["metrics"])), set()).add(record["step"])
            self._has_parameters |= record["kind"] == "parameters"
            self._parent_run_id = record["run_id"] if record["kind"] == "parent" else self._parent_run_id
        self._held: dict[str, int] = {}  # last step of each metric that a run from before this journal holds
        self._run_id: str | None = None
        self._experiment_id: str | None = None
        self._attached = threading.Event()
        self._delivering, self._closed = threading.Lock(), threading.Event()
        self._deliverer = threading.Thread(target=self._deliver_until_closed, daemon=True)
        self._failed_attempts = 0
        self._problem: str | None = None
        self._notices: list[str] = []
        self._progress: dict[str, Any] = {}

    def start(
        self,
        run_id: str | None,
        parameters: Mapping[str, str],
        seconds: float = 10.0,
        parent_run_id: str | None = None,
    ) -> str | None:
        """Begin or take up the run of this training, and deliver from now on.

        Args:
            run_id: of an earlier attempt, or None.
            parameters: the resolved configuration, flat; logged once.
            seconds: to wait at most for MLflow.
            parent_run_id: of the run that this one is shown in.

        Returns:
            Id of the MLflow run, or None where it has not answered so far.
        """
        self._known_run_id, self._parameters = run_id, dict(parameters)
        if not self._has_parameters:
            self._has_parameters = True
            self._append({"kind": "parameters", "parameters": dict(parameters)})
        if parent_run_id is not None and parent_run_id != self._parent_run_id:
            self._parent_run_id = parent_run_id
            self._append({"kind": "parent", "run_id": parent_run_id})
        self._append({"kind": "begin"})
        self._deliverer.start()
        return self.run_id(seconds)

    def run_id(self, seconds: float = 0.0) -> str | None:
        """Id of the MLflow run, None where MLflow has not answered within so many seconds."""
        self._attached.wait(seconds)
        return self._run_id or self._journal.mark.run_id

    def link(self) -> str | None:
        """Where a person sees the run, None as long as MLflow has not answered, and where it has no page to name."""
        if self._run_id is None or self._experiment_id is None:
            return None
        # MLflow shows what it has for language models unless it is told otherwise.
        place = f"/#/experiments/{self._experiment_id}/runs/{self._run_id}?workflowType=machine_learning"
        if self._uri.startswith(("http://", "https://")):
            return self._uri.rstrip("/") + place
        database = Path(self._uri.removeprefix("sqlite:///"))
        if not self._uri.startswith("sqlite:///") or database.name != DATABASE:
            return None
        command = "make ui" if database.parent == RUNS else f"make ui RUNS={database.parent}"
        return f"http://127.0.0.1:5000{place} after `{command}`"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a step; see `log_rows`."""
        self.log_rows([(step, metrics)])

    def log_rows(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Record metrics of steps; those of a step that came before are left out (a training goes over it again).

        Args:
            rows: step, and its metrics by name; those that are logged together begin with the same name.
        """
        now = int(time.time() * 1000)
        for step, metrics in rows:
            steps = self._journalled.setdefault(next(iter(metrics)), set())
            if step in steps:
                continue
            steps.add(step)
            finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
            if finite:
                self._append({"kind": "metrics", "step": step, "time": now, "metrics": finite})

    def log_picture(self, png: bytes, name: str) -> None:
        """Record a picture, as `pictures/name`."""
        self._append_file(png, name, "pictures")

    def log_text(self, text: str, name: str) -> None:
        """Record a small file."""
        self._append_file(text.encode(), name, None)

    def log_model(self, checkpoint: str) -> None:
        """Record a checkpoint as a model that MLflow can serve, see `pipeline.serving`.

        Args:
            checkpoint: local folder or URL, which has to stay.
        """
        self._append({"kind": "model", "folder": checkpoint, "name": "the model to serve"})

    def log_folder(self, folder: str, artifact_path: str) -> None:
        """Record the files of a local folder, or of a checkpoint in a bucket, which has to stay."""
        if storage.is_url(folder):
            self._append({"kind": "folder", "folder": folder, "to": artifact_path})
            return
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            self._problem = f"MLflow: {artifact_path} could not be recorded ({error})"
            return
        for name in names:
            self._keep(partial(self._journal.keep_copy, os.path.join(folder, name)), name, artifact_path)

    def _append_file(self, content: bytes, name: str, to: str | None) -> None:
        self._keep(lambda: self._journal.keep_file(content, name), name, to)

    def _keep(self, keep: Callable[[], str], name: str, to: str | None) -> None:
        try:
            self._append({"kind": "file", "file": keep(), "name": name, "to": to})
        except OSError as error:
            self._problem = f"{self._journal.folder}: {name} could not be kept ({first_line(error)})"

    def _append(self, record: Record) -> None:
        try:
            self._journal.append(record)
        except OSError as error:
            self._problem = f"{self._journal.folder}: what MLflow is to be told could not be kept ({error})"

    def finish(self, status: str, seconds: float = 60.0) -> None:
        """End the run as "FINISHED", "FAILED" or "KILLED", and wait for the delivery.

        Args:
            status: of these.
            seconds: to wait at most; what is left then is delivered when the same training is started again.
        """
        self._append({"kind": "end", "status": status})
        self._closed.set()
        self.deliver(seconds)

    def deliver(self, seconds: float) -> None:
        """Deliver what is in the journal, trying for so many seconds."""
        deadline = time.monotonic() + seconds
        while not self._deliver(deadline):
            if time.monotonic() > deadline:
                self._problem = (
                    f"MLflow at {self._uri} has not got everything; the rest is kept in {self._journal.folder} and "
                    "delivered when the same command is started again"
                )
                return
            time.sleep(0.2)

    @property
    def everything_is_delivered(self) -> bool:
        """Whether MLflow has got all that was recorded."""
        return self._journal.num_pending_bytes == 0

    def set_progress(self, progress: dict[str, Any]) -> None:
        """Where the training is, for the driver to show."""
        self._progress = progress

    def warn(self, text: str) -> None:
        """Have the driver tell the user, once."""
        self._notices.append(text)

    def get_progress(self) -> dict[str, Any]:
        """The latest progress, the run's page, the latest problem with MLflow, and all that the user is to be told."""
        news = {"link": self.link(), "problem": self._problem, "notices": list(self._notices)}
        return {**self._progress, **news}

    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self._uri)

    def _deliver_until_closed(self) -> None:
        pause = 0.0
        while not self._closed.wait(pause):
            pause = FLUSH_SECONDS if self._deliver() else RETRY_SECONDS

    def _deliver(self, deadline: float = math.inf) -> bool:
        """Deliver all that is pending; whether that went well."""
        wait = -1 if deadline == math.inf else max(0.0, deadline - time.monotonic())
        if not self._delivering.acquire(timeout=wait):
            return False
        try:
            if self._run_id is None:
                self._run_id = self._attach()
                self._attached.set()
            self._send_records(self._run_id)
        except Exception as error:  # MLflow, its database and the network raise many kinds
            self._problem = (
                f"MLflow at {self._uri} does not answer ({first_line(error)}); "
                f"what it is to be told is kept in {self._journal.folder} and sent again"
            )
            return False
        finally:
            self._delivering.release()
        if self._problem is not None and "does not answer" in self._problem:
            self._problem = None
            self._notices.append(f"MLflow at {self._uri} answers again, and has got everything")
        return True

    def _attach(self) -> str:
        """The run that the journal goes to: the one known, one with the journal's or the folder's tag, or a new one."""
        client = self._client()
        experiment_id = find_experiment(client, self._experiment, self._artifacts_folder)
        is_fresh = self._journal.mark.run_id is None
        run = run_if_there(client, self._journal.mark.run_id or self._known_run_id)
        run = run or run_with_tag(client, experiment_id, JOURNAL_TAG, self._journal.mark.token)
        if run is None and is_fresh:
            # Begun by an attempt that did not live to write it down; not the finished one of a deleted folder.
            running = "attributes.status = 'RUNNING'"
            run = run_of_folder(client, experiment_id, self._run_folder, running, self._parameters)
        if run is None:
            tags = {RUN_TAG: self._run_folder, JOURNAL_TAG: self._journal.mark.token}
            run = client.create_run(experiment_id, run_name=self._run_name, tags=tags)
        elif is_fresh:
            for name in run.data.metrics:
                self._held[name] = max(metric.step for metric in client.get_metric_history(run.info.run_id, name))
        run_id, self._experiment_id = str(run.info.run_id), str(run.info.experiment_id)
        self._journal.deliver_to(run_id)
        return run_id

    def _send_records(self, run_id: str) -> None:
        """Send pending records in their order, metrics many at a time."""
        client = self._client()
        metrics: list[Any] = []
        place = self._journal.mark.delivered
        for place_after, record in self._journal.records(place):
            of_record = self._metrics(record) if record["kind"] == "metrics" else []
            if metrics and (record["kind"] != "metrics" or len(metrics) + len(of_record) > MAX_METRICS_A_CALL):
                client.log_batch(run_id, metrics=metrics)
                self._journal.delivered(place)
                metrics = []
            if record["kind"] == "metrics":
                metrics += of_record
            else:
                self._send(client, run_id, record)
                self._journal.delivered(place_after)
            place = place_after
        if metrics:
            client.log_batch(run_id, metrics=metrics)
        if place != self._journal.mark.delivered:
            self._journal.delivered(place)

    def _metrics(self, record: Record) -> list[Any]:
        from mlflow.entities import Metric

        step, milliseconds = record["step"], record["time"]
        return [
            Metric(name, value, milliseconds, step)
            for name, value in record["metrics"].items()
            if step > self._held.get(name, -1)
        ]

    def _send(self, client: Any, run_id: str, record: Record) -> None:
        """Send a record that is not of metrics; one that MLflow refuses for good is told of and left out."""
        from mlflow.exceptions import MlflowException

        try:
            if record["kind"] == "parameters":
                log_parameters(client, run_id, record["parameters"])
            elif record["kind"] == "parent":
                client.set_tag(run_id, PARENT_TAG, record["run_id"])
            elif record["kind"] == "begin":
                client.update_run(run_id, status="RUNNING")
            elif record["kind"] == "end":
                client.set_terminated(run_id, record["status"])
            else:
                self._send_artifact(client, run_id, record)
            self._failed_attempts = 0
        except (MlflowException, OSError, UserError) as error:
            self._failed_attempts += 1
            refused = isinstance(error, MlflowException) and error.error_code in REFUSALS
            is_artifact = record["kind"] in ("file", "folder", "model")
            if not refused and not (is_artifact and self._failed_attempts >= ARTIFACT_ATTEMPTS and answers(client)):
                raise
            self._failed_attempts = 0
            what = record.get("name") or record.get("to") or record["kind"]
            self._notices.append(f"MLflow: {what} could not be recorded ({first_line(error)})")

    def _send_artifact(self, client: Any, run_id: str, record: Record) -> None:
        if record["kind"] == "model":
            if not served_models(client, run_id):  # sent, but the mark did not get that far
                with local_folder(record["folder"]) as folder:
                    log_served_model(self._uri, client.get_run(run_id).info, folder)
            return
        if record["kind"] == "folder":
            with local_folder(record["folder"]) as folder:
                for name in sorted(os.listdir(folder)):
                    client.log_artifact(run_id, os.path.join(folder, name), record["to"])
            return
        kept = self._journal.path(record["file"])
        if not kept.exists():  # sent, but the mark did not get that far
            return
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, record["name"])
            os.symlink(kept, path)
            client.log_artifact(run_id, path, record["to"])
        kept.unlink()
