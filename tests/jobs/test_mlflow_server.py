"""`make mlflow`: a server on the loopback that records runs, keeps their files and registers the best."""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.mlflow_models import BEST_CHECKPOINT
from pipeline.mlflow_server import server_finding
from pipeline.registry import download_registered, register
from pipeline.tracking import Tracker
from tests.jobs.running import ROOT, environment
from tests.jobs.sockets import beyond_loopback, descendants, listening

pytestmark = pytest.mark.cluster
START_SECONDS = 240.0  # it takes ten on a quiet machine


def command(runs: Path, port: int) -> list[str]:
    """What `make mlflow` runs, with this Python's MLflow."""
    done = subprocess.run(
        ["make", "--dry-run", "mlflow", f"RUNS={runs}", f"MLFLOW_PORT={port}"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    text = done.stdout.replace("\\\n", " ")
    (line,) = re.findall(r"\S*/mlflow (server .*)", text)
    return [sys.executable, "-m", "mlflow", *shlex.split(line)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Its address and process."""
    runs = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = open(runs / "server.log", "wb")  # noqa: SIM115 - the server keeps it
    process = subprocess.Popen(
        command(runs, port), stdout=log, stderr=subprocess.STDOUT, env=environment(), cwd=runs, start_new_session=True
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not server_finding(f"http://127.0.0.1:{port}").ok:
            assert process.poll() is None, (runs / "server.log").read_text()
            assert time.monotonic() < deadline, (runs / "server.log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_it_hears_the_loopback_alone(server: tuple[str, int]) -> None:
    found = listening(descendants(server[1]))
    assert server[0].removeprefix("http://") in found
    assert beyond_loopback(found) == {}


def test_runs_are_recorded_and_registered(server: tuple[str, int], tmp_path: Path) -> None:
    uri = server[0]
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "checkpoint.json").write_text("{}")
    tracker = Tracker(uri, "experiment", "a-run", str(tmp_path / "a-run"), None)
    run_id = tracker.start(None, {"seed": "3"})
    assert run_id is not None
    tracker.log(1, {"loss": 1.0})
    tracker.log_folder(str(tmp_path / "checkpoint"), BEST_CHECKPOINT)
    assert re.fullmatch(rf"{uri}/#/experiments/\d+/runs/{run_id}\?workflowType=machine_learning", tracker.link() or "")
    tracker.finish("FINISHED")
    assert tracker.get_progress()["problem"] is None
    assert register(uri, "shapes", run_id, 0.5, "digest").champion
    folder = Path(download_registered("models:/shapes@champion", uri))
    assert (folder / "checkpoint.json").read_text() == "{}"
    with pytest.raises(UserError, match="models:/shapes@nobody at"):
        download_registered("models:/shapes@nobody", uri)
