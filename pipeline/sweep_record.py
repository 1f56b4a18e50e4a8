"""The MLflow run of a sweep, and what the runs of its trials are told."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from pipeline.mlflow_runs import (
    MAX_METRICS_A_CALL,
    PARENT_TAG,
    RUN_TAG,
    find_experiment,
    first_line,
    log_parameters,
    run_if_there,
    run_of_folder,
)


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
            run_folder: by which a run is found that was begun but not written down; a child also where it has ended.
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
        client = self._client()
        experiment_id = find_experiment(client, self._experiment, self._artifacts_folder)
        further = f"tags.`{PARENT_TAG}` = '{parent}'" if parent else "attributes.status = 'RUNNING'"
        run = run_if_there(client, known) or run_of_folder(client, experiment_id, run_folder, further, parameters)
        if run is not None:
            client.update_run(run.info.run_id, status="RUNNING")
            return str(run.info.run_id)
        tags = {RUN_TAG: run_folder, **({PARENT_TAG: parent} if parent else {})}
        run_id = str(client.create_run(experiment_id, run_name=name, tags=tags).info.run_id)
        log_parameters(client, run_id, parameters)
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
            self._say(f"warning: MLflow at {self._uri}: {problem} ({first_line(error)})")
            return None
