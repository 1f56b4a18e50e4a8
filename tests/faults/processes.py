"""Jobs that are to be harmed: their processes, how far they are, what they left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from pipeline.mlflow_runs import default_uri
from tests.jobs.running import ROOT, TIMEOUT_SECONDS, Outcome, environment
from tests.jobs.sockets import descendants


def wait_until(condition: Callable[[], object], what: str, seconds: float = TIMEOUT_SECONDS) -> None:
    """Wait on a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.02)


def write_whole(path: Path, text: str) -> None:
    """A file that is never seen half-written."""
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").rename(path)


def kill_one(pids: list[int], which: int = 0, number: signal.Signals = signal.SIGKILL) -> int | None:
    """Send a signal to one of several processes; its id, None where there is none any more."""
    if not pids:
        return None
    pid = sorted(pids)[which % len(pids)]
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return None
    return pid


class Job:
    """`python jobs/NAME.py ...` with all the processes that it starts."""

    def __init__(self, log: Path, name: str, *arguments: str, **variables: str) -> None:
        self.log = log
        self._output, self._errors = open(log, "wb"), open(f"{log}.errors", "wb")  # noqa: SIM115 - the job keeps them
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments],
            stdout=self._output, stderr=self._errors, cwd=ROOT, start_new_session=True,
            env={**environment(), **variables},
        )  # fmt: skip

    def pids(self, title: str) -> list[int]:
        """Processes of this job whose command line holds the title, such as "RayTrainWorker"."""
        return [pid for pid, command in self._processes() if title in command]

    def _processes(self) -> Iterator[tuple[int, str]]:
        """All of the session that the driver leads: Ray's processes have groups of their own, but stay in it."""
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                    if int(session) == self.process.pid and state != "Z":
                        yield int(folder.name), (folder / "cmdline").read_bytes().decode(errors="replace")
                except OSError:
                    continue  # gone

    @property
    def is_running(self) -> bool:
        """Whether the driver lives."""
        return self.process.poll() is None

    def kill(self, title: str, which: int = 0, number: signal.Signals = signal.SIGKILL) -> int | None:
        """Send a signal to one of the processes of a title; its id, None where there is none."""
        return kill_one(self.pids(title), which, number)

    def kill_everything(self) -> None:
        """As when the machine goes down; only processes of this job."""
        wait_until(lambda: self._kill_once() == 0, "the job's processes end", 60)
        self.process.wait()

    def _kill_once(self) -> int:
        pids = [pid for pid, _ in self._processes()]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if not self.is_running:
            self.process.wait()
        return len(pids)

    def end(self) -> Outcome:
        """Wait for the driver, end what it left behind; what it printed."""
        try:
            self.process.wait(TIMEOUT_SECONDS)
        finally:
            self.kill_everything()
        return Outcome(self.process.returncode, self.log.read_text(), Path(f"{self.log}.errors").read_text())


def pids_on(node: Any, title: str) -> list[int]:
    """Processes that a node of a `ray.cluster_utils.Cluster` has started whose command line holds the title."""
    raylet = node.all_processes["raylet"][0].process.pid
    return [pid for pid in descendants(raylet) if title in _command_line(pid)]


def _command_line(pid: int) -> str:
    """Of a process; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def steps_done(run_folder: Path) -> int:
    """Last step whose metrics are in the run's journal."""
    path = run_folder / "tracking" / "records.jsonl"
    if not path.exists():
        return 0
    lines = path.read_bytes().split(b"\n")[:-1]
    return max((json.loads(line).get("step", 0) for line in lines), default=0)


def wait_for_step(job: Job, run_folder: Path, step: int) -> None:
    """Until the job has come so far; it must not end before."""

    def has_come_so_far() -> bool:
        assert job.is_running, Path(f"{job.log}.errors").read_text()
        return steps_done(run_folder) >= step

    wait_until(has_come_so_far, f"step {step}")


def wait_for_more_steps(job: Job, run_folder: Path, step: int) -> None:
    """Until the job has gone beyond a step, or has ended."""
    wait_until(lambda: steps_done(run_folder) > step or not job.is_running, f"more than {step} steps")


def last_weights(run_folder: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint."""
    folder = max(run_folder.glob("checkpoint-*"))
    return load_file(folder / "model.safetensors")


def assert_same_weights(run_folder: Path, expected: Path) -> None:
    """Every tensor of the last checkpoints, to the bit."""
    ours, theirs = last_weights(run_folder), last_weights(expected)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 50
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_each_step_once(uri: str, run_id: str, last_step: int) -> None:
    """In MLflow, whatever happened."""
    steps = [metric.step for metric in MlflowClient(uri).get_metric_history(run_id, "loss")]
    assert sorted(steps) == list(range(1, last_step + 1))


def status_of(storage_path: Path, run_id: str) -> str:
    """Of a run in the sqlite file of a storage path."""
    return str(MlflowClient(default_uri(str(storage_path))).get_run(run_id).info.status)
