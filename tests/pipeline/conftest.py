"""Fixtures of the tests of the pipeline."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.mlflow_runs import default_uri
from pipeline.prepare import prepare
from tests.pipeline.factories import Prepared, experiment, two_sources


@pytest.fixture(autouse=True, scope="session")
def no_progress_lines() -> Iterator[None]:
    """How long shards take on a busy machine decides nothing about what a test is told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.prepare.PROGRESS_SECONDS", float("inf"))
        yield


@pytest.fixture(scope="session")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, which take seconds to make; to be copied."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    MlflowClient(default_uri(str(folder))).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def prepared(no_progress_lines: None, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Two training files with different classes and a validation file, as shards; not to be changed."""
    folder = tmp_path_factory.mktemp("prepared")
    contents = two_sources(folder / "data")
    config = experiment(folder / "data", folder / "runs")
    said: list[str] = []
    data = prepare(config, said.append)
    return Prepared(folder / "data", config, data, said, contents)
