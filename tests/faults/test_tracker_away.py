"""A real MLflow server that is never up, dies in the middle, is slow, and comes back."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.tracking import Tracker
from tests.faults.processes import assert_each_step_once, wait_until

pytestmark = pytest.mark.faults


class Server:
    """`mlflow server` on a port of its own, which stays the same when it is started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri, self._folder = f"http://127.0.0.1:{self.port}", folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, wait: bool = True) -> None:
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--backend-store-uri", f"sqlite:///{self._folder}/server.db", "--workers", "1"),
            *("--artifacts-destination", str(self._folder / "artifacts")),
        ]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, start_new_session=True, **quiet)  # type: ignore[call-overload]
        if wait:
            wait_until(self._answers, "the MLflow server", 120)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                return b"200" in connection.recv(100)
        except OSError:
            return False

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self.send(signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.kill()


def test_never_up_killed_frozen_and_back(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr("pipeline.tracking.FLUSH_SECONDS", 0.1)
    monkeypatch.setattr("pipeline.tracking.RETRY_SECONDS", 0.2)
    tracker = Tracker(server.uri, "faults", "run", str(tmp_path / "run"), None)
    slowest = 0.0

    def log(first: int, last: int) -> None:
        nonlocal slowest
        for step in range(first, last):
            began = time.monotonic()
            tracker.log_rows([(step, {"loss": 1.0 / step, "learning_rate": 0.1})])
            slowest = max(slowest, time.monotonic() - began)

    tracker.start(None, {"seed": "0"}, seconds=0)  # never up so far
    log(1, 101)
    wait_until(lambda: tracker.get_progress()["problem"], "the problem is told")
    assert tracker.run_id() is None
    server.start()
    wait_until(lambda: tracker.everything_is_delivered, "delivered once it is up")
    run_id = tracker.run_id()
    assert run_id is not None

    harms: list[tuple[Callable[[], None], Callable[[], None]]] = [
        (server.kill, server.start),
        (lambda: server.send(signal.SIGSTOP), lambda: server.send(signal.SIGCONT)),
    ]
    for damage, repair in harms:
        first = len(tracker._journalled["loss"]) + 1
        log(first, first + 50)
        damage()
        log(first + 50, first + 100)
        wait_until(lambda: tracker.get_progress()["problem"], "the problem is told")
        assert not tracker.everything_is_delivered
        repair()
        wait_until(lambda: tracker.everything_is_delivered, "delivered once it is back")
        wait_until(lambda: tracker.get_progress()["problem"] is None, "the problem is over")
    tracker.log_text("{}", "config.json")
    tracker.finish("FINISHED", 60)
    assert_each_step_once(server.uri, run_id, 300)
    client = MlflowClient(server.uri)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run_id)] == ["config.json"]
    assert len(client.search_runs([client.get_run(run_id).info.experiment_id])) == 1
    assert slowest < 0.5, "nobody waited for the server"


def test_a_run_that_ended_without_it_is_delivered_by_the_next_start(server: Server, tmp_path: Path) -> None:
    arguments = (server.uri, "faults", "run", str(tmp_path / "run"), None)
    tracker = Tracker(*arguments)
    tracker.start(None, {"seed": "0"}, seconds=0)
    tracker.log_rows([(step, {"loss": 1.0}) for step in (1, 2, 3)])
    tracker.finish("KILLED", 0.1)
    server.start()
    again = Tracker(*arguments)
    again.deliver(60)
    run_id = again.run_id()
    assert run_id is not None
    assert_each_step_once(server.uri, run_id, 3)
    assert MlflowClient(server.uri).get_run(run_id).info.status == "KILLED"
    shutil.rmtree(tmp_path / "run")
