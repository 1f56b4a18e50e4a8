"""Two nodes of a cluster on one machine: two `ray start` with addresses of the loopback and resources of their own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.jobs.running import Outcome, environment
from tests.jobs.sockets import descendants

HEAD, WORKER = "127.0.0.2", "127.0.0.3"
START_SECONDS = 180.0
RAY = (sys.executable, "-m", "ray.scripts.scripts")


class Nodes:
    """A head that has no CPUs, and a node that may be taken away and replaced."""

    def __init__(self, folder: Path, token: str) -> None:
        self.folder = folder
        self.gcs, self.jobs, *self.agents = _free_ports(5)
        self.client_environment = {
            **environment(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_ADDRESS": f"http://{HEAD}:{self.jobs}",
        }  # fmt: skip
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self._environment = {**environment(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "PATH": path}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start_head(self) -> None:
        """Its dashboard listens at HEAD alone."""
        arguments = (
            *("--head", f"--node-ip-address={HEAD}", f"--dashboard-host={HEAD}", "--num-cpus=0", f"--port={self.gcs}"),
            *(f"--dashboard-port={self.jobs}", f"--dashboard-agent-listen-port={self.agents[0]}"),
            *(f"--ray-client-server-port={self.agents[1]}", f"--temp-dir={self.folder}", "--disable-usage-stats"),
        )
        self._start("head", (*RAY, "start", "--block", *arguments))
        _wait_for_port(HEAD, self.jobs, self._processes["head"])

    def start_worker(self, cpus: int, wrap: Sequence[str] = (), python_path: str = "") -> None:
        """A node with some CPUs, perhaps inside of another command, perhaps with other packages before its own."""
        arguments = (
            *(f"--address={HEAD}:{self.gcs}", f"--node-ip-address={WORKER}", f"--num-cpus={cpus}"),
            f"--dashboard-agent-listen-port={self.agents[2]}",
        )
        self._start(
            "worker", (*wrap, *RAY, "start", "--block", *arguments), {"PYTHONPATH": python_path} if python_path else {}
        )

    def stop(self, name: str) -> None:
        """End a node with all that it started, jobs too, as sudden as a machine that goes."""
        process = self._processes.pop(name)
        for started in descendants(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(started, signal.SIGKILL)
        process.wait()

    def stop_all(self) -> None:
        """End all that was started."""
        for name in list(self._processes):
            self.stop(name)

    def submit(self, clone: Path, *command: str) -> Outcome:
        """`ray job submit --working-dir . -- COMMAND` in a clone, followed to its end."""
        return self.run((*RAY, "job", "submit", "--working-dir", ".", "--", *command), clone)

    def run(self, command: Sequence[str], folder: Path, **changes: str) -> Outcome:
        """A command of somebody who is outside of the cluster."""
        done = subprocess.run(
            command, cwd=folder, env={**self.client_environment, **changes},
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        return Outcome(done.returncode, done.stdout, done.stderr)

    def _start(self, name: str, command: Sequence[str], changes: dict[str, str] | None = None) -> None:
        log = open(self.folder / f"{name}.log", "ab")  # noqa: SIM115 - the node keeps it
        self._processes[name] = subprocess.Popen(
            command, env={**self._environment, **(changes or {})}, stdout=log, stderr=log, start_new_session=True
        )


def _wait_for_port(host: str, port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
            return
        assert process.poll() is None, "the head ended"
        assert time.monotonic() < deadline, "the head does not come up"
        time.sleep(0.2)


def _free_ports(number: int) -> list[int]:
    """Below the range that Ray gives its workers' own."""
    ports: list[int] = []
    for candidate in range(20000 + os.getpid() % 5000, 32000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((HEAD, candidate))
            ports.append(candidate)
        if len(ports) == number:
            break
    return ports
